"""Output and input scores: the card's toys, the fast path against the plain hook, limits that are known."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.book import papers
from steerkit.book.provenance import versions
from steerkit.engine.steer import Boost, steering
from steerkit.features import logit_lens
from steerkit.files import DATA, write_atomic
from steerkit.methods.output_scores.inputs import TopRecords, collect, input_scores
from steerkit.methods.output_scores.score import PROMPT, lens_rank, lens_tokens, output_scores, rank_weighted, token_confidence
from steerkit.models import load


def toy_sae():
    """The SAE of the method card's first check."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=2, d_sae=3, dtype="float32", device="cpu", apply_b_dec_to_input=False))
    weights = {
        "W_enc": [[1, 0, -1], [0, 1, 1]], "b_enc": [0, -0.5, 0], "threshold": [0.5, 1, 1.5],
        "W_dec": [[1, 0], [0, 1], [0.6, 0.8]], "b_dec": [0.1, -0.1],
    }  # fmt: skip
    sae.load_state_dict({k: torch.tensor(v, dtype=torch.float32) for k, v in weights.items()})
    return sae.eval()


def test_the_push_of_the_toy_sae():
    x = torch.tensor([[[1.0, 2.0]]])
    assert torch.allclose(x + Boost(0, toy_sae(), 2, 2.0).delta(x), torch.tensor([2.8, 4.4]))
    assert torch.equal(Boost(0, toy_sae(), 2, 0.0).delta(x), torch.zeros(1, 1, 2))


def test_the_score_of_the_toy_logits_and_its_bounds():
    logits = torch.tensor([[2, 1, 0.5, 0, -1, -1.5, -2, -3]])
    score, p, rank = rank_weighted(logits, torch.tensor([[2, 5]]))
    assert p.item() == pytest.approx(0.121837, abs=1e-6) and rank.item() == 2 and score.item() == pytest.approx(0.0913777, abs=1e-7)
    top, p_top, _ = rank_weighted(logits, torch.tensor([[5, 0]]))
    assert top.item() == p_top.item() == pytest.approx(float(logits.softmax(-1)[0, 0]))
    many = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 4
    lens = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i))[:6] for i in range(50)])
    small, large = rank_weighted(many, lens[:, :3])[0], rank_weighted(many, lens)[0]
    assert (small >= 0).all() and (large <= 1).all() and (large >= small).all()  # more lens tokens never lower it
    assert torch.equal(large, rank_weighted(many, lens.flip(1))[0])
    tau = 0.05
    scores, _, ranks = rank_weighted(many, lens)
    assert (ranks[scores >= tau] <= 1 / tau - 1).all()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "gptneox"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_fast_path_equals_one_hooked_pass_a_feature(kind, layer):
    """The definition, literally: steer the last position of a whole forward pass, sort all probabilities, in float64."""
    lab = tiny.lab(kind, saes={layer: tiny.planted_sae()})
    model, sae, (ids, _) = lab.hf, lab.sae(layer), lab.tokens([PROMPT])
    wanted = [_lens(model, sae.W_dec[i], 5) for i in range(40)]
    found = output_scores(lab.at(layer), range(40), factor=3.0, lens=torch.tensor(wanted), batch_size=16)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits[0, -1].double()
        for i, lens in enumerate(wanted):
            with steering(lab, Boost(layer, sae, i, 3.0), window="last", record=False):
                logits = model(input_ids=ids).logits[0, -1].double()
            for which, want in ((logits, found.score[i]), (plain, found.unsteered[i])):
                p = which.softmax(0)
                best = max(p[t] for t in lens)
                assert want.item() == pytest.approx(float((1 - (p > best).sum() / len(p)) * best), rel=1e-4, abs=1e-9)
            change = (logits.log_softmax(0).sort().values[-20:].mean() - plain.log_softmax(0).sort().values[-20:].mean()).abs()
            assert found.confidence[i].item() == pytest.approx(float(change), rel=1e-3, abs=1e-4)


def _lens(model, direction, k):
    norm = next(m for name, m in model.base_model.named_children() if name in ("norm", "ln_f", "final_layer_norm"))
    logits = model.get_output_embeddings()(norm(direction[None]))[0].double()
    return logits.argsort(descending=True)[:k].tolist()


def test_the_papers_variants_are_options():
    at = tiny.lab().at(1)
    few = {"features": range(20), "lens": lens_tokens(at.model, at.sae.W_dec[:20], k=5)}
    plain = output_scores(at, **few)
    assert torch.equal(output_scores(at, **few, subtract=True).score, plain.score - plain.unsteered)
    other = output_scores(at, **few, prompt="In my experience,")
    assert not torch.allclose(other.score, plain.score)
    exact = output_scores(at, **few, keep_error=False)  # the planted SAE makes no error
    torch.testing.assert_close(exact.score, plain.score, rtol=1e-3, atol=1e-6)
    at.sae.cfg.apply_b_dec_to_input = False
    with torch.no_grad():
        at.sae.b_dec.add_(1.0)  # now the reconstruction is off by one everywhere
    off = output_scores(at, **few, keep_error=False)
    assert not torch.allclose(off.score, plain.score, rtol=1e-2)
    torch.testing.assert_close(output_scores(at, **few).score, plain.score)  # the error is added back


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_large_push_after_the_last_block_leaves_only_the_lens(kind):
    """s -> infinity: the next-token distribution is that of the decoder row alone, so the top lens token has rank 0."""
    at = tiny.lab(kind, saes={2: tiny.planted_sae()}).at(2)
    found = output_scores(at, factor=1e6)
    head, norm = at.model.get_output_embeddings(), at.model.base_model.norm
    with torch.inference_mode():
        logits = head(norm(at.sae.W_dec * 1e6))
        cap = getattr(at.model.config, "final_logit_softcapping", None)
        logits = cap * torch.tanh(logits / cap) if cap else logits
    assert (found.rank == 0).all()
    torch.testing.assert_close(found.score, logits.softmax(-1).amax(-1), rtol=1e-3, atol=1e-5)


def test_gemmas_soft_cap_comes_after_the_lens_and_before_the_score():
    """The card's toy: logits 40, 20, 0 are capped to 30 tanh(z / 30), which leaves the order and makes p 0.99982."""
    capped = 30 * torch.tanh(torch.tensor([[40.0, 20.0, 0.0]]) / 30)
    score, p, rank = rank_weighted(capped, torch.tensor([[0]]))
    assert p.item() == pytest.approx(0.99982, abs=5e-6) and rank.item() == 0 and score.item() == p.item()
    at = tiny.lab("gemma2", saes={2: tiny.planted_sae()}).at(2)
    at.model.config.final_logit_softcapping = 0.1
    tight = output_scores(at, range(20), factor=50.0)
    usual = tiny.lab("gemma2", saes={2: at.sae}).at(2)
    assert torch.equal(lens_tokens(at.model, at.sae.W_dec[:20]), lens_tokens(usual.model, at.sae.W_dec[:20]))  # no cap in the lens
    assert (tight.p < np.exp(0.2) / 260).all() and (output_scores(usual, range(20), factor=50.0).p > tight.p).all()


def test_scores_do_not_depend_on_batches_and_bad_features_are_refused():
    at = tiny.lab("gpt2").at(1)
    a, b = (output_scores(at, batch_size=n) for n in (7, 128))
    torch.testing.assert_close(a.score, b.score)
    some = output_scores(at, [3, 90])
    torch.testing.assert_close(some.score, a.score[[3, 90]])
    with pytest.raises(ValueError, match="expected 0 to 127"):
        output_scores(at, [128])
    with pytest.raises(ValueError, match="a row for each of 2"):
        output_scores(at, [0, 1], lens=torch.zeros(3, 5, dtype=torch.long))


def test_lens_tokens_equal_the_logit_lens_and_ignore_scale():
    lab = tiny.lab()
    W_dec = lab.sae(1).W_dec
    found = lens_tokens(lab.hf, W_dec[:9], k=4, chunk=4)
    for i in range(9):
        assert [lab.tokenizer.decode([t]) for t in found[i].tolist()] == [w for w, _ in logit_lens(lab, W_dec[i], k=4)]
    assert torch.equal(found, lens_tokens(lab.hf, 7.0 * W_dec[:9], k=4))
    assert lens_rank(lab.hf, W_dec[:9], found[:, 2], chunk=4).tolist() == [2] * 9


def test_token_confidence_of_known_distributions():
    flat = torch.zeros(1, 100)
    assert token_confidence(flat, k=20).item() == pytest.approx(np.log(100), rel=1e-6)
    assert token_confidence(torch.log(torch.tensor([[0.5, 0.25, 0.25]])), k=2).item() == pytest.approx(-np.log(0.5 * 0.25) / 2, rel=1e-6)


def test_top_records_equal_a_full_sort_whatever_the_batches():
    g = torch.Generator().manual_seed(0)
    acts = torch.relu(torch.randn(60, 9, 14, generator=g))
    ids = torch.randint(0, 50, (60, 9), generator=g)
    keep = torch.rand(60, 9, generator=g) > 0.2
    for size in (1, 7, 60):
        records = TopRecords(14, k=10)
        for part in torch.arange(60).split(size):
            records.add(acts[part], ids[part], keep[part])
        for f in range(14):
            best = sorted(((float((acts[r, :, f] * keep[r]).max()), r) for r in range(60)), reverse=True)[:10]
            assert records.values[f].tolist() == pytest.approx([v for v, _ in best])
            assert records.tokens[f].tolist() == [int(ids[r, (acts[r, :, f] * keep[r]).argmax()]) for _, r in best]
    silent = TopRecords(1, k=3)
    silent.add(torch.zeros(4, 5, 1), torch.ones(4, 5, dtype=torch.long))
    assert silent.tokens.tolist() == [[-1, -1, -1]]  # a feature that never fires has no record


def test_records_are_collected_at_ordinary_positions_in_one_pass_over_all_layers():
    lab = tiny.lab(saes={0: tiny.planted_sae(), 1: tiny.planted_sae()})
    rows = torch.randint(3, 250, (11, 9), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = lab.tokenizer.bos_token_id
    found = collect(lab, list(rows), k=4, batch_size=4)
    for layer in (0, 1):
        with torch.inference_mode():
            x = lab.hf(input_ids=rows, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
        peak, where = torch.cat([x, -x], 2).relu()[:, 1:].max(1)
        value, row = peak.topk(4, dim=0)
        torch.testing.assert_close(found[layer].values, value.T, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[layer].tokens, rows[:, 1:].gather(1, where).gather(0, row).T)


def test_input_scores_count_records_and_refuse_too_few():
    lens = torch.tensor([[1, 2], [1, 2], [1, 2]])
    tokens = torch.tensor([[1, 1, 2, 7], [7, 8, 9, 1], [1, -1, -1, -1]])
    score, n = input_scores(lens, tokens, min_records=2)
    assert score[:2].tolist() == [0.75, 0.25] and score[2].isnan() and n.tolist() == [4, 4, 1]


def receipt(preset, found, folder=DATA / "receipts"):
    """Write how far scores are from the published ones (columns s_out, ours), so that who has no hub can see that it was checked."""
    large, order = found[found.s_out > 1e-3], found.s_out.corr(found.ours, method="spearman")
    said = {
        "preset": preset, "features": len(found), "above 0.001": len(large), "rank correlation": order,
        "largest relative difference above 0.001": float((large.ours / large.s_out - 1).abs().max()), "versions": versions(),
    }  # fmt: skip
    write_atomic(folder / f"output_scores-{preset}.json", json.dumps(said, indent=1) + "\n")
    return said


@pytest.mark.hub
@pytest.mark.parametrize("name", ["pythia-70m", "gemma-2-2b"])
def test_published_output_scores(name):
    """Within 1 % above 0.001, in float32; what was found is written to data/receipts first, to be committed."""
    wanted = papers.golden(name).dropna(subset=["s_out"])
    try:
        lab = load.open(name, layers=sorted(set(wanted.layer)), dtype="float32")
    except (ConnectionError, PermissionError, OSError) as error:
        pytest.skip(f"needs the hub: {str(error)[:80]}")
    parts = [part.assign(ours=output_scores(lab.at(layer), part.feature.tolist()).score.numpy()) for layer, part in wanted.groupby("layer")]
    said = receipt(name, pd.concat(parts))
    assert said["largest relative difference above 0.001"] < 0.01 and said["rank correlation"] > 0.98, said


def test_a_receipt_says_how_far_scores_are_from_the_published_ones(tmp_path):
    found = papers.golden("pythia-70m").assign(ours=lambda t: t.s_out * 1.005)
    found.loc[found.s_out < 1e-3, "ours"] *= 3  # small ones do not count, but for their order
    said = receipt("pythia-70m", found, tmp_path)
    assert said["largest relative difference above 0.001"] == pytest.approx(0.005) and said["rank correlation"] > 0.99
    assert json.loads((tmp_path / "output_scores-pythia-70m.json").read_text()) == said and said["features"] == len(found) == 62


def test_no_score_comes_from_logits_that_are_not_finite():
    """A NaN has no token above it, so its rank would be the best one."""
    at = tiny.lab(hf=tiny.model("llama").half()).at(1)
    lens = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match=r"features \[5\], factor 1e\+06: expected finite logits.*torch.float16"):
        output_scores(at, [5], factor=1e6, lens=lens)
    with pytest.raises(ValueError, match="factor: expected a finite number"):
        output_scores(at, [5], factor=float("nan"), lens=lens)

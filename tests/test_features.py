"""Features of text: streams, pooling, lens and contexts, each against a loop."""

import numpy as np
import pytest
import tiny
import torch
from sklearn.metrics import roc_auc_score
from steered import padded

from steerkit.features import feature_means, logit_lens, ordinary_positions, read, residuals, target_features, token_batches, top_contexts

TEXTS = ["abc", "a longer text than the first", "q"]


def test_batches_keep_order_and_pad_on_the_right():
    tok = tiny.tokenizer()
    rows = [(i, m) for ids, mask in token_batches(tok, TEXTS, batch_size=2) for i, m in zip(ids, mask)]
    for (ids, mask), text in zip(rows, TEXTS):
        assert ids[mask.bool()].tolist() == [tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]
        assert not mask.flip(0).cummax(0).values.flip(0).ne(mask).any()  # no gap: ones, then zeros


def test_residuals_stop_early_and_equal_hidden_states():
    model, (ids, mask) = tiny.model("qwen3"), padded((6, 6), 6)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    before = sum(len(m._forward_hooks) for m in model.modules())  # transformers keeps hooks of its own
    found = residuals(model, ids, mask, layers=[0, 1])
    assert torch.allclose(found[0], hidden[1]) and torch.allclose(found[1], hidden[2])
    assert sum(len(m._forward_hooks) for m in model.modules()) == before


def test_ordinary_positions_leave_out_pads_first_special_and_outliers():
    ids = torch.tensor([[0, 0, 1, 9, 9, 9], [1, 9, 2, 9, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    resid = torch.ones(2, 6, 4)
    resid[1, 4] = 100.0
    keep = ordinary_positions(ids, mask, {0: resid}, special=[0, 1, 2], outlier=10.0)
    assert keep.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]]


def test_a_place_is_read_where_its_preset_says():
    """The stream is `residuals`'; what counts is what `ordinary_positions` keeps with the preset's outlier, or all real tokens."""
    (ids, mask), special = padded((9, 12), 12), tiny.tokenizer().all_special_ids
    kept = []
    for outlier in (1.05, 10.0):
        at = tiny.lab(outlier=outlier).at()
        resid, keep = read(at, ids, mask)
        assert torch.equal(resid, residuals(at.model, ids, mask, layers=[1])[1])
        assert torch.equal(keep, ordinary_positions(ids, mask, {1: resid}, special=special, outlier=outlier))
        assert torch.equal(read(at, ids, mask, include_first=True)[1], mask.bool()) and read(at, ids, include_first=True)[1].all()
        kept.append(int(keep.sum()))
    assert 0 < kept[0] < kept[1] == 8 + 11


@pytest.mark.parametrize("outlier", [1.05, 10.0])
def test_feature_means_encode_first_and_leave_the_first_token_and_outliers_out(outlier):
    lab = tiny.lab(outlier=outlier)
    got = feature_means(lab.at(), TEXTS, batch_size=1)
    for row, text in zip(got, TEXTS):
        ids = torch.tensor([[lab.tokenizer.bos_token_id, *lab.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        x = residuals(lab.hf, ids, layers=[1])[1][0, 1:].double()
        x = x[x.norm(dim=1) <= outlier * x.norm(dim=1).median()]
        oracle = torch.relu(torch.cat([x, -x], 1)).mean(0)  # the planted SAE: one feature a sign and coordinate
        torch.testing.assert_close(row.double(), oracle, rtol=1e-4, atol=1e-5)
    if outlier == 10.0:
        torch.testing.assert_close(feature_means(lab.at(), TEXTS, batch_size=2), got, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(feature_means(tiny.lab().at(), TEXTS), got, atol=1e-3)


def test_feature_means_with_the_first_token_are_over_all_positions():
    lab = tiny.lab(outlier=1.05)
    got = feature_means(lab.at(), TEXTS[:1], include_first=True)
    ids = torch.tensor([[lab.tokenizer.bos_token_id, *lab.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]]])
    x = residuals(lab.hf, ids, layers=[1])[1][0].double()
    torch.testing.assert_close(got[0].double(), torch.relu(torch.cat([x, -x], 1)).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gptneox"])
def test_logit_lens_is_the_head_of_the_normed_direction(kind):
    lab, v = tiny.lab(kind), torch.randn(tiny.D_MODEL)
    base = lab.hf.base_model
    norm = getattr(base, {"gpt2": "ln_f", "gptneox": "final_layer_norm"}.get(kind, "norm"))
    oracle = (lab.hf.get_output_embeddings()(norm(v[None]))[0]).topk(3)
    got = logit_lens(lab, v, k=3)
    assert [w for w, _ in got] == [lab.tokenizer.decode([i]) for i in oracle.indices.tolist()]
    assert [x for _, x in got] == pytest.approx(oracle.values.tolist(), rel=1e-5)


def test_top_contexts_find_planted_peaks_and_mark_the_edges():
    acts, tokens = torch.zeros(100, 2), torch.arange(100)
    acts[50, 0], acts[3, 0], acts[52, 0] = 5.0, 4.0, 3.0
    ids, peaks, places = top_contexts(acts, tokens, k=2, before=5, after=1)
    assert peaks[0].tolist() == [5.0, 4.0]
    assert places[0].tolist() == [50, 3]
    assert ids[0, 0].tolist() == [45, 46, 47, 48, 49, 50, 51]
    assert ids[0, 1].tolist() == [-1, -1, 0, 1, 2, 3, 4]


def test_a_layer_that_the_model_lacks_is_a_clear_error():
    with pytest.raises(ValueError, match="expected 0 to 2"):
        residuals(tiny.model("llama"), torch.ones(1, 3, dtype=torch.long), layers=[3])


def test_a_target_feature_tells_prompts_and_other_sentences_apart_and_is_rare():
    """Planted: 3 tells both apart; 1 the prompts alone; 4 both, but it is dense; 6 nothing; 2 both, a little less."""
    rng = np.random.default_rng(0)
    on, off, held_on, held_off = (torch.from_numpy(rng.random((16, 8))) for _ in range(4))
    for feature, part in ((3, on), (3, held_on), (1, on), (4, on), (4, held_on), (2, on)):
        part[:, feature] += 5
    held_on[:14, 2] += 5
    density = torch.full((8,), 0.005)
    density[4] = 0.3
    table = target_features([on, off, held_on, held_off], density, candidates=3)
    assert table.feature.tolist() == [3, 2, 1] and table.sentences.tolist()[0] == 1.0 and table.prompts.tolist() == [1.0] * 3
    labels = np.arange(32) < 16
    wanted = roc_auc_score(labels, np.concatenate([held_on[:, 2], held_off[:, 2]]))
    assert table.sentences[1] == pytest.approx(wanted) and (table.density < 0.01).all()
    second = target_features([on, off, held_on, held_off], density * 3, candidates=3)  # none below one per cent: the next limit
    assert second.feature.tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match=r"below a density of 0\.02"):
        target_features([on, off, held_on, held_off], density + 1)


def test_no_feature_is_chosen_by_means_that_are_not_numbers():
    positive = torch.tensor([[5.0, float("nan"), 1.0]])
    with pytest.raises(ValueError, match="feature means: expected finite numbers"):
        target_features([positive, torch.zeros(1, 3)] * 2, torch.zeros(3))
    lab = tiny.lab(hf=tiny.model("llama").half())
    with torch.no_grad():
        lab.hf.lm_head.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"directions: expected finite logits.*torch.float16"):
        logit_lens(lab, torch.ones(tiny.D_MODEL))

"""What steering costs: the fast path against the hook, a float64 oracle for minimal pairs, and the pair loader."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.engine.losses import next_token_losses
from steerkit.engine.steer import Add, residual_blocks, steering
from steerkit.questions import Question
from steerkit.scores.capability import COLUMNS, chooses_right, minimal_pairs, perplexity_ratio, prefers_good, steered_losses
from steerkit.store import Work

TEXTS = ["a much longer text than the others", "b", "four words of text", "An ordinary sentence.", "xy"]
SCALES = [0.0, 4.0, 12.0]


def vectors(n=3, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(seed)), dim=1)


def place(kind="llama", layer=1, **settings):
    return tiny.lab(kind, saes={}, **settings).at(layer)


def batch(n):
    return Work(n, progress=False)


def token_ids(at, text):
    return torch.tensor([[at.tokenizer.bos_token_id, *at.tokenizer(text, add_special_tokens=False)["input_ids"]]])


def by_hook(at, texts, vs, scales):
    """Mean losses by the whole model under the hook, one text, one vector and one scale at a time, without pads."""
    out = np.zeros((len(vs), len(scales), len(texts)))
    for v, s, t in np.ndindex(out.shape):
        ids = token_ids(at, texts[t])
        with torch.inference_mode(), steering(at.lab, Add(at.layer, vs[v], scales[s])):
            out[v, s, t] = next_token_losses(at.model(input_ids=ids, use_cache=False).logits, ids).mean().item()
    return out


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_losses_equal_the_hook_one_text_at_a_time(kind, batch_size):
    at, vs = place(kind), vectors()
    got = steered_losses(at, TEXTS, vs, SCALES, work=batch(batch_size))
    assert got.shape == (3, 3, 5)
    np.testing.assert_allclose(got, by_hook(at, TEXTS, vs, SCALES), rtol=2e-5, atol=2e-5)
    assert np.abs(got[:, 2] - got[:, 0]).min() > 1e-3, "steering that changes nothing proves nothing"


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_scale_zero_is_the_unsteered_model(kind):
    at = place(kind, layer=2)
    got = steered_losses(at, TEXTS, vectors(2), [0.0])
    for t, text in enumerate(TEXTS):
        ids = token_ids(at, text)
        with torch.inference_mode():
            plain = torch.log_softmax(at.model(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
        loss = -plain.gather(1, ids[0, 1:, None]).mean().item()
        np.testing.assert_allclose(got[:, 0, t], loss, rtol=1e-5)


def test_pads_do_not_change_a_loss():
    """One vector and one scale put all texts in one padded batch, the short ones among long ones."""
    at, vs = place(), vectors(1)
    together = steered_losses(at, TEXTS, vs, [6.0], work=batch(64))
    alone = np.stack([steered_losses(at, [text], vs, [6.0])[0, 0, 0] for text in TEXTS])
    np.testing.assert_allclose(together[0, 0], alone, rtol=2e-5)
    longer = steered_losses(at, [*TEXTS, "w" * 90], vs, [6.0], work=batch(64))
    np.testing.assert_allclose(longer[0, 0, :-1], alone, rtol=2e-5)


def test_texts_are_cut_at_max_tokens():
    at, vs = place(), vectors(1)
    cut = steered_losses(at, ["abcdefgh", "ab"], vs, [3.0], max_tokens=5)
    np.testing.assert_allclose(cut, steered_losses(at, ["abcd", "ab"], vs, [3.0]), rtol=2e-5)


def test_lower_blocks_run_once_a_text_batch():
    at, runs = place(), {0: 0, 2: 0}
    for layer in runs:
        part = residual_blocks(at.model)[layer].mlp
        part.register_forward_hook(lambda *_, layer=layer: runs.update({layer: runs[layer] + 1}))
    steered_losses(at, ["one text", "two text"], vectors(3), [1.0, 2.0], work=batch(4))
    # six pairs fill a batch of four and one of two, for each text
    assert runs == {0: 2, 2: 4}


def test_what_cannot_be_scored_is_a_clear_error():
    at, bare = place(), place(tok=tiny.tokenizer(bos=False))
    with pytest.raises(ValueError, match=r"at least two tokens each .* got ''"):
        steered_losses(at, ["fine", ""], vectors(1), [1.0])
    with pytest.raises(ValueError, match=r"at least two tokens each .* got 'a'"):
        steered_losses(bare, ["ab", "a"], vectors(1), [1.0])
    with pytest.raises(ValueError, match="got 0, 1 and 1"):
        steered_losses(at, [], vectors(1), [1.0])
    with pytest.raises(ValueError, match="expected width 64"):
        steered_losses(at, ["ab"], torch.ones(1, 32), [1.0])
    with pytest.raises(ValueError, match="finite numbers"):
        steered_losses(at, ["ab"], vectors(1), [float("nan")])


# perplexity


def test_perplexity_ratios_of_hand_numbers():
    ratio = perplexity_ratio(np.array([0.0, math.log(4)]), np.zeros(2))
    assert ratio.mean_loss.value == pytest.approx(2.0) and ratio.mean_perplexity.value == pytest.approx(2.5)
    # two texts drawn twice: both the first, one of each, or both the second
    assert (ratio.mean_loss.low, ratio.mean_loss.high) == pytest.approx((1.0, 4.0))
    assert (ratio.mean_perplexity.low, ratio.mean_perplexity.high) == pytest.approx((1.0, 4.0))
    base = np.log([2.0, 6.0])
    ratio = perplexity_ratio(np.log([6.0, 6.0]), base)  # mean loss: sqrt(3 x 1); perplexities: 6 / 4
    assert ratio.mean_loss.value == pytest.approx(math.sqrt(3)) and ratio.mean_perplexity.value == pytest.approx(1.5)
    same = perplexity_ratio(base, base)
    assert (same.mean_loss.low, same.mean_loss.high) == (1.0, 1.0) == (same.mean_perplexity.low, same.mean_perplexity.high)


def test_several_vectors_share_the_draw_of_texts():
    clean = np.zeros(2)
    both = perplexity_ratio(np.log([[1.0, 4.0], [4.0, 1.0]]), clean)  # any draw of texts gives the same mean
    assert both.mean_perplexity.value == pytest.approx(2.5) == both.mean_perplexity.low == pytest.approx(both.mean_perplexity.high)
    assert both.mean_perplexity.n == 2
    with pytest.raises(ValueError, match=r"same texts, got shapes \(3,\) and \(2,\)"):
        perplexity_ratio(np.zeros(3), clean)
    with pytest.raises(ValueError, match="finite"):
        perplexity_ratio(np.array([0.0, np.nan]), clean)


# minimal pairs


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    words = ["cat", "dogs", "a", "sleep", "the", "sees", "o", "in"]
    rows = [(" ".join(rng.choice(words, 4)), " ".join(rng.choice(words, 4)), "syntax", f"uid_{i % 3}") for i in range(12)]
    return pd.DataFrame(rows, columns=COLUMNS)


def oracle(at, text, vector, scale):
    """Total log-probability in float64, by the whole model under the hook, token by token."""
    ids = token_ids(at, text)
    with torch.inference_mode(), steering(at.lab, Add(at.layer, vector, scale)):
        logp = torch.log_softmax(at.model(input_ids=ids, use_cache=False).logits[0], -1)
    assert logp.dtype == torch.float64
    return sum(logp[t - 1, ids[0, t]].item() for t in range(1, ids.shape[1]))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_preferences_equal_a_float64_oracle(kind, pairs):
    at, vs = place(kind), vectors()
    got = prefers_good(at, pairs, vs, SCALES, batch(7))
    at.model.double()
    margin = np.zeros((3, 3, 12))
    for v, s, p in np.ndindex(margin.shape):
        good, bad = (oracle(at, pairs[c][p], vs[v].double(), SCALES[s]) for c in COLUMNS[:2])
        margin[v, s, p] = good - bad
    assert np.abs(margin).min() > 1e-3  # no pair so close that rounding could decide it
    assert got.dtype == bool and (got == (margin > 0)).all()
    assert 0 < got.mean() < 1 and (got[:, 0] != got[:, 2]).any()


def test_preferences_do_not_depend_on_order_or_batch(pairs):
    at, vs = place(), vectors(2)
    whole = prefers_good(at, pairs, vs, SCALES)
    for batch_size in (1, 5, 1000):
        assert (whole == prefers_good(at, pairs, vs, SCALES, batch(batch_size))).all()
    turned = pairs.iloc[::-1]  # its index runs backwards too
    assert (whole[..., ::-1] == prefers_good(at, turned, vs, SCALES)).all()
    swapped = pairs.rename(columns={"sentence_good": "sentence_bad", "sentence_bad": "sentence_good"})
    assert (whole != prefers_good(at, swapped, vs, SCALES)).all()
    same = pairs.assign(sentence_bad=pairs.sentence_good)
    assert not prefers_good(at, same, vs[:1], [0.0], batch(1)).any(), "a tie is not a preference"


def test_the_right_letter_equals_a_float64_oracle():
    """Next-letter log-probabilities of the whole model under the hook; four golds in turn, so some are right and some wrong."""
    at, vs = place(), vectors()
    asked = [Question("t", str(i), "g", f"question {i} with {'many ' * i}words\nAnswer:", "ABCD"[i % 4], tuple("wxyz")) for i in range(8)]
    got = chooses_right(at, asked, vs, SCALES, batch(7))
    with pytest.raises(ValueError, match=r"one number of choices, got \[3, 4\]"):
        chooses_right(at, [*asked, Question("t", "9", "g", "three", "A", tuple("xyz"))], vs, SCALES)
    at.model.double()
    for v, s, q in np.ndindex(got.shape):
        scores = [oracle(at, f"{asked[q].prompt} {letter}", vs[v].double(), SCALES[s]) for letter in "ABCD"]
        first, second = sorted(scores)[:-3:-1]
        assert first - second > 1e-4 and got[v, s, q] == ("ABCD"[int(np.argmax(scores))] == asked[q].gold)
    assert got.dtype == bool and 0 < got.mean() < 1


def test_long_sentences_are_not_cut(pairs):
    """Beyond the 128 tokens of ordinary texts: only the last letter tells the two apart."""
    one = pd.DataFrame([("m" * 150 + end, "m" * 150 + other, "f", "u") for end, other in ("ab", "ba")], columns=COLUMNS)
    assert prefers_good(place(), one, vectors(1), [2.0])[0, 0].sum() == 1


def write(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def records(counts):
    made = [
        {"sentence_good": f"g {u} {i}", "sentence_bad": f"b {u} {i}", "field": "f", "UID": u} for u, n in counts.items() for i in range(n)
    ]
    return [made[i] | {"extra": 1} for i in np.random.default_rng(0).permutation(len(made))]


def test_pairs_load_and_are_drawn_evenly(tmp_path):
    rows = records({"one": 8, "two": 5, "three": 6})
    path = write(tmp_path / "pairs.jsonl.gz", rows)
    everything = minimal_pairs(path)
    assert list(everything) == COLUMNS and everything.to_dict("records") == [{c: r[c] for c in COLUMNS} for r in rows]
    plain = tmp_path / "pairs.jsonl"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert minimal_pairs(str(plain)).equals(everything)
    drawn = minimal_pairs(path, per_uid=3, seed=1)
    assert drawn.UID.value_counts().to_dict() == {"one": 3, "two": 3, "three": 3}
    assert drawn.merge(everything).equals(drawn) and not drawn.duplicated().any() and list(drawn.index) == list(range(9))
    order = [everything.sentence_good.tolist().index(s) for s in drawn.sentence_good]
    assert order == sorted(order)
    assert minimal_pairs(path, per_uid=3, seed=1).equals(drawn)
    assert not minimal_pairs(path, per_uid=3, seed=2).equals(drawn)
    assert set(minimal_pairs(path, per_uid=2, seed=1).sentence_good) < set(drawn.sentence_good)


def test_a_hub_id_means_all_its_configurations(monkeypatch):
    import datasets

    parts = {"one": records({"one": 2}), "two": records({"two": 3})}
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source: {"some/blimp": list(parts)}[source])
    monkeypatch.setattr(datasets, "load_dataset", lambda source, name, split, streaming: parts[name])
    assert minimal_pairs("some/blimp").UID.tolist() == ["one"] * 2 + ["two"] * 3


def test_bad_sources_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl.gz: expected a file of minimal pairs"):
        minimal_pairs(tmp_path / "gone.jsonl.gz")
    rows = records({"one": 2})
    wrong = write(tmp_path / "wrong.jsonl.gz", [{"text": "x", "UID": "u", "field": "f"}])
    with pytest.raises(ValueError, match=r"wrong.jsonl.gz: .* got \['text', 'UID', 'field'\]: add or rename \['sentence_good'"):
        minimal_pairs(wrong)
    gap = write(tmp_path / "gap.jsonl.gz", [*rows, rows[0] | {"sentence_bad": None}])
    with pytest.raises(ValueError, match="got 1 rows with a gap"):
        minimal_pairs(gap)
    path = write(tmp_path / "pairs.jsonl.gz", records({"one": 2, "two": 5}))
    for bad in (0, 3):
        with pytest.raises(ValueError, match=rf"per_uid: expected 1 to 2 \(the pairs of one\), got {bad}"):
            minimal_pairs(path, per_uid=bad)


def test_all_of_blimp_is_drawn_evenly(shared):
    path = shared / "benchmarks" / "blimp.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs blimp.jsonl.gz in the folder `shared` beside the project")
    count = minimal_pairs(path).UID.value_counts()
    assert len(count) == 67 and (count == 1000).all()
    drawn = minimal_pairs(path, per_uid=7)
    assert len(drawn) == 67 * 7 and (drawn.UID.value_counts() == 7).all()
    assert set(drawn.field) == {"morphology", "syntax", "semantics", "syntax_semantics", "syntax/semantics"}
    assert not (drawn.sentence_good == drawn.sentence_bad).any()


@pytest.mark.parametrize("what", [steered_losses, prefers_good, chooses_right])
def test_no_answer_is_chosen_by_losses_that_are_not_numbers(what):
    """A push beyond float16, where every comparison with NaN would be false and the first choice would win."""
    at = place(hf=tiny.model("llama").half())
    pairs = pd.DataFrame([["a good one", "bad one a", "f", "u"]], columns=COLUMNS)
    asked = [Question("t", "1", "g", "Which?", "A", ("x", "y"))]
    material = {steered_losses: TEXTS, prefers_good: pairs, chooses_right: asked}[what]
    with pytest.raises(ValueError, match=r"push of norm 1e\+06 after layer 1: expected finite losses.*torch.float16"):
        what(at, material, vectors(), [0.0, 1e6])
    with pytest.raises(ValueError, match="scales: expected finite"):
        what(at, material, vectors(), torch.tensor([float("nan")]))

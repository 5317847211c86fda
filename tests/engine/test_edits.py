"""What is done to a stream: additions, boosts and ablations against float64 oracles, one vector or one a row."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from steered import D, padded, resid_of, unit

from steerkit.engine.steer import Ablate, Add, Boost, steering
from steerkit.vectors import SteeringVector


def test_linearity_at_the_hooked_layer():
    """The change of a + b is the change of a plus the change of b."""
    model, (ids, mask) = tiny.model("llama").double(), padded()
    a, b = unit(1).double(), unit(2).double()
    plain = resid_of(model, ids, mask, 1)[0]
    change = {
        name: resid_of(model, ids, mask, 1, edits)[0] - plain
        for name, edits in {
            "a": [Add(1, a, 2.0)],
            "b": [Add(1, b, 5.0)],
            "ab": [Add(1, a, 2.0), Add(1, b, 5.0)],
        }.items()
    }
    torch.testing.assert_close(change["ab"], change["a"] + change["b"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [lambda v, s: Add(1, v, s), lambda v, s: Ablate(1, v)], ids=["add", "ablate"])
def test_per_row_vectors_equal_separate_runs(make):
    model, (ids, mask) = tiny.model("gemma2"), padded()
    vectors, scales = unit(rows=3), torch.tensor([0.5, 4.0, 9.0])
    _, together, _ = resid_of(model, ids, mask, 1, [make(vectors, scales)])
    for row in range(3):
        _, alone, _ = resid_of(model, ids[row : row + 1], mask[row : row + 1], 1, [make(vectors[row], float(scales[row]))])
        torch.testing.assert_close(together[row, -1], alone[0, -1], rtol=1e-4, atol=1e-4)


def test_boost_equals_encode_add_decode_with_the_error_kept():
    """Output scores: a[:, -1, i] += s * a_max, decode, add the error back; in float64, and only at the last position."""
    sae = tiny.planted_sae()
    model, (ids, mask) = tiny.model("llama"), padded()
    plain = resid_of(model, ids, mask, 1)[0]
    boosted = resid_of(model, ids, mask, 1, [Boost(1, sae, torch.tensor([4, 70, 9]), 10.0)], window="last")[0]
    W_enc, W_dec, b_enc, b_dec, theta = (w.detach().double() for w in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.threshold))
    for row, feature in enumerate([4, 70, 9]):
        x = plain[row, -1].double()
        pre = x @ W_enc + b_enc
        acts = pre * (pre > theta)
        error = x - (acts @ W_dec + b_dec)
        acts[feature] += 10.0 * acts.max()
        torch.testing.assert_close(boosted[row, -1].double(), acts @ W_dec + b_dec + error, rtol=1e-5, atol=1e-5)
    assert torch.equal(boosted[:, :-1], plain[:, :-1])


def test_ablate_removes_the_component_and_nothing_else():
    model, (ids, mask) = tiny.model("llama"), padded()
    plain, v = resid_of(model, ids, mask, 1)[0], unit(5)
    ablated = resid_of(model, ids, mask, 1, [Ablate(1, 7.0 * v)])[0]
    real = mask.bool()
    assert (ablated @ v)[real].abs().max() < 1e-4
    torch.testing.assert_close((ablated + (plain @ v)[..., None] * v)[real], plain[real], rtol=1e-4, atol=1e-4)


def test_several_layers_at_once_add_their_rows():
    """CorrSteer: coefficient x W_dec rows at several layers; the change at each layer's own place is exact."""
    model, (ids, mask) = tiny.model("llama"), padded()
    edits = [Add(0, unit(1), 1.5), Add(2, unit(2), 2.5)]
    after0, _, receipt = resid_of(model, ids, mask, 0, edits)
    plain0 = resid_of(model, ids, mask, 0)[0]
    assert torch.allclose((after0 - plain0)[mask.bool()], 1.5 * unit(1), atol=1e-5)
    assert receipt.layers == [0, 2] and receipt.changed(1, 2) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda: Add(9, unit(), 1.0), "expected 0 to 2"),
        (lambda: Add(1, torch.ones(D + 1), 1.0), f"expected width {D}"),
        (lambda: Add(1, unit() * float("nan"), 1.0), "NaN"),
        (lambda: Ablate(1, torch.zeros(D)), "zero vector"),
        (lambda: Boost(1, tiny.planted_sae(), 10_000), "Boost.feature"),
        (lambda: Boost(1, tiny.planted_sae(), 1), 'expected "last" or "generated", got "all"'),
    ],
    ids=["layer", "width", "nan", "zero", "feature", "boost in the prompt"],
)
def test_bad_edits_are_clear_errors(edit, message):
    with pytest.raises(ValueError, match=message), steering(tiny.model("llama"), edit()):
        pass


def test_a_planted_feature_comes_out_at_its_token():
    """A model whose answer is known: steering along a token's unembedding makes that token the most probable."""
    model, (ids, mask) = tiny.model("llama"), padded()
    wanted = torch.tensor([11, 55, 120])
    head = model.get_output_embeddings().weight[wanted].detach()
    _, logits, _ = resid_of(model, ids, mask, 2, [Add(2, head / head.norm(dim=-1, keepdim=True), 500.0)])
    assert logits[:, -1].argmax(-1).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "edit",
    [
        lambda bad: Add(1, unit(), bad),
        lambda bad: Add(1, unit(rows=2), torch.tensor([1.0, bad])),
        lambda bad: Boost(1, tiny.planted_sae(), 3, bad),
        lambda bad: Boost(1, tiny.planted_sae(), torch.tensor([3, 4]), torch.tensor([bad, 1.0])),
        lambda bad: Ablate(1, torch.full((D,), bad)),
        lambda bad: SteeringVector("v", unit(), 1, "tiny").edit(bad),
        lambda bad: SteeringVector("v", unit(), 1, "tiny", weight=bad),
        lambda bad: bad * SteeringVector("v", unit(), 1, "tiny"),
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_push_that_is_not_finite_is_refused_where_it_is_made(edit, bad):
    with pytest.raises(ValueError, match="finite"):
        edit(bad)


def test_a_push_that_leaves_the_range_of_the_dtype_is_an_error_with_layer_row_and_dtype():
    model, (ids, mask) = tiny.model("llama").half(), padded()
    with pytest.raises(ValueError, match=r"layer 1, rows \[1\]: .*torch.float16"):
        resid_of(model, ids, mask, 1, [Add(1, unit(), torch.tensor([1.0, 1e6, 1.0]))])


@pytest.mark.parametrize(
    "edit", [Boost(1, tiny.planted_sae(), 5, 2.0), Add(1, unit(), 5.0), Ablate(1, unit())], ids=["boost", "add", "ablate"]
)
def test_a_text_gets_the_same_push_with_a_cache_and_without(edit):
    """Teacher-forced: the last prompt token and three new ones, one at a time through a cache, and all in one call."""
    model, (ids, mask) = tiny.model("llama"), padded((8, 8), 8)
    prompt, logits, past = torch.tensor([5, 5]), [], None
    with torch.inference_mode():
        with steering(model, edit, window="last", prompt_length=prompt):
            whole = model(input_ids=ids, attention_mask=mask).logits[:, 4:]
        with steering(model, edit, window="last", prompt_length=prompt):
            for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8)):
                out = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True)
                logits, past = [*logits, out.logits[:, -1]], out.past_key_values
    torch.testing.assert_close(torch.stack(logits, 1), whole, atol=1e-3, rtol=1e-3)


def test_edits_take_numbers_and_arrays_of_numpy_and_pandas():
    v, resid = unit(), torch.randn(2, 3, D, generator=torch.Generator().manual_seed(2))
    expected = Add(1, v, torch.tensor([0.5, 2.0])).delta(resid)
    for scale in (np.array([0.5, 2.0]), np.array([0.5, 2.0], dtype=np.float32), pd.Series([0.5, 2.0]), [0.5, 2.0]):
        torch.testing.assert_close(Add(np.int64(1), v.numpy(), scale).delta(resid), expected)
    sae = tiny.planted_sae()
    expected = Boost(1, sae, torch.tensor([3, 9]), 2.0).delta(resid)
    torch.testing.assert_close(Boost(1, sae, pd.Series([3, 9]), np.float32(2.0)).delta(resid), expected)
    assert Boost(np.int32(1), sae, np.int64(3)).feature == 3

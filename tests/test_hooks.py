"""The hook: exact positions, untouched pads, nothing left behind, and a receipt that equals a float64 oracle."""

import types
import warnings

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.engine.losses import next_token_losses, steered_token_losses
from steerkit.engine.steer import Ablate, Add, Boost, bridge_hooks, real_tokens, residual_blocks, selected_positions, steering
from steerkit.features import residuals
from steerkit.vectors import SteeringVector

KINDS = ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "gptneox"]
D = tiny.D_MODEL


def unit(seed: int = 0, rows: int | None = None) -> torch.Tensor:
    v = torch.randn(*([rows] if rows else []), D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=-1, keepdim=True)


def padded(lengths=(3, 6, 1), width=6):
    """Left-padded random ids and their mask."""
    ids = torch.randint(5, 200, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids * mask, mask


def resid_of(model, ids, mask, layer, edits=(), **settings):
    """Residual stream after `layer`, read by a hook that runs after steering's."""
    seen = {}
    with steering(model, list(edits), **settings) as receipt:
        handle = residual_blocks(model)[layer].register_forward_hook(
            lambda _m, _i, out: seen.update(r=out[0] if isinstance(out, tuple) else out)
        )
        try:
            position = (mask.cumsum(1) - 1).clamp_min(0)
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask, position_ids=position).logits
        finally:
            handle.remove()
    return seen["r"], logits, receipt


@pytest.mark.parametrize(
    "window,expected",
    [
        ("all", [[0, 1, 2, 3, 4], [0, 1, 2]]),
        ("prompt", [[0, 1, 2], [0]]),
        ("last", [[2, 3, 4], [0, 1, 2]]),
        ("generated", [[3, 4], [1, 2]]),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_window_positions_are_exact_with_and_without_cache(window, expected, cache):
    """Two prompts of 3 and 1 tokens, two new tokens: the receipt names exactly the positions of the window."""
    model = tiny.model("llama")
    ids, mask = padded((3, 1), 3)
    new = torch.tensor([[7, 8], [9, 10]])
    with steering(model, Add(1, unit(), 2.0), window=window) as receipt, torch.inference_mode():
        past = None
        for step in range(3):
            whole = torch.cat([ids, new[:, :step]], 1)
            whole_mask = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
            feed = whole[:, -1:] if cache and step else whole
            position = (whole_mask.cumsum(1) - 1).clamp_min(0)[:, -feed.shape[1] :]
            out = model(input_ids=feed, attention_mask=whole_mask, position_ids=position, past_key_values=past, use_cache=cache)
            past = out.past_key_values if cache else None
    assert [receipt.changed(0), receipt.changed(1)] == expected


def test_window_oracle_on_random_masks():
    """`selected_positions` against a loop that counts tokens one by one."""
    rng = torch.Generator().manual_seed(3)
    for _ in range(50):
        pads, prompt, start = (int(torch.randint(0, 5, (1,), generator=rng)) for _ in range(3))
        real = torch.tensor([[False] * pads + [True] * 6])
        for window, inside in {
            "all": lambda p: True,
            "prompt": lambda p, n=prompt: p < n + 1,
            "last": lambda p, n=prompt: p >= n,
            "generated": lambda p, n=prompt: p > n,
        }.items():
            expected = [[False] * pads + [inside(start + t) for t in range(6)]]
            got = selected_positions(real, torch.tensor([start]), torch.tensor([prompt + 1]), window)
            assert got.tolist() == expected, (window, pads, prompt, start)


@pytest.mark.parametrize("kind", KINDS)
def test_pads_and_positions_outside_the_window_are_untouched_bitwise(kind):
    model, (ids, mask) = tiny.model(kind), padded()
    plain, _, _ = resid_of(model, ids, mask, 1)
    steered, _, receipt = resid_of(model, ids, mask, 1, [Add(1, unit(), 3.0)], window="last")
    changed = (plain != steered).any(-1)
    assert changed.tolist() == [[False] * 5 + [True]] * 3  # last prompt token of each row
    assert [receipt.changed(r) for r in range(3)] == [[2], [5], [0]]
    assert receipt.n_pads == [3, 0, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_zero_scale_equals_the_baseline_bitwise(kind):
    model, (ids, mask) = tiny.model(kind), padded()
    _, plain, _ = resid_of(model, ids, mask, 1)
    _, zero, receipt = resid_of(model, ids, mask, 1, [Add(1, unit(), 0.0)])
    assert torch.equal(plain, zero)
    assert receipt.layers == [] and "nothing changed" in str(receipt)


def test_an_exception_inside_leaves_no_hook():
    model, (ids, mask) = tiny.model("llama"), padded()

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    _, plain, _ = resid_of(model, ids, mask, 1)
    with pytest.raises(RuntimeError, match="on purpose"), steering(model, Add(1, unit(), 3.0)):
        assert count() > before
        raise RuntimeError("on purpose")
    with pytest.raises(ValueError, match="rows in this call"), steering(model, Add(1, unit(rows=2), 3.0)):
        model(input_ids=ids, attention_mask=mask)  # three rows, vectors for two
    assert count() == before
    assert torch.equal(resid_of(model, ids, mask, 1)[1], plain)


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


def test_receipt_equals_a_float64_oracle():
    model, (ids, mask) = tiny.model("llama"), padded()
    plain = resid_of(model, ids, mask, 1)[0].double()
    _, _, receipt = resid_of(model, ids, mask, 1, [Add(1, unit(), torch.tensor([1.0, 2.0, 3.0]))])
    for row, n in enumerate((3, 6, 1)):
        ratios = [float((row + 1.0) / plain[row, 6 - n + p].norm()) for p in range(n)]
        assert receipt.changed(row) == list(range(n))
        assert [receipt.ratios[1][row][p] for p in range(n)] == pytest.approx(ratios, rel=1e-4)
        assert receipt.ratio(row) == pytest.approx(sum(ratios) / n, rel=1e-4)


def test_receipt_renders_as_text_and_as_a_strip():
    model, tok = tiny.model("llama"), tiny.tokenizer()
    ids = torch.tensor([[1] + tok("ab<c", add_special_tokens=False)["input_ids"]])
    with steering(model, Add(1, unit(), 3.0), skip_first=True, tokenizer=tok) as receipt:
        model(input_ids=ids)
    text, strip = str(receipt), receipt._repr_html_()
    assert "4 of 5 positions changed" in text and "[b]" in text and "[<bos>]" not in text
    assert strip.count("background:rgba") == 4 and "&lt;" in strip and "position 2" in strip


@pytest.mark.parametrize(
    "kind,preset",
    list(zip(KINDS, ["llama-3.1-8b", "gemma-2-2b", "gemma-3-270m", "qwen3-1.7b", "gpt2-small", "pythia-70m"])),
)
def test_bridge_hook_points_steer_the_same(kind, preset, monkeypatch, tmp_path):
    """`run_with_hooks` on a TransformerBridge over the same weights gives the same logits as the fast path."""
    from steerkit.models import lab as models

    hub, spec = tiny.offline_hub(monkeypatch, tmp_path), models.preset(preset)
    hf, tok = tiny.put_model(hub, spec.hub, kind), tiny.tokenizer()
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    edits = [Add(1, unit(rows=2), torch.tensor([2.0, 6.0])), Ablate(2, unit(7))]
    _, fast, _ = resid_of(hf, ids, mask, 1, edits)
    wrapped = models._bridge(spec, hf, tok)
    selected = selected_positions(mask.bool(), torch.zeros(2, dtype=torch.long), torch.full((2,), 6), "all")
    with torch.inference_mode():
        slow = wrapped.run_with_hooks(ids, fwd_hooks=bridge_hooks(edits, selected))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_hf_generate_is_steered_at_each_new_token():
    model, (ids, mask) = tiny.model("llama"), padded((4, 2), 4)
    with steering(model, Add(1, unit(), 9.0), window="generated") as receipt:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (2, 9)
    assert [receipt.changed(0), receipt.changed(1)] == [[4, 5, 6, 7], [2, 3, 4, 5]]  # the last new token is never fed


def test_residuals_stop_early_and_equal_hidden_states():
    model, (ids, mask) = tiny.model("qwen3"), padded((6, 6), 6)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    before = sum(len(m._forward_hooks) for m in model.modules())  # transformers keeps hooks of its own
    found = residuals(model, ids, mask, layers=[0, 1])
    assert torch.allclose(found[0], hidden[1]) and torch.allclose(found[1], hidden[2])
    assert sum(len(m._forward_hooks) for m in model.modules()) == before


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


def test_unknown_window_names_the_known_ones():
    with (
        pytest.raises(ValueError, match="all, prompt, last, generated"),
        steering(tiny.model("llama"), [], window="suffix"),
    ):
        pass


def test_a_planted_feature_comes_out_at_its_token():
    """A model whose answer is known: steering along a token's unembedding makes that token the most probable."""
    model, (ids, mask) = tiny.model("llama"), padded()
    wanted = torch.tensor([11, 55, 120])
    head = model.get_output_embeddings().weight[wanted].detach()
    _, logits, _ = resid_of(model, ids, mask, 2, [Add(2, head / head.norm(dim=-1, keepdim=True), 500.0)])
    assert logits[:, -1].argmax(-1).tolist() == wanted.tolist()


def greedy(model, ids, mask, **settings):
    """Four tokens by transformers' own generate."""
    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, **settings)
    return found[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("lengths", [(3, 29), (29, 3)])
def test_each_prompt_of_one_context_is_steered_at_its_own_places(lengths):
    """Two calls of transformers' generate in one context against a context each."""
    model = tiny.model("llama")
    prompts = [padded((n, n - 1), n) for n in lengths]
    alone = []
    for ids, mask in prompts:
        with steering(model, Add(1, unit(), 9.0), window="last") as receipt:
            alone.append((greedy(model, ids, mask), [receipt.changed(row) for row in (0, 1)]))
    with steering(model, Add(1, unit(), 9.0), window="last") as receipt:
        together = [(greedy(model, ids, mask), [receipt.changed(row) for row in (0, 1)]) for ids, mask in prompts]
    assert together == alone
    assert together[1][1] == [list(range(n - 1, n + 3)) for n in (lengths[1], lengths[1] - 1)]


def test_lengths_given_for_one_batch_do_not_serve_another():
    model, (ids, mask), (others, same) = tiny.model("llama"), padded(), padded((6, 3, 1))
    with steering(model, Add(1, unit(), 9.0), window="last", prompt_length=torch.tensor([2, 4, 1])) as receipt:
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids, attention_mask=mask)  # the same prompts again
        assert [receipt.changed(row) for row in range(3)] == [[1, 2], [3, 4, 5], [0]]
        with pytest.raises(ValueError, match="one context a batch"):
            model(input_ids=others, attention_mask=same)
        with pytest.raises(ValueError, match="2 rows in this call, got 3"):
            model(input_ids=ids[:2], attention_mask=mask[:2])


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


def whole_model(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def base_model(model):
    model.base_model.compile(backend="eager")
    return model


def its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [whole_model, in_place, base_model, its_forward])
def test_a_compiled_model_is_steered_like_the_model_itself(compiled):
    """Called once before, so that its code is there and knows of no hook; what is read above a layer and below is true too."""
    (ids, mask), edit = padded((6, 6), 6), Add(1, unit(), 9.0)
    with torch.inference_mode(), steering(plain := tiny.model("llama"), edit):
        expected = plain(input_ids=ids, attention_mask=mask).logits
    model = compiled(tiny.model("llama"))
    with torch.inference_mode():
        before = model(input_ids=ids, attention_mask=mask).logits
        with steering(model, edit) as receipt:
            found = model(input_ids=ids, attention_mask=mask).logits
        after = model(input_ids=ids, attention_mask=mask).logits
        losses = next(steered_token_losses(model, ids, residuals(model, ids, layers=[1])[1], 9.0 * unit()[None], layer=1, batch_size=4))[1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(before, after) and receipt.changed(1) == list(range(6))
    torch.testing.assert_close(losses[0], next_token_losses(expected, ids), atol=1e-4, rtol=1e-4)


def test_a_context_that_changed_nothing_says_so():
    model, (ids, mask) = tiny.model("llama"), padded()
    with (
        pytest.warns(UserWarning, match="no position lay in the window 'generated'"),
        steering(model, Add(1, unit(), 1.0), window="generated"),
    ):
        model(input_ids=ids, attention_mask=mask)
    with pytest.warns(UserWarning, match="the model was not called"), steering(model, Add(1, unit(), 1.0), record=False):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resid_of(model, ids, mask, 1, [Add(1, unit(), 0.0)])  # nothing was asked for
        resid_of(model, ids, mask, 1, [Add(1, unit(), 1.0)])


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


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "gpt2"])
@pytest.mark.parametrize("window", ["all", "last", "generated"])
def test_static_caches_are_steered_at_the_same_places(kind, window):
    """Rows with pads, fewer tokens than the cache has room for, sliding windows shorter than the text."""
    model, (ids, mask) = tiny.model(kind, n_layers=6), padded((20, 11), 20)  # the sixth of gemma3 is its first of full attention
    with steering(model, Add(1, unit(), 9.0), window=window) as receipt:
        expected = greedy(model, ids, mask), [receipt.changed(row) for row in (0, 1)]
    with steering(model, Add(1, unit(), 9.0), window=window) as receipt:
        found = greedy(model, ids, mask, cache_implementation="static"), [receipt.changed(row) for row in (0, 1)]
    assert found == expected


def test_masks_that_do_not_tell_pads_from_text_are_refused_with_the_way_out():
    ids, sees = torch.ones(2, 4, dtype=torch.long), torch.ones(2, 1, 4, 9, dtype=torch.bool)
    assert real_tokens(sees, ids, 3).shape == (2, 7)
    for mask, config in (({"sliding_attention": sees}, None), (sees, types.SimpleNamespace(sliding_window=4)), (torch.ones(2, 5), None)):
        with pytest.raises(ValueError, match=r"attention_mask: expected .*cache_implementation"):
            real_tokens(mask, ids, 3, config)


def test_edits_take_numbers_and_arrays_of_numpy_and_pandas():
    v, resid = unit(), torch.randn(2, 3, D, generator=torch.Generator().manual_seed(2))
    expected = Add(1, v, torch.tensor([0.5, 2.0])).delta(resid)
    for scale in (np.array([0.5, 2.0]), np.array([0.5, 2.0], dtype=np.float32), pd.Series([0.5, 2.0]), [0.5, 2.0]):
        torch.testing.assert_close(Add(np.int64(1), v.numpy(), scale).delta(resid), expected)
    sae = tiny.planted_sae()
    expected = Boost(1, sae, torch.tensor([3, 9]), 2.0).delta(resid)
    torch.testing.assert_close(Boost(1, sae, pd.Series([3, 9]), np.float32(2.0)).delta(resid), expected)
    assert Boost(np.int32(1), sae, np.int64(3)).feature == 3

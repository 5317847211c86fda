"""The hook: exact positions, untouched pads, nothing left behind, with and without caches, in compiled models too."""

import types
import warnings

import pytest
import tiny
import torch
from steered import padded, resid_of, unit

from steerkit.engine.lab import Lab
from steerkit.engine.losses import next_token_losses, steered_token_losses
from steerkit.engine.steer import Ablate, Add, real_tokens, selected_positions, steering
from steerkit.features import residuals
from steerkit.models import load

KINDS = ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "gptneox"]


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


@pytest.mark.parametrize(
    "kind,preset",
    list(zip(KINDS, ["llama-3.1-8b", "gemma-2-2b", "gemma-3-270m", "qwen3-1.7b", "gpt2-small", "pythia-70m"])),
)
def test_transformer_lens_steers_to_the_same_logits(kind, preset, monkeypatch, tmp_path):
    """Plain functions at the hook points of a TransformerBridge over the same weights are the oracle."""
    spec = load.preset(preset)
    hub, v, scales, u = tiny.offline_hub(monkeypatch, tmp_path), unit(rows=2), torch.tensor([2.0, 6.0]), unit(7)
    lab = Lab(spec, tiny.put_model(hub, spec.hub, kind), tiny.tokenizer())
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(4))
    _, ours, _ = resid_of(lab, ids, torch.ones_like(ids), 1, [Add(1, v, scales), Ablate(2, u)])

    def add(resid, hook):
        return resid + (scales[:, None] * v)[:, None]

    def ablate(resid, hook):
        return resid - (resid @ u)[..., None] * u

    points = [("blocks.1.hook_resid_post", add), ("blocks.2.hook_resid_post", ablate)]
    with torch.inference_mode():
        theirs = load.bridge(lab).run_with_hooks(ids, fwd_hooks=points)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_hf_generate_is_steered_at_each_new_token():
    model, (ids, mask) = tiny.model("llama"), padded((4, 2), 4)
    with steering(model, Add(1, unit(), 9.0), window="generated") as receipt:
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (2, 9)
    assert [receipt.changed(0), receipt.changed(1)] == [[4, 5, 6, 7], [2, 3, 4, 5]]  # the last new token is never fed


def test_unknown_window_names_the_known_ones():
    with (
        pytest.raises(ValueError, match="all, prompt, last, generated"),
        steering(tiny.model("llama"), [], window="suffix"),
    ):
        pass


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

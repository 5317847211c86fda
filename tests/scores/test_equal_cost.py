"""Scales at equal cost and the tail of the KL divergence, against whole forward passes under the hook."""

import numpy as np
import pytest
import tiny
import torch

from steerkit.engine.losses import next_token_losses
from steerkit.engine.steer import Add, steering
from steerkit.scores.equal_cost import prompted_rise, scales_at, worst_kl

TEXTS = ["a much longer text than the others", "four words of text", "An ordinary sentence."]
GRID = tuple(np.linspace(0, 40, 41))


def vectors(n=3):
    return torch.nn.functional.normalize(torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)), dim=1)


def place(kind="llama"):
    return tiny.lab(kind, saes={}).at(1)


def mean_loss(at, text, step=None, before=""):
    """Mean next-token loss of a text behind another one, by one whole pass under the hook."""
    ids = [at.tokenizer.bos_token_id, *at.tokenizer(before + text, add_special_tokens=False)["input_ids"]]
    edits = [] if step is None else [Add(at.layer, step, 1.0)]
    with torch.inference_mode(), steering(at.lab, edits, record=False):
        logits = at.model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return next_token_losses(logits, torch.tensor([ids]))[0, len(before) :].mean().item()  # a token is a byte


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_at_the_scale_found_the_loss_has_risen_by_what_was_asked(kind):
    at, some, rises = place(kind), vectors(), [0.1, 0.3]
    found = scales_at(at, TEXTS, some, rises, grid=GRID)
    assert found.shape == (3, 2) and np.isfinite(found).any()
    for v, r in np.argwhere(np.isfinite(found)):
        rise = np.mean([mean_loss(at, text, found[v, r] * some[v]) - mean_loss(at, text) for text in TEXTS])
        assert rise == pytest.approx(rises[r], abs=0.01)


def test_a_cost_that_the_grid_never_reaches_is_nan_and_a_grid_rises_from_zero():
    at, some = place(), vectors(1)
    assert np.isnan(scales_at(at, TEXTS, some, [50.0], grid=GRID)).all()
    for grid in ((1.0, 2.0), (0.0, 2.0, 2.0)):
        with pytest.raises(ValueError, match="grid: expected scales that rise from 0"):
            scales_at(at, TEXTS, some, [0.1], grid=grid)


def kl_by_hook(at, texts, step, share):
    """Ten lines of float64: whole passes, one text at a time, every position, the mean of the worst."""
    found = []
    for text in texts:
        ids = torch.tensor([[at.tokenizer.bos_token_id, *at.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.inference_mode():
            p = at.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            with steering(at.lab, Add(at.layer, step, 1.0)):
                q = at.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        found += (p.exp() * (p - q)).sum(-1).tolist()
    worst = sorted(found, reverse=True)[: max(1, round(share * len(found)))]
    return sum(worst) / len(worst)


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_worst_kl_is_the_mean_over_the_worst_tokens(share):
    at, steps = place("gemma2"), 10 * vectors(2)
    found = worst_kl(at, TEXTS, torch.cat([steps, torch.zeros(1, tiny.D_MODEL)]), share=share)
    assert found[:2] == pytest.approx([kl_by_hook(at, TEXTS, step, share) for step in steps], rel=1e-3)
    assert found[2] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="share above 0"):
        worst_kl(at, TEXTS, steps, share=0.0)


def test_an_instruction_costs_what_whole_passes_say():
    at, prefix = place(), "Write about it. "
    wanted = np.mean([mean_loss(at, text, before=prefix) - mean_loss(at, text) for text in TEXTS])
    assert prompted_rise(at, TEXTS, prefix) == pytest.approx(wanted, abs=1e-4)
    assert prompted_rise(at, TEXTS, "") == 0

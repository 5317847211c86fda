"""How a token is drawn: noise keyed by row, and the distribution that Hugging Face defines."""

import numpy as np
import pytest
import torch

from steerkit.engine.decode import Sampling, draw, uniforms


def test_noise_depends_on_seed_and_row_only():
    table = uniforms(7, [0, 5, 9], 4)
    np.testing.assert_array_equal(table[1], uniforms(7, [5], 9)[0, :4])
    assert len({*table.flatten().tolist(), *uniforms(8, [0, 5, 9], 4).flatten().tolist()}) == 24
    assert 0.48 < uniforms(0, range(500), 20).mean() < 0.52


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(top_k=3), Sampling(top_p=0.6), Sampling(top_k=4, top_p=0.5)],
)
def test_draws_follow_the_distribution_that_hugging_face_defines(sampling):
    """A fine grid of u against transformers' own temperature, top-k and top-p warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[2.0, 1.5, 0.1, -1.0, 0.0, 1.0]])
    scores = logits
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    u = (torch.arange(20_000) + 0.5) / 20_000
    counts = torch.bincount(draw(logits.expand(len(u), -1), u, sampling), minlength=6) / len(u)
    torch.testing.assert_close(counts, scores.softmax(-1)[0], atol=2e-4, rtol=0)


def test_top_p_over_a_large_vocabulary_equals_a_full_sort():
    """Peaked rows take the short way, flat rows the whole sort; both give what sorting everything gives."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=rng) * torch.linspace(0.0, 12.0, 40)[:, None]
    u = torch.rand(40, generator=rng).double()
    probs, ids = logits.double().softmax(-1).sort(-1, descending=True)
    probs = torch.where(probs.cumsum(-1) - probs >= 0.9, 0.0, probs)
    place = (probs.cumsum(-1) <= u[:, None] * probs.sum(-1, keepdim=True)).sum(-1)
    oracle = ids.gather(-1, place[:, None])[:, 0]
    assert (draw(logits, u, Sampling(top_p=0.9)) == oracle).float().mean() > 0.95  # float32 moves a boundary now and then

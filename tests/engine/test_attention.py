"""One new token's attention: against a float64 oracle, within whole models, and only where it is meant to be."""

import numpy as np
import pytest
import tiny
import torch

from steerkit.engine import attention
from steerkit.engine.attention import grouped_attention, one_token
from steerkit.engine.decode import Sampling, decode


def oracle(q, k, v, mask, scaling):
    """Head by head in float64."""
    out = np.zeros(q.shape)
    for r, h in np.ndindex(q.shape[:2]):
        g = h // (q.shape[1] // k.shape[1])
        scores = np.where(mask[r, 0, 0], k[r, g] @ q[r, h, 0] * scaling, -np.inf)
        p = np.exp(scores - scores.max())
        out[r, h, 0] = p @ v[r, g] / p.sum()
    return out


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("heads,groups", [(6, 2), (4, 4), (3, 1)])
def test_one_token_equals_a_float64_oracle(dtype, near, heads, groups):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, n, pos, 16, generator=rng).to(dtype) for n, pos in ((heads, 1), (groups, 9), (groups, 9)))
    mask = torch.arange(9)[None] >= torch.tensor([0, 3, 8, 1, 5])[:, None]
    want = oracle(*(t.double().numpy() for t in (q, k, v)), mask[:, None, None].numpy(), 0.25)
    torch.testing.assert_close(one_token(q, k, v, mask[:, None, None], 0.25).double(), torch.tensor(want), rtol=near, atol=near)
    whole = oracle(*(t.double().numpy() for t in (q, k, v)), np.ones((5, 1, 1, 9), dtype=bool), 0.25)
    torch.testing.assert_close(one_token(q, k, v, None, 0.25).double(), torch.tensor(whole), rtol=near, atol=near)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_decode_in_bfloat16_reads_the_same_model(kind, monkeypatch):
    """Prompts of several lengths, so that pads must be masked; a model in float32 is the reference for the first steps."""
    model, prompts, used = tiny.model(kind), [[1, 9, 30], [1, 40, 41, 42, 43, 44, 45], [1, 77]], []
    settings = {"rows": range(3), "arm": range(3), "sampling": Sampling(temperature=0.0, max_new_tokens=20)}
    exact = [c.tokens for c in decode(model, prompts, [], **settings)]
    real = attention.one_token
    monkeypatch.setattr(attention, "one_token", lambda *a: used.append(1) or real(*a))
    again = [c.tokens for c in decode(model, prompts, [], **settings)]
    assert again == exact and not used, "float32 keeps torch's kernel"
    low = model.to(torch.bfloat16)
    fast = [c.tokens for c in decode(low, prompts, [], **settings)]
    monkeypatch.setattr("steerkit.engine.decode.grouped_attention", lambda model: torch.inference_mode())
    count = len(used)
    plain = [c.tokens for c in decode(low, prompts, [], **settings)]
    assert count and len(used) == count, "bfloat16 reads one token by groups, and the reference run does not"
    first = [next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), len(x)) for x, y in zip(fast, plain)]
    assert np.mean(first) >= 5, "rounding may part two greedy texts, but not at once"


def test_it_is_left_as_it_was_and_capped_scores_are_not_touched():
    model = tiny.model("llama").to(torch.bfloat16)
    before = model.config._attn_implementation
    with pytest.raises(KeyboardInterrupt), grouped_attention(model):
        assert model.config._attn_implementation == attention.NAME
        raise KeyboardInterrupt
    assert model.config._attn_implementation == before == "sdpa"
    for other in (tiny.model("gemma2").to(torch.bfloat16), tiny.model("llama")):
        before = other.config._attn_implementation
        with grouped_attention(other):
            assert other.config._attn_implementation == before

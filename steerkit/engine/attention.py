"""Attention of one new token in bfloat16 on a CPU: one small product for each group of heads.

torch's kernel is made for long queries, and Hugging Face copies keys and values for every query head that shares them. In a
decode step both cost more than the linear layers. In float32 torch's kernel is as good, and stays.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

NAME = "steerkit"


def one_token(
    query: Float[Tensor, "rows heads 1 d"],
    key: Float[Tensor, "rows groups pos d"],
    value: Float[Tensor, "rows groups pos d"],
    mask: Bool[Tensor, "#rows 1 1 pos"] | None,
    scaling: float,
) -> Float[Tensor, "rows heads 1 d"]:
    """Return softmax(q K^T scaling) V, the heads that share a group's keys and values as the rows of one product.

    Scores and softmax are in float32. mask: True where a position may be read.
    """
    rows, groups, pos, d = key.shape
    shared = query.reshape(rows * groups, -1, d)
    scores = torch.bmm(shared, key.reshape(-1, pos, d).transpose(1, 2)).float().view(rows, groups, -1, pos) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1).to(value.dtype).view(rows * groups, -1, pos)
    return torch.bmm(p, value.reshape(-1, pos, d)).view(query.shape)


def _attention(module, query, key, value, attention_mask, scaling=None, **settings):
    """Answer transformers' attention interface: one new token here, longer queries by torch."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1 or scaling is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]
    return one_token(query, key, value, mask, scaling).transpose(1, 2), None


@functools.cache
def _register() -> None:
    """Make the name known to transformers, once, and only where it is used: that import takes seconds."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """Decode with `one_token` while the context is open; a no-op but for bfloat16 models on a CPU that attend by torch's kernel."""
    weight, config = next(model.parameters()), model.config
    capped = getattr(config, "attn_logit_softcapping", None)
    if (weight.dtype, weight.device.type, config._attn_implementation) != (torch.bfloat16, "cpu", "sdpa") or capped:
        yield
        return
    _register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")

"""A steering vector that is trained: the rival that sees gradients of the model (one direction, as in AxBench's ReFT-r1)."""

from collections.abc import Sequence

import torch

from steerkit.engine.lab import Place
from steerkit.engine.losses import next_token_losses
from steerkit.engine.steer import residual_blocks
from steerkit.features import token_batches
from steerkit.inputs import strings
from steerkit.vectors import SteeringVector


def learned(
    at: Place,
    texts: Sequence[str],
    start: SteeringVector,
    *,
    scale: float,
    steps: int = 100,
    lr: float = 0.05,
) -> SteeringVector:
    """Return the unit vector that makes the texts likeliest when it is added at every position with norm `scale`.

    v = argmin mean_text mean_t -log p(x_t | x_<t; h + scale v / |v|), by Adam from `start`, CAA say, on all texts at once. The model's
    weights never change. scale: residual units. Raises ValueError for no texts, or a `start` of another place.

    >>> learned(lab.at(13), concepts()["love"].positive_prompts, caa_vector, scale=40.0)    # doctest: +SKIP
    """
    texts = strings("texts", texts)
    if not texts or start.layer != at.layer or len(start.direction) != at.d_model:
        raise ValueError(f"expected texts and a start at layer {at.layer}, got {len(texts)} texts and layer {start.layer}")
    model, v = at.model, start.direction.to(at.model.device).clone().requires_grad_()
    ((ids, mask),) = token_batches(at.tokenizer, texts, batch_size=len(texts))
    ids, mask = ids.to(model.device), mask.to(model.device)
    wants = [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.Adam([v], lr=lr)

    def push(_block, _inputs, output):
        step = scale * v / v.norm()
        return (output[0] + step.to(output[0]), *output[1:]) if isinstance(output, tuple) else output + step.to(output)

    handle = residual_blocks(model)[at.layer].register_forward_hook(push)
    try:
        model.requires_grad_(False)
        for _ in range(steps):
            losses = next_token_losses(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids)
            optimizer.zero_grad()
            ((losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)).mean().backward()
            optimizer.step()
    finally:
        handle.remove()
        for p, wanted in zip(model.parameters(), wants):
            p.requires_grad_(wanted)
    return SteeringVector("learned", v.detach(), at.layer, at.preset, {"method": "learned", "scale": scale, "steps": steps, "lr": lr})

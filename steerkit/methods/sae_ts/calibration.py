"""How hard to push a vector: the scale at which it costs a given rise of the next-token loss (SAE-TS section 4.2)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.engine.lab import Place
from steerkit.engine.losses import steered_token_losses
from steerkit.engine.packed import packed_linears
from steerkit.engine.tokens import bare_ids, first_tokens
from steerkit.features import residuals


def calibration_rows(tokenizer, text: str, *, rows: int, length: int = 32) -> Int[Tensor, "rows length"]:
    """Return rows of `length` tokens cut at even distances from a text, each with the beginning-of-text token (if any) in front."""
    first = first_tokens(tokenizer)
    length -= len(first)
    ids = torch.tensor(bare_ids(tokenizer, text))
    n = len(ids) // length
    if n < rows:
        raise ValueError(f"text: expected at least {rows} rows of {length} tokens, got {n}: give a longer text or fewer rows")
    cut = ids[: n * length].view(n, -1)[torch.arange(rows) * n // rows]
    return torch.cat([torch.tensor([first] * rows, dtype=torch.long), cut], 1)


def solve_scale(scales: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Return where the straight line through the last two points reaches the target, as released.

    Past the last point this extrapolates; a flat line gives infinity.

    >>> solve_scale([0, 20, 40], [3.5, 3.58, 3.66], 4.0)
    125.0
    """
    (x0, y0), (x1, y1) = zip(scales[-2:], losses[-2:])
    return x0 + (target - y0) * (x1 - x0) / (y1 - y0) if y1 != y0 else float("inf")


@torch.inference_mode()
def calibrate(
    at: Place,
    ids: Int[Tensor, "rows pos"],
    vectors: Float[Tensor, "n d_model"],
    *,
    target: float | None = None,
    rise: float | None = None,
    grid: Sequence[float] = tuple(range(0, 201, 20)),
    batch_size: int = 64,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"], float]:
    """Return each vector's scale, whether it is an extrapolation, and the unsteered loss (SAE-TS section 4.2).

    The scale is where the mean next-token loss on `ids` reaches `target` nats (the released code: 4.0 for Gemma-2-2B), or
    the unsteered loss plus `rise` (the paper: 0.5): up the grid to the first loss above, then the line through the last two
    points. All vectors climb together, and only the blocks above the place run. A vector that never gets there is
    extrapolated from the last two points, as released, and marked.

    Raises ValueError unless exactly one of target and rise is given, and where the unsteered loss is above the target.
    """
    if (target is None) == (rise is None):
        raise ValueError(f"expected either target (absolute loss, nats) or rise (above the unsteered loss), got {target} and {rise}")
    ids = ids.to(at.model.device)
    with packed_linears(at.model):
        how = {"resid": residuals(at.model, ids, layers=[at.layer])[at.layer], "batch_size": batch_size}
        base = steered_losses(at, ids, vectors[:1], torch.zeros(1), **how)[0].item()
        goal = base + rise if target is None else target
        if base >= goal:
            raise ValueError(f"target: expected more than the unsteered loss {base:.3f} nats, got {goal:.3f}: raise it or use `rise`")
        scales, found = torch.full((len(vectors),), float("nan")), torch.zeros(len(vectors), dtype=torch.bool)
        before, active = torch.full((len(vectors),), base), torch.arange(len(vectors))
        for low, high in pairwise(grid):
            now = steered_losses(at, ids, vectors[active], torch.full((len(active),), float(high)), **how)
            for i, loss in zip(active.tolist(), now.tolist()):
                scales[i], found[i] = solve_scale([low, high], [before[i].item(), loss], goal), loss > goal
            before[active] = now
            active = active[now <= goal]
            if not len(active):
                break
    return scales, ~found, base


@torch.inference_mode()
def steered_losses(
    at: Place,
    ids: Int[Tensor, "rows pos"],
    vectors: Float[Tensor, "n d_model"],
    scales: Float[Tensor, " n"],
    *,
    resid: Float[Tensor, "rows pos d_model"] | None = None,
    batch_size: int = 64,
) -> Float[Tensor, " n"]:
    """Return the mean next-token loss on `ids`, nats, for each vector with its own scale.

    resid: the unsteered stream at the place, where it is known already.
    """
    ids = ids.to(at.model.device)
    resid = residuals(at.model, ids, layers=[at.layer])[at.layer] if resid is None else resid
    found = steered_token_losses(at.model, ids, resid, vectors * scales[:, None], layer=at.layer, batch_size=batch_size)
    return torch.cat([losses.flatten(1).mean(1).cpu() for _, losses in found])

"""Scales at which steering costs a given rise of the loss on plain text, so that methods are compared at equal cost."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.engine.lab import Place
from steerkit.engine.losses import token_losses
from steerkit.engine.packed import packed_linears
from steerkit.engine.partial import starting_from
from steerkit.engine.tokens import bare_ids
from steerkit.features import residuals, token_batches
from steerkit.inputs import strings, tensor
from steerkit.scores.capability import steered_losses
from steerkit.scores.side_effects import at_level

GRID = (0.0, 20.0, 40.0, 60.0, 80.0, 120.0, 160.0, 240.0)


def scales_at(
    at: Place,
    texts: Sequence[str],
    vectors: Float[Tensor, "n d_model"],
    rises: Sequence[float],
    *,
    grid: Sequence[float] = GRID,
) -> Float[np.ndarray, "n rises"]:
    """Return the norm at which each unit vector raises the mean next-token loss on `texts` by each of `rises`, in nats.

    s_r = the first s with mean_text loss(s v) - loss(0) = r, on straight lines between the points of `grid` (residual units, from 0
    up); nan where the grid ends before. Raises ValueError for a grid that does not rise from 0, or as `capability.steered_losses`.

    >>> scales_at(lab.at(13), texts, vectors, [0.25, 0.5])    # doctest: +SKIP
    """
    if grid[0] != 0 or any(b <= a for a, b in pairwise(grid)):
        raise ValueError(f"grid: expected scales that rise from 0, got {list(grid)}")
    points, most = np.asarray(grid, dtype=float), max(map(float, rises))
    rise, active = np.zeros((len(vectors), len(grid))), np.arange(len(vectors))
    clean = float(steered_losses(at, texts, vectors[:1], [0.0]).mean())
    for k, scale in enumerate(grid[1:], 1):  # a vector climbs until it has cost the most that is asked for; what lies beyond is not read
        rise[active, k] = steered_losses(at, texts, vectors[active], [float(scale)])[:, 0].mean(-1) - clean
        active = active[rise[active, k] < most]
        if not len(active):
            break
    return np.array([[at_level(points, row, points, float(r)) for r in rises] for row in rise])


def prompted_rise(at: Place, texts: Sequence[str], prefix: str) -> float:
    """Return what an instruction costs on plain texts, nats a token: mean loss behind `prefix` minus mean loss without it.

    >>> prompted_rise(lab.at(13), texts, "Write about London. ")    # doctest: +SKIP
    """
    texts, before = strings("texts", texts), bare_ids(at.tokenizer, prefix)
    plain = [at.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = token_losses(at.model, at.tokenizer, [*plain, *([*before, *ids] for ids in plain)])
    behind = [losses[len(before) :].mean() for losses in found[len(plain) :]]
    return float(np.mean(behind) - np.mean([losses.mean() for losses in found[: len(plain)]]))


@torch.inference_mode()
def worst_kl(
    at: Place, texts: Sequence[str], steps: Float[Tensor, "n d_model"], *, share: float = 0.05, max_tokens: int = 64
) -> Float[np.ndarray, " n"]:
    """Return, for each step added at every position, KL(p || p_steered) of the next token, in nats: the mean over its worst tokens.

    KL_t = sum_v p(v | x_<t) log p(v | x_<t) / p(v | x_<t; h + step); the worst are the `share` of all positions of all texts with the
    largest KL_t (steering-lite reports this tail). A mean would hide a step that ruins one token in twenty.
    Raises ValueError for a share outside (0, 1], or no texts.

    >>> worst_kl(lab.at(13), texts, torch.zeros(1, 576)).tolist()    # doctest: +SKIP
    [0.0]
    """
    texts, steps = strings("texts", texts), tensor("steps", steps).float()
    if not 0 < share <= 1 or not texts:
        raise ValueError(f"expected texts and a share above 0 and up to 1, got {len(texts)} texts and {share}")
    found: list[list[Tensor]] = [[] for _ in steps]
    with packed_linears(at.model):
        for ids, mask in token_batches(at.tokenizer, texts, batch_size=16, max_tokens=max_tokens):
            ids, mask = ids.to(at.model.device), mask.bool().to(at.model.device)
            resid = residuals(at.model, ids, mask, layers=[at.layer])[at.layer]

            def logp(hidden: Tensor, ids=ids, mask=mask) -> Float[Tensor, "tokens vocab"]:
                with starting_from(at.model, at.layer, hidden):
                    return at.model(input_ids=ids, use_cache=False).logits[mask].float().log_softmax(-1)

            plain = logp(resid)
            for n, step in enumerate(steps):
                steered = logp(resid + step.to(resid))
                found[n].append((plain.exp() * (plain - steered)).sum(-1).cpu())
    tail = [torch.cat(kl).sort(descending=True).values for kl in found]
    return np.array([float(kl[: max(1, round(share * len(kl)))].mean()) for kl in tail])

"""Small steered batches: rows of several lengths, vectors, arms of every kind, and the stream that a hook leaves behind."""

import tiny
import torch

from steerkit.engine.generate import BASELINE, Arm, Sampling, Work, generate, grid
from steerkit.engine.steer import Ablate, Boost, residual_blocks, steering
from steerkit.vectors import SteeringVector

D = tiny.D_MODEL
PROMPTS = ["I think", "a", "The longest of the prompts here", "So"]
QUIET = Work(progress=False)


def unit(seed: int = 0, rows: int | None = None) -> torch.Tensor:
    """Return a random unit vector, or one a row."""
    v = torch.randn(*([rows] if rows else []), D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=-1, keepdim=True)


def vec(seed: int, layer: int = 1) -> SteeringVector:
    """Return a random steering vector."""
    return SteeringVector(f"v{seed}", torch.randn(D, generator=torch.Generator().manual_seed(seed)), layer, "tiny")


def padded(lengths=(3, 6, 1), width=6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded random ids and their mask."""
    ids = torch.randint(5, 200, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return ids * mask, mask


def resid_of(what, ids, mask, layer, edits=(), **settings):
    """Return (residual stream after `layer` as a hook behind steering's reads it, logits, receipt) of a model or a lab."""
    model, seen = getattr(what, "hf", what), {}
    with steering(what, list(edits), **settings) as receipt:
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


def arms(window="last") -> list[Arm]:
    """A baseline, two vectors, two layers, an ablation and (where it is defined) a boost: slots that rows share unevenly."""
    boost = [Arm("boost", (Boost(1, tiny.planted_sae(), 5, 3.0),))] if window in ("last", "generated") else []
    return [
        BASELINE,
        *grid([vec(1), vec(2, layer=2)], [4.0]),
        Arm("two", (vec(1).edit(2.0), vec(3, layer=0).edit(1.0)), 2.0),
        Arm("ablate", (Ablate(1, vec(4).direction),)),
        *boost,
    ]


def run(lab, *, window="last", samples=1, batch_size=None, out=None, **settings):
    """Complete all prompts under all arms, six tokens each unless `settings`, those of `Sampling`, say so."""
    work = Work(batch_size, out, progress=False)
    sampling = Sampling(**{"max_new_tokens": 6} | settings)
    return generate(lab, PROMPTS, arms(window), samples=samples, sampling=sampling, window=window, work=work)

"""SAE features pooled over the positions that predict an answer's tokens (CorrSteer, arXiv 2508.12535)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from steerkit.engine.lab import Lab
from steerkit.engine.memory import halving
from steerkit.engine.packed import packed_linears
from steerkit.engine.tokens import prompt_ids
from steerkit.features import residuals
from steerkit.inputs import strings
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.progress import bar
from steerkit.store import Parts, Work, fingerprint

SITES = ("pre", "post")
AT_ONCE = 1024  # positions whose features are dense together


@dataclass(frozen=True)
class Reading:
    """Where features are read and steered: SAEs by layer, and the site.

    site "pre", as released: SAE L on what enters block L, which is the output of block L - 1, and never layer 0. "post": the SAE's own
    hook, the output of block L. Raises ValueError for another site, or "pre" at layer 0.
    """

    saes: Mapping[int, object]
    site: str = "pre"

    def __post_init__(self) -> None:
        if self.site not in SITES or (self.site == "pre" and 0 in self.saes):
            raise ValueError(f'site: expected "pre" (from layer 1 on) or "post", got {self.site!r} for layers {sorted(self.saes)}')

    def block(self, layer: int) -> int:
        """Return the block whose output is read and steered."""
        return layer - (self.site == "pre")


class Raw:
    """Residual coordinates in place of SAE features: encode is the identity, and so is W_dec (released: --raw)."""

    dtype = torch.float32

    def __init__(self, d_model: int, device: torch.device | str = "cpu"):
        self.W_dec = torch.eye(d_model, device=device)

    def encode(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Return the residual stream itself."""
        return resid


@torch.inference_mode()
def pool_answers(
    lab: Lab,
    prompts: Iterable[str],
    answers: Sequence[list[int]],
    readings: Sequence[Reading],
    *,
    min_window: int = 0,
    chat: bool = False,
    work: Work = Work(),
) -> list[Pooled]:
    """Return, for each reading, the features pooled over each answer, of the model without steering, and the mean |x| read.

    z_i = max or mean over t of encode(x_t)_i, t from the last prompt token to the last token that predicts another. answers: the
    tokens of each, without what ends it. The step that predicts the end counts only among the first `min_window` (released: 1 for
    one-token answers, so that they always have a position; else 0: an answer that ends at once is zero). One pass over prompt and answer
    serves all readings, and gives what a decode step by step would see. Batches of 64 unless work says so; work.out is a folder,
    where finished batches are kept.

    Raises ValueError for no prompts or readings, numbers that differ, a layer that the model lacks, or an `out` with another run's files.

    >>> (pooled,) = pool_answers(lab, prompts, texts.tokens.tolist(), [Reading(lab.saes)])    # doctest: +SKIP
    >>> pooled.correlation(13, correct).r().max()                                             # doctest: +SKIP
    """
    prompts, size = strings("prompts", prompts), work.rows(64)
    if not prompts or len(answers) != len(prompts) or not readings or not all(reading.saes for reading in readings):
        raise ValueError(f"expected prompts, an answer for each, and SAEs, got {len(prompts)}, {len(answers)} and {list(readings)}")
    for layer in (layer for reading in readings for layer in reading.saes):
        lab.block(layer)
    rows = [(prompt_ids(lab.tokenizer, prompt, chat=chat), list(answer)) for prompt, answer in zip(prompts, answers)]
    order = sorted(range(len(rows)), key=lambda r: (len(rows[r][0]) + len(rows[r][1]), r))  # rows of like length share a batch
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    key = fingerprint(lab.hf, rows, list(readings), min_window, size) if work.out else ""
    kept, found = Parts(work.path(key), key), []
    for number, batch in enumerate(bar(batches, "pool", "batch", show=work.progress)):
        part = kept.get(name := f"batch_{number:05d}")
        if part is None:
            done = halving(partial(_batch, lab, readings, min_window), [rows[r] for r in batch])
            found.append([Pooled.join(some) for some in zip(*done)])
            kept.put(name, {f"{n}/{key}": tensor for n, some in enumerate(found[-1]) for key, tensor in some.tensors().items()})
        else:
            each = [{k.partition("/")[2]: tensor for k, tensor in part.items() if k.startswith(f"{n}/")} for n in range(len(readings))]
            found.append([Pooled.of(tensors) for tensors in each])
    return [Pooled.join(parts).take(np.argsort(order)) for parts in zip(*found)]


def _batch(lab: Lab, readings: Sequence[Reading], min_window: int, rows: list[tuple[list[int], list[int]]]) -> list[Pooled]:
    device, window = lab.hf.device, torch.tensor([max(len(answer), min_window) for _, answer in rows])
    whole = [prompt + answer[:-1] for prompt, answer in rows]  # the last token predicts no other
    width = max(map(len, whole))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in whole], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=device)
    row = torch.repeat_interleave(torch.arange(len(rows)), window)
    place = torch.cat([torch.arange(len(prompt) - 1, len(prompt) - 1 + n) for (prompt, _), n in zip(rows, window.tolist())])
    blocks = sorted({reading.block(layer) for reading in readings for layer in reading.saes})
    with packed_linears(lab.hf):
        resid = residuals(lab.hf, ids, mask, layers=blocks)
    seen = {block: found[row.to(found.device), place.to(found.device)] for block, found in resid.items()}
    norm = {b: torch.zeros(len(rows)).index_add_(0, row, x.float().norm(dim=-1).cpu()) / window.clamp_min(1) for b, x in seen.items()}
    found, at = [], (row.to(device), window.to(device))
    for reading in readings:
        features = {layer: _pool(seen[reading.block(layer)], sae, *at) for layer, sae in reading.saes.items()}
        found.append(Pooled(window.numpy(), features, {layer: norm[reading.block(layer)].numpy() for layer in reading.saes}))
    return found


def _pool(resid: Float[Tensor, "n d_model"], sae, row: Tensor, window: Tensor) -> dict[str, csr_array]:
    """Return maximum and mean of each feature over the positions of each row; a row without a position is zero."""
    peak = torch.full((len(window), len(sae.W_dec)), -torch.inf, device=row.device)
    total = torch.zeros_like(peak)
    for part in torch.arange(len(row), device=row.device).split(AT_ONCE):
        z = sae.encode(resid[part.to(resid.device)].to(sae.W_dec.device, sae.dtype)).float().to(row.device)
        peak.scatter_reduce_(0, row[part][:, None].expand_as(z), z, "amax")
        total.index_add_(0, row[part], z)
    top, mean = torch.where(window[:, None] > 0, peak, 0.0), total / window.clamp_min(1)[:, None]
    at, feature = ((top != 0) | (mean != 0)).nonzero(as_tuple=True)
    where = (feature.int().cpu().numpy(), np.append(0, torch.bincount(at, minlength=len(top)).cumsum(0).cpu().numpy()))
    return {name: csr_array((z[at, feature].cpu().numpy(), *where), shape=tuple(z.shape)) for name, z in (("max", top), ("mean", mean))}

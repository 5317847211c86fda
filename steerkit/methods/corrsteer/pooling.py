"""SAE features pooled over the positions that predict an answer's tokens (CorrSteer, arXiv 2508.12535)."""

from collections.abc import Iterable, Mapping, Sequence
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


def block_of(layer: int, site: str) -> int:
    """Return the block whose output is read and steered: `layer` - 1 for "pre", as released; `layer` for "post", the SAE's own hook.

    The released code uses SAE L on the input of block L, which is the output of block L - 1, and never layer 0.
    """
    if site not in SITES or (site == "pre" and layer == 0):
        raise ValueError(f'site: expected "pre" (from layer 1 on) or "post", got {site!r} at layer {layer}')
    return layer - (site == "pre")


class Raw:
    """Residual coordinates in place of SAE features: encode is the identity, and so is W_dec (released: --raw)."""

    dtype = torch.float32

    def __init__(self, d_model: int):
        self.W_dec = torch.eye(d_model)

    def encode(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Return the residual stream itself."""
        return resid


@torch.inference_mode()
def pool_answers(
    lab: Lab,
    prompts: Iterable[str],
    answers: Sequence[list[int]],
    *,
    saes: Mapping[int, object] | None = None,
    site: str = "pre",
    min_window: int = 0,
    chat: bool = False,
    work: Work = Work(),
) -> Pooled:
    """Return the features of every layer in `saes`, pooled over each answer, of the model without steering, and the mean |x| read.

    z_i = max or mean over t of encode(x_t)_i, t from the last prompt token to the last token that predicts another. answers: the
    tokens of each, without what ends it. The step that predicts the end counts only among the first `min_window` (released: 1 for
    one-token answers, so that they always have a position; else 0: an answer that ends at once is zero). saes: {layer: SAE, or `Raw`
    for residual coordinates}, by default the lab's. site: see `block_of`. Answers are read in one pass each, which gives what a decode
    step by step would see. Batches of 64 unless work says so; work.out is a folder, where finished batches are kept.

    Raises ValueError for no prompts or SAEs, numbers that differ, a layer or site out of range, or an `out` with another run's files.

    >>> pooled = pool_answers(lab, prompts, texts.tokens.tolist())    # doctest: +SKIP
    >>> pooled.correlation(13, correct).r().max()                     # doctest: +SKIP
    """
    prompts, saes, size = strings("prompts", prompts), dict(lab.saes if saes is None else saes), work.rows(64)
    if not prompts or not saes or len(answers) != len(prompts):
        raise ValueError(f"expected prompts, an answer for each, and SAEs, got {len(prompts)}, {len(answers)} and {len(saes)}")
    for layer in saes:
        lab.block(layer)
        block_of(layer, site)
    rows = [(prompt_ids(lab.tokenizer, prompt, chat=chat), list(answer)) for prompt, answer in zip(prompts, answers)]
    order = sorted(range(len(rows)), key=lambda r: (len(rows[r][0]) + len(rows[r][1]), r))  # rows of like length share a batch
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    key = fingerprint(lab.hf, rows, saes, site, min_window, size) if work.out else ""
    kept, found = Parts(work.path(key), key), []
    for number, batch in enumerate(bar(batches, "pool", "batch", show=work.progress)):
        part = kept.get(name := f"batch_{number:05d}")
        if part is None:
            found.append(Pooled.join(halving(partial(_batch, lab, saes, site, min_window), [rows[r] for r in batch])))
            kept.put(name, found[-1].tensors())
        else:
            found.append(Pooled.of(part))
    return Pooled.join(found).take(np.argsort(order))


def _batch(lab: Lab, saes: Mapping, site: str, min_window: int, rows: list[tuple[list[int], list[int]]]) -> Pooled:
    device, window = lab.hf.device, torch.tensor([max(len(answer), min_window) for _, answer in rows])
    whole = [prompt + answer[:-1] for prompt, answer in rows]  # the last token predicts no other
    width = max(map(len, whole))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in whole], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=device)
    row = torch.repeat_interleave(torch.arange(len(rows)), window).to(device)
    place = torch.cat([torch.arange(len(prompt) - 1, len(prompt) - 1 + n) for (prompt, _), n in zip(rows, window.tolist())]).to(device)
    with packed_linears(lab.hf):
        resid = residuals(lab.hf, ids, mask, layers=sorted({block_of(layer, site) for layer in saes}))
    seen = {block: found[row.to(found.device), place.to(found.device)] for block, found in resid.items()}
    norm = {layer: seen[block_of(layer, site)].float().norm(dim=-1).cpu() for layer in saes}
    mean = {layer: torch.zeros(len(rows)).index_add_(0, row.cpu(), x) / window.clamp_min(1) for layer, x in norm.items()}
    features = {layer: _pool(seen[block_of(layer, site)], sae, row, window.to(device)) for layer, sae in saes.items()}
    return Pooled(window.numpy(), features, {layer: x.numpy() for layer, x in mean.items()})


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

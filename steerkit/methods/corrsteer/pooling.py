"""One greedy pass that gives texts and SAE features pooled over the positions that predict them (CorrSteer, arXiv 2508.12535)."""

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from steerkit.engine.decode import Sampling, Watch, decode
from steerkit.engine.lab import Lab
from steerkit.engine.memory import halving
from steerkit.engine.packed import packed_encode
from steerkit.engine.tokens import prompt_ids
from steerkit.inputs import strings
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.progress import bar
from steerkit.store import Parts, Work, fingerprint

SITES = ("post", "pre")


def block_of(layer: int, site: str) -> int:
    """Return the block whose output is read and steered: `layer` for "post", the SAE's own hook; `layer` - 1 for "pre".

    The released code uses SAE L on the input of block L, which is the output of block L - 1, and never layer 0.
    """
    if site not in SITES or (site == "pre" and layer == 0):
        raise ValueError(f'site: expected "post" or "pre" ("pre" from layer 1 on), got {site!r} at layer {layer}')
    return layer - (site == "pre")


class Raw:
    """Residual coordinates in place of SAE features: encode is the identity, and so is W_dec (released: --raw)."""

    dtype = torch.float32

    def __init__(self, d_model: int):
        self.W_dec = torch.eye(d_model)

    def encode(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Return the residual stream itself."""
        return resid


class Pooler:
    """Running max and running mean of each row's features, fed by the decode: memory O(rows x d_sae x layers)."""

    def __init__(self, saes: Mapping[int, object], rows: int, *, site: str = "post", min_window: int = 0, device="cpu"):
        self.saes, self.site, self.min_window = saes, site, min_window
        self.encode = {layer: packed_encode(sae) for layer, sae in saes.items()}
        size = {layer: (rows, sae.W_dec.shape[0]) for layer, sae in saes.items()}
        self.peak = {layer: torch.full(shape, -torch.inf, device=device) for layer, shape in size.items()}
        self.total = {layer: torch.zeros(shape, device=device) for layer, shape in size.items()}
        self.window = torch.zeros(rows, dtype=torch.long, device=device)
        self.watch = Watch(tuple({block_of(layer, site) for layer in saes}), self.each)

    def each(self, step: int, rows: Tensor, stopped: Tensor, resid: dict[int, Tensor]) -> None:
        """Encode one position a row, all rows at once, unless it predicts the end."""
        keep = ~stopped | (step < self.min_window)
        index = rows[keep]
        self.window[index] += 1
        whole = len(index) == len(self.window)  # rows come in their order
        for layer, sae in self.saes.items():
            read = resid[block_of(layer, self.site)]
            z = self.encode[layer](read[keep.to(read.device)].to(sae.W_dec.device, sae.dtype)).float().to(self.window.device)
            peak, total = self.peak[layer], self.total[layer]
            if whole:
                torch.maximum(peak, z, out=peak)
                total += z
            else:
                peak[index] = torch.maximum(peak[index], z)
                total.index_add_(0, index, z)

    def pooled(self, tokens: list[list[int]]) -> Pooled:
        """Return what was gathered; a row without a position is zero."""
        features = {}
        for layer, peak in self.peak.items():
            top = torch.where(self.window[:, None] > 0, peak, 0.0)
            mean = self.total[layer] / self.window.clamp_min(1)[:, None]
            row, column = ((top != 0) | (mean != 0)).nonzero(as_tuple=True)
            indptr = np.append(0, torch.bincount(row, minlength=len(top)).cumsum(0).cpu().numpy())
            place = (column.int().cpu().numpy(), indptr)
            features[layer] = {
                "max": csr_array((top[row, column].cpu().numpy(), *place), shape=tuple(top.shape)),
                "mean": csr_array((mean[row, column].cpu().numpy(), *place), shape=tuple(top.shape)),
            }
        return Pooled(tokens, self.window.cpu().numpy(), features)


@torch.inference_mode()
def pool_generations(
    lab: Lab,
    prompts: Iterable[str],
    *,
    saes: Mapping[int, object] | None = None,
    sampling: Sampling | None = None,
    site: str = "post",
    min_window: int | None = None,
    chat: bool = False,
    work: Work = Work(),
) -> tuple[list[str], Pooled]:
    """Complete prompts greedily without steering; return the texts and the pooled features of every layer in `saes`.

    z_i = max or mean over t of encode(h_t)_i, t from the last prompt token to the last token that predicts another; the
    step that predicts the end counts only if it is among the first `min_window` (released: 1 for one-token answers, the
    default there, else 0, so that a text that ends at once has zeros).
    saes: {layer: SAE, or `Raw` for residual coordinates}, by default the lab's. sampling: by default greedy, 32 new tokens, up to
    what ends a text of this model (`Lab.ends`). site: "post", or "pre" as released (see `block_of`). Batches of 64 rows
    unless work says so; work.out is a folder: finished batches are on disk there, and the same call carries on.

    Raises ValueError for a temperature above 0, other settings out of range, or an `out` with another run's files.

    >>> texts, pooled = pool_generations(lab, prompts)    # doctest: +SKIP
    >>> pooled.correlation(13, correct).r().max()         # doctest: +SKIP
    """
    prompts, saes, size = strings("prompts", prompts), dict(lab.saes if saes is None else saes), work.rows(64)
    sampling = sampling or Sampling(temperature=0.0, stop=lab.ends)
    if not prompts or not saes:
        raise ValueError(f"expected at least one prompt and SAE, got {len(prompts)} and {len(saes)}")
    if sampling.temperature:
        raise ValueError(f"sampling: expected greedy decoding, as a prompt has one text here, got {sampling}: set temperature=0")
    for layer in saes:
        lab.block(layer)
    min_window = int(sampling.max_new_tokens == 1) if min_window is None else min_window
    ids = [prompt_ids(lab.tokenizer, prompt, chat=chat) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda r: (len(ids[r]), r))  # rows of like length share a batch
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    key = fingerprint(lab.hf, ids, saes, sampling, site, min_window, size) if work.out else ""
    kept, found = Parts(work.path(key), key), []
    do = partial(_batch, lab, saes, sampling, site, min_window)
    for number, batch in enumerate(bar(batches, "pool", "batch", show=work.progress)):
        part = kept.get(name := f"batch_{number:05d}")
        found.append(Pooled.join(halving(do, [ids[r] for r in batch])) if part is None else Pooled.of(part))
        if part is None:
            kept.put(name, found[-1].tensors())
    pooled = Pooled.join(found).take(np.argsort(order))
    return [lab.tokenizer.decode(t) for t in pooled.tokens], pooled


def _batch(lab: Lab, saes, sampling: Sampling, site: str, min_window: int, ids: list[list[int]]) -> Pooled:
    """Decode and pool a batch."""
    pooler = Pooler(saes, len(ids), site=site, min_window=min_window, device=lab.hf.device)
    same = [tuple(i) for i in ids]
    done = decode(lab.hf, ids, [], rows=range(len(ids)), arm=same, sampling=sampling, watch=pooler.watch)
    return pooler.pooled([d.tokens for d in done])

"""One greedy pass that gives texts and SAE features pooled over the positions that predict them (CorrSteer, arXiv 2508.12535)."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor, nn

from steerkit.engine.decode import Sampling, Watch, decode
from steerkit.engine.memory import halving
from steerkit.engine.packed import packed_encode
from steerkit.engine.steer import residual_blocks
from steerkit.engine.tokens import prompt_ids, stop_tokens
from steerkit.inputs import strings
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.progress import bar
from steerkit.store import fingerprint

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
    model: nn.Module,
    tokenizer,
    prompts: Iterable[str],
    saes: Mapping[int, object],
    *,
    max_new_tokens: int = 32,
    site: str = "post",
    stop: Sequence[int] | None = None,
    min_window: int | None = None,
    batch_size: int = 64,
    chat: bool = False,
    out: str | Path | None = None,
    progress: bool = True,
) -> tuple[list[str], Pooled]:
    """Complete prompts greedily without steering; return the texts and the pooled features of every layer in `saes`.

    z_i = max or mean over t of encode(h_t)_i, t from the last prompt token to the last token that predicts another; the
    step that predicts the end counts only if it is among the first `min_window` (released: 1 for one-token answers, the
    default there, else 0, so that a text that ends at once has zeros). stop: by default the tokens
    that end a text of this model (`tokens.stop_tokens`).
    saes: {layer: SAE, or `Raw` for residual coordinates}. site: "post", or "pre" as released (see `block_of`).
    With `out`, a folder ("{key}" becomes a hash of the run), finished batches are on disk and the same call carries on.

    Raises ValueError for settings out of range or an `out` with another run's files.

    >>> texts, pooled = pool_generations(model, tokenizer, prompts, saes)    # doctest: +SKIP
    >>> pooled.correlation(13, correct).r().max()                            # doctest: +SKIP
    """
    prompts = strings("prompts", prompts)
    if not prompts or not saes or batch_size < 1:
        raise ValueError(f"expected at least one prompt, SAE and batch row, got {len(prompts)}, {len(saes)}, {batch_size}")
    if bad := [layer for layer in saes if not 0 <= layer < len(residual_blocks(model))]:
        raise ValueError(f"saes: expected layers 0 to {len(residual_blocks(model)) - 1} for this model, got {bad}")
    stop = stop_tokens(tokenizer, model) if stop is None else stop
    min_window = int(max_new_tokens == 1) if min_window is None else min_window
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, stop=tuple(stop))
    ids = [prompt_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda r: (len(ids[r]), r))  # rows of like length share a batch
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    key = fingerprint(model, ids, dict(saes), sampling, site, min_window, batch_size) if out else ""
    folder = Path(str(out).replace("{key}", key)) if out else None
    parts = []
    for number, batch in enumerate(bar(batches, "pool", "batch", show=progress)):
        path = folder / f"batch_{number:05d}.safetensors" if folder else None
        if path is not None and path.exists():
            parts.append(Pooled.load(path, key=key))
            continue
        do = partial(_batch, model, saes, sampling, site, min_window, tokenizer.pad_token_id or 0)
        parts.append(Pooled.join(halving(do, [ids[r] for r in batch])))
        if path is not None:
            parts[-1].save(path, key=key)
    pooled = Pooled.join(parts).take(np.argsort(order))
    return [tokenizer.decode(t) for t in pooled.tokens], pooled


def _batch(model, saes, sampling: Sampling, site: str, min_window: int, pad: int, ids: list[list[int]]) -> Pooled:
    """Decode and pool a batch."""
    pooler = Pooler(saes, len(ids), site=site, min_window=min_window, device=model.device)
    same = [tuple(i) for i in ids]
    done = decode(model, ids, [], rows=range(len(ids)), arm=same, shared=same, sampling=sampling, pad=pad, watch=pooler.watch)
    return pooler.pooled([d.tokens for d in done])

"""Do the tokens on which a feature fires hardest agree with its logit lens? Input scores from a streaming pass over text.

Arad, Mueller, Belinkov (arXiv 2505.20063), section 3.1. The paper reads stored top activations; here they are collected:
one record a feature and text row, the strongest kept, so memory does not grow with the text.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.engine.lab import Lab
from steerkit.engine.packed import packed_linears
from steerkit.features import ordinary_positions, residuals


class TopRecords:
    """The k strongest records of each feature: how hard it fired and on which token. At most one record a row of text.

    values [n_features, k], falling, 0 where there are fewer; tokens [n_features, k], -1 there.

    >>> records = TopRecords(1, k=2)
    >>> records.add(torch.tensor([[[3.0], [1.0]], [[0.0], [5.0]], [[4.0], [0.0]]]), torch.tensor([[7, 8], [8, 9], [7, 7]]))
    >>> records.values.tolist(), records.tokens.tolist()
    ([[5.0, 4.0]], [[9, 7]])
    """

    def __init__(self, n_features: int, *, k: int = 100):
        self.values = torch.zeros(n_features, k)
        self.tokens = torch.full((n_features, k), -1)

    def add(
        self,
        acts: Float[Tensor, "rows pos n_features"],
        ids: Int[Tensor, "rows pos"],
        keep: Bool[Tensor, "rows pos"] | None = None,
    ) -> None:
        """Take in a batch of rows; positions that are not kept do not count."""
        acts = acts if keep is None else acts * keep[..., None]
        value, where = acts.max(1)  # [rows, n_features]
        token = torch.where(value > 0, ids.gather(1, where), -1)
        values = torch.cat([self.values, value.T.float().cpu()], 1)
        tokens = torch.cat([self.tokens, token.T.cpu()], 1)
        self.values, order = values.topk(self.values.shape[1], dim=1)
        self.tokens = tokens.gather(1, order)


def input_scores(
    lens: Int[Tensor, "n k"], tokens: Int[Tensor, "n records"], *, min_records: int = 10
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return S_in, the share of a feature's records whose peak token is among its lens tokens (eq. 8), and their number.

    tokens: -1 where there is no record. Records are counted, so a token may count several times, as released (the paper
    writes a set). NaN below `min_records` records (released: 10; the paper's text: 20). Ids are compared as they are; the
    released code turns ids into strings and back, which gives 0 for some tokenizers.

    >>> input_scores(torch.tensor([[5, 9]]), torch.tensor([[5, 5, 7, -1]]), min_records=3)[0].item()
    0.6666666865348816
    """
    real = tokens >= 0
    n = real.sum(1)
    hits = ((tokens[:, :, None] == lens[:, None]).any(-1) & real).sum(1)
    return torch.where(n >= min_records, hits / n.clamp_min(1), torch.nan), n


@torch.inference_mode()
def collect(lab: Lab, rows: Iterable[Int[Tensor, " context"]], *, k: int = 100, batch_size: int = 16) -> dict[int, TopRecords]:
    """Return the top records of the lab's SAEs over rows of token ids, all layers in one pass; only ordinary positions count."""
    saes, special = dict(lab.saes), lab.tokenizer.all_special_ids
    records = {layer: TopRecords(sae.W_dec.shape[0], k=k) for layer, sae in saes.items()}
    with packed_linears(lab.hf):
        for ids in _batched(rows, batch_size):
            ids = ids.to(lab.hf.device)
            resid = residuals(lab.hf, ids, layers=list(saes))
            keep = ordinary_positions(ids, None, resid, special=special, outlier=lab.preset.outlier)
            for layer, sae in saes.items():
                records[layer].add(sae.encode(resid[layer].to(sae.dtype)), ids, keep)
    return records


def _batched(rows: Iterable[Tensor], size: int) -> Iterable[Tensor]:
    batch: list[Tensor] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)

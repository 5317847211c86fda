"""Pooled features of many answers, kept sparse: correlations, nulls, subsets and bootstraps read them again for little."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from steerkit.methods.corrsteer.correlation import Correlation

POOLS = ("max", "mean")


@dataclass(frozen=True)
class Pooled:
    """Pooled features of n answers, sparse: a few kB an answer and layer, so all that follows is cheap.

    window: positions pooled over. features: {layer: {"max": [n, d], "mean": [n, d]}}, float32. norm: {layer: [n]}, the mean |x| of the
    residual stream over the positions, at the place where the layer's features are read.
    """

    window: Int[np.ndarray, " n"]
    features: dict[int, dict[str, csr_array]]
    norm: dict[int, Float[np.ndarray, " n"]]

    def __len__(self) -> int:
        return len(self.window)

    def z(self, layer: int, pool: str = "max") -> csr_array:
        """Return the pooled features of a layer, [n, d]; ValueError for a layer or pooling that is not there."""
        if pool not in self.features.get(layer, {}):
            raise ValueError(f"expected a layer of {sorted(self.features)} and a pooling of {', '.join(POOLS)}; got {layer} and {pool!r}")
        return self.features[layer][pool]

    def correlation(self, layer: int, y, *, pool: str = "max", steer_pool: str = "max", edges="log", batch: int = 512) -> Correlation:
        """Return the statistics of a layer against the outcomes y [n], `batch` samples at a time.

        pool feeds r, steer_pool the coefficients; released: max for both, and mean for both on GSM8K.
        """
        z, w, y = self.z(layer, pool), self.z(layer, steer_pool), np.asarray(y)
        found = Correlation.empty(z.shape[1], edges=edges)
        for at in range(0, max(z.shape[0], len(y)), batch):
            part = slice(at, at + batch)
            found.update(z[part], y[part], steer=None if pool == steer_pool else w[part])
        return found

    def take(self, rows: Sequence[int] | Int[np.ndarray, " m"]) -> "Pooled":
        """Return a selection of samples, in the order given; repeats are allowed."""
        rows = np.asarray(rows, dtype=np.int64)
        features = {layer: {pool: z[rows] for pool, z in pools.items()} for layer, pools in self.features.items()}
        return Pooled(self.window[rows], features, {layer: norm[rows] for layer, norm in self.norm.items()})

    @classmethod
    def join(cls, parts: Sequence["Pooled"]) -> "Pooled":
        """Return the samples of all parts, one after the other."""
        layers = parts[0].features
        features = {layer: {pool: vstack([p.z(layer, pool) for p in parts], format="csr") for pool in POOLS} for layer in layers}
        norm = {layer: np.concatenate([p.norm[layer] for p in parts]) for layer in layers}
        return cls(np.concatenate([p.window for p in parts]), features, norm)

    def tensors(self) -> dict[str, Tensor]:
        """Return what `of` makes the same samples from: windows, norms, and a layer's one sparsity pattern with its values."""
        found = {"window": self.window, "layers": np.array(list(self.features), dtype=np.int64)}
        found["widths"] = np.array([pools["max"].shape[1] for pools in self.features.values()], dtype=np.int64)
        for layer, pools in self.features.items():
            found[f"{layer}.norm"] = self.norm[layer]
            found[f"{layer}.indptr"] = pools["max"].indptr.astype(np.int64)
            found[f"{layer}.indices"] = pools["max"].indices.astype(np.int32)
            found |= {f"{layer}.{pool}": pools[pool].data for pool in POOLS}
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Pooled":
        """Return the samples that `tensors` came from."""
        found = {name: values.numpy() for name, values in tensors.items()}
        layers, n = found["layers"].tolist(), len(found["window"])
        features = {
            layer: {
                pool: csr_array((found[f"{layer}.{pool}"], found[f"{layer}.indices"], found[f"{layer}.indptr"]), shape=(n, d))
                for pool in POOLS
            }
            for layer, d in zip(layers, found["widths"].tolist())
        }
        return cls(found["window"], features, {layer: found[f"{layer}.norm"] for layer in layers})

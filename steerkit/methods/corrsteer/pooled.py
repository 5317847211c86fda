"""Pooled features of many samples, kept sparse: correlations, nulls, subsets and bootstraps read them again for little."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes
from scipy.sparse import csr_array, vstack

from steerkit.files import write_atomic
from steerkit.methods.corrsteer.correlation import Correlation


@dataclass(frozen=True)
class Pooled:
    """Generated tokens and pooled features of n samples, sparse: a few kB a sample and layer, so all that follows is cheap.

    window: positions pooled over. features: {layer: {"max": [n, d], "mean": [n, d]}}, float32.
    """

    tokens: list[list[int]]
    window: Int[np.ndarray, " n"]
    features: dict[int, dict[str, csr_array]]

    def __len__(self) -> int:
        return len(self.tokens)

    def z(self, layer: int, pool: str = "max") -> csr_array:
        """Return the pooled features of a layer, [n, d]; ValueError for a layer or pooling that is not there."""
        if pool not in self.features.get(layer, {}):
            raise ValueError(f"expected a layer of {sorted(self.features)} and a pooling of max, mean; got {layer} and {pool!r}")
        return self.features[layer][pool]

    def correlation(
        self, layer: int, y, *, pool: str = "max", steer_pool: str = "max", rows=slice(None), edges="log", batch: int = 512
    ) -> Correlation:
        """Return the statistics of a layer against the outcomes y [n]; rows: a selection, repeats allowed.

        pool feeds r, steer_pool the coefficients; released: max for both, and mean for both on GSM8K.
        """
        z, w, y = self.z(layer, pool)[rows], self.z(layer, steer_pool)[rows], np.asarray(y)[rows]
        found = Correlation.empty(z.shape[1], edges=edges)
        for at in range(0, max(z.shape[0], len(y)), batch):
            part = slice(at, at + batch)
            found.update(z[part], y[part], steer=None if pool == steer_pool else w[part])
        return found

    def take(self, rows: Sequence[int] | Int[np.ndarray, " m"]) -> "Pooled":
        """Return a selection of samples, in the order given."""
        rows = np.asarray(rows, dtype=np.int64)
        features = {layer: {pool: z[rows] for pool, z in pools.items()} for layer, pools in self.features.items()}
        return Pooled([self.tokens[i] for i in rows], self.window[rows], features)

    @classmethod
    def join(cls, parts: Sequence["Pooled"]) -> "Pooled":
        """Return the samples of all parts, one after the other."""
        features = {
            layer: {pool: vstack([p.z(layer, pool) for p in parts], format="csr") for pool in pools}
            for layer, pools in parts[0].features.items()
        }
        return cls([t for p in parts for t in p.tokens], np.concatenate([p.window for p in parts]), features)

    def save(self, path: str | Path, *, key: str = "") -> Path:
        """Write a safetensors file: tokens, windows, and for each layer one sparsity pattern with its max and mean values."""
        tensors = {"window": self.window, "lengths": np.array([len(t) for t in self.tokens], dtype=np.int64)}
        tensors["tokens"] = np.array([i for t in self.tokens for i in t], dtype=np.int32)
        for layer, pools in self.features.items():
            z = pools["max"]
            tensors |= {f"{layer}.indptr": z.indptr.astype(np.int64), f"{layer}.indices": z.indices.astype(np.int32)}
            tensors |= {f"{layer}.{pool}": values.data for pool, values in pools.items()}
        about = {"key": key, "d": {layer: pools["max"].shape[1] for layer, pools in self.features.items()}}
        return write_atomic(path, to_bytes(tensors, {"pooled": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path, *, key: str | None = None) -> "Pooled":
        """Read what `save` wrote; ValueError for another file, or for the file of another run where a key is given."""
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {})["pooled"])
                found = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected pooled features written by Pooled.save, got {error}: delete it") from error
        if key is not None and about["key"] != key:
            raise ValueError(f"{path} holds another run (key {about['key']}, this one is {key}): delete it or choose another `out`")
        n, ends = len(found["window"]), np.cumsum(found["lengths"])[:-1]
        features = {
            int(layer): {
                pool: csr_array((found[f"{layer}.{pool}"], found[f"{layer}.indices"], found[f"{layer}.indptr"]), shape=(n, d))
                for pool in ("max", "mean")
            }
            for layer, d in about["d"].items()
        }
        return cls([part.tolist() for part in np.split(found["tokens"], ends)], found["window"], features)

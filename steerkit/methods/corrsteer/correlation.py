"""Streaming statistics of pooled features against an outcome (CorrSteer, arXiv 2508.12535).

Samples are rows: z [n, d] holds one pooled activation a feature, y [n] the outcome (positive when y > 0). Both may be
tensors or arrays, and z may be a scipy sparse matrix.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse
from scipy.special import rel_entr

FLOOR = 1e-12  # of a variance, as released
# Right ends of the bins of mutual information. "released": the released list carries 1.0 again after 5.62. torch.bucketize
# searches it by halves and never stops at that entry, so the bins are those of the 21 sorted edges below: no bin for
# exact zeros, none above 5.62. "log": zeros apart, then four bins a decade from 1e-4 to 1e4.
EDGES = {
    "log": np.append(0.0, 10.0 ** (np.arange(-16, 17) / 4)),
    "released": np.array([10.0 ** (decade + k / 4) for decade in range(-6, 1) for k in (1, 2, 3)]),
}


def array(values, name: str, ndim: int) -> Float[np.ndarray, "..."]:
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    values = np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)
    if values.ndim != ndim:
        raise ValueError(f"{name}: expected {'[n, d]' if ndim == 2 else '[n]'}, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers, got {int((~np.isfinite(values)).sum())} NaN or infinite entries")
    return values


@dataclass
class Correlation:
    """Sufficient statistics of d features against an outcome; batches add up in any order (paper: Algorithm 1).

    r_i = Cov(z_i, y) / sqrt(Var(z_i) Var(y)), from running means, squares M2 and co-moments C in float64; a batch joins by
    Chan's formula: C = C_a + C_b + (mean_a - mean_b)(y_a - y_b) n_a n_b / n. The released code sums powers; both agree to
    1e-10. Memory is O(d), whatever n. `steer_*` sums belong to the pooling that gives coefficients (released: steer_pool).

    >>> c = Correlation.empty(1)
    >>> c.update(np.array([[0.0], [2.0], [4.0]]), np.array([0, 1, 1]))
    >>> c.r().round(4).tolist(), c.coefficients().tolist()
    ([0.866], [3.0])
    """

    edges: Float[np.ndarray, " e"]
    mean_x: Float[np.ndarray, " d"]
    m2_x: Float[np.ndarray, " d"]
    c_xy: Float[np.ndarray, " d"]
    mean_y: float
    m2_y: float
    n_pos: int
    n_neg: int
    fired_pos: Int[np.ndarray, " d"]
    fired_neg: Int[np.ndarray, " d"]
    steer_pos: Float[np.ndarray, " d"]
    steer_neg: Float[np.ndarray, " d"]
    square_pos: Float[np.ndarray, " d"]
    square_neg: Float[np.ndarray, " d"]
    firing_pos: Float[np.ndarray, " d"]  # sum over positives that fire
    firing_count: Int[np.ndarray, " d"]
    histogram: Int[np.ndarray, "2 bins d"]  # negatives, positives; no bins without edges

    @classmethod
    def empty(cls, d: int, *, edges="log") -> "Correlation":
        """Return the statistics of no samples; edges: "log", "released", an ascending array, or None for no histogram."""
        edges = np.asarray([] if edges is None else EDGES[edges] if isinstance(edges, str) else edges, dtype=np.float64)
        if (np.diff(edges) <= 0).any():
            raise ValueError(f"edges: expected ascending numbers, got {edges.tolist()}")
        x = [np.zeros(d) for _ in range(8)]
        counts = [np.zeros(d, dtype=np.int64) for _ in range(3)]
        histogram = np.zeros((2, len(edges) + 1 if len(edges) else 0, d), dtype=np.int64)
        return cls(edges, *x[:3], 0.0, 0.0, 0, 0, *counts[:2], *x[3:], counts[2], histogram)

    @property
    def n(self) -> int:
        """Samples seen."""
        return self.n_pos + self.n_neg

    @property
    def fired(self) -> Int[np.ndarray, " d"]:
        """Samples on which each feature fires."""
        return self.fired_pos + self.fired_neg

    def update(self, z, y, *, steer=None) -> None:
        """Add a batch: z [n, d], y [n]; steer [n, d] is the pooling for coefficients, z where none is given.

        Raises ValueError for shapes that do not fit or numbers that are not finite; the statistics are then unchanged.
        """
        z, y = array(z, "z", 2), array(y, "y", 1)
        w = z if steer is None else array(steer, "steer", 2)
        if z.shape != w.shape or z.shape != (len(y), len(self.mean_x)):
            raise ValueError(f"expected z and steer [{len(y)}, {len(self.mean_x)}], got {z.shape} and {w.shape}")
        if len(y) == 0:
            return
        right, mean_x, mean_y = y > 0, z.mean(0), float(y.mean())
        one, zero, fires = right.astype(float), (~right).astype(float), (z > 0).astype(float)
        dz, dy, positive = z - mean_x, y - mean_y, w[right]
        share, both = len(y) / (self.n + len(y)), self.n * len(y) / (self.n + len(y))
        gap_x, gap_y = mean_x - self.mean_x, mean_y - self.mean_y
        self.mean_x, self.mean_y = self.mean_x + share * gap_x, self.mean_y + share * gap_y
        self.m2_x = self.m2_x + np.einsum("nd,nd->d", dz, dz) + both * gap_x**2
        self.m2_y = self.m2_y + float(dy @ dy) + both * gap_y**2
        self.c_xy = self.c_xy + dy @ dz + both * gap_x * gap_y
        self.n_pos += int(right.sum())
        self.n_neg += int((~right).sum())
        self.fired_pos += (one @ fires).astype(np.int64)
        self.fired_neg += (zero @ fires).astype(np.int64)
        self.steer_pos += one @ w
        self.steer_neg += zero @ w
        self.square_pos += one @ w**2
        self.square_neg += zero @ w**2
        self.firing_pos += positive.clip(0).sum(0)
        self.firing_count += (positive > 0).sum(0)
        self.histogram += _histogram(z, right, self.edges, self.histogram.shape)

    def r(self) -> Float[np.ndarray, " d"]:
        """Return Pearson's r (population form) with variances floored at 1e-12: 0 for a dead feature or a constant outcome."""
        return pearson(self.c_xy, self.m2_x, self.m2_y, self.n)

    def coefficients(self, *, firing_only: bool = False) -> Float[np.ndarray, " d"]:
        """Return c_i, the mean over positive samples: zeros included, or over those that fire (released: --real; 0 if none)."""
        if not self.n_pos:
            raise ValueError("expected at least one sample with y > 0, got none: a coefficient is a mean over them")
        return self.firing_pos / self.firing_count.clip(1) if firing_only else self.steer_pos / self.n_pos

    def caa(self) -> Float[np.ndarray, " d"]:
        """Return mean(z | y > 0) - mean(z | y <= 0), of the steer pooling (released: contrastive difference)."""
        return self.steer_pos / max(self.n_pos, 1) - self.steer_neg / max(self.n_neg, 1)

    def fisher(self) -> Float[np.ndarray, " d"]:
        """Return E[z^2 | y > 0] / max(E[z^2 | y <= 0], 1e-12), of the steer pooling (released: "DSG"); huge where no failure fires."""
        return self.square_pos / max(self.n_pos, 1) / np.maximum(self.square_neg / max(self.n_neg, 1), FLOOR)

    def mutual_information(self) -> Float[np.ndarray, " d"]:
        """Return I(bin(z); y) in nats, from the histograms (released: "SPARE")."""
        if not len(self.edges):
            raise ValueError('edges: expected bins for mutual information, got none: start with edges="log"')
        joint = self.histogram / max(self.n, 1)
        return rel_entr(joint, joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)).sum((0, 1))


def pearson(c_xy, m2_x, m2_y, n) -> Float[np.ndarray, "..."]:
    """Return (c_xy / n) / sqrt(max(m2_x / n, 1e-12) max(m2_y / n, 1e-12)), the floored r of the released code."""
    n = np.maximum(n, 1)
    return c_xy / n / np.sqrt(np.maximum(m2_x / n, FLOOR) * np.maximum(m2_y / n, FLOOR))


def _histogram(z, positive, edges, shape) -> Int[np.ndarray, "2 bins d"]:
    """Count each feature's values per bin and outcome; zeros, most of the entries, are counted as what is left."""
    if not len(edges):
        return np.zeros(shape, dtype=np.int64)
    row, feature = np.nonzero(z)
    place = np.searchsorted(edges, z[row, feature])
    counts = np.bincount(np.ravel_multi_index((positive[row].astype(int), place, feature), shape), minlength=np.prod(shape)).reshape(shape)
    counts[:, np.searchsorted(edges, 0.0)] += np.array([(~positive).sum(), positive.sum()])[:, None] - counts.sum(1)
    return counts

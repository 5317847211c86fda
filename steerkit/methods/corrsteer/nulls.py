"""What chance alone gives a correlation: shuffled labels, subsets and bootstraps of kept features, many at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from steerkit.methods.corrsteer.correlation import Correlation, array, pearson


def permutations(y, n: int, *, seed: int = 0, within=None) -> Float[np.ndarray, "n samples"]:
    """Return n shufflings of the labels, over the whole run or within strata.

    within: a stratum for each sample. With the kind of question, what only tells easy kinds from hard ones stays in the null.
    The released control shuffles within batches of 8, np.arange(samples) // 8, which keeps each batch's share of successes: a
    weaker null. Raises ValueError for strata that do not fit.
    """
    y = array(y, "y", 1)
    if within is not None and len(within) != len(y):
        raise ValueError(f"within: expected a stratum for each of {len(y)} samples, got {len(within)}")
    strata = np.zeros(len(y), dtype=int) if within is None else np.unique(np.asarray(within), return_inverse=True)[1]
    out = np.empty((n, len(y)))
    out[:, np.argsort(strata, kind="stable")] = y[np.argsort(np.random.default_rng(seed).random((n, len(y))) + strata, axis=1)]
    return out


def shuffled(y, *, seed: int = 0, within=None) -> Float[np.ndarray, " samples"]:
    """Return one shuffling of the labels, the control that a whole selection can be run on; as in `permutations`."""
    return permutations(y, 1, seed=seed, within=within)[0]


@dataclass(frozen=True)
class Null:
    """The largest r over features under each shuffling of the labels.

    With one seed the shufflings of all layers agree, so `np.maximum` over layers gives the null of the best layer.
    """

    max_r: Float[np.ndarray, " permutations"]

    def threshold(self, level: float = 0.95) -> float:
        """Return the r that chance stays below in `level` of the shufflings."""
        return float(np.quantile(self.max_r, level))


def permutation_null(z, y, *, n: int = 1000, seed: int = 0, within=None, min_fired: int = 0, batch: int = 512) -> Null:
    """Return the null of the per-layer maximum of r: B = n label vectors carried through one pass over the features.

    C_xy of all shufflings is one product a batch, (y_b - mean y) @ z, in float64; Var(z) does not depend on the labels.
    Memory O(B d). z: [samples, d], dense or sparse; `batch` samples are dense at once. min_fired leaves out features that
    fire on fewer samples. Raises ValueError for a row too few or too many, or where nothing fires so often.
    Card: for dense noise the maximum lies near 3.86 / sqrt(samples) with 16,384 features.
    """
    y, z = array(y, "y", 1), z if sparse.issparse(z) else array(z, "z", 2)
    if z.shape[0] != len(y):
        raise ValueError(f"expected one row of z for each of {len(y)} outcomes, got {z.shape[0]}")
    labels = permutations(y, n, seed=seed, within=within) - y.mean()
    total, cross = Correlation.empty(z.shape[1], edges=None), 0.0
    for at in range(0, len(y), batch):
        rows = slice(at, at + batch)
        total.update(z[rows], y[rows])
        cross = cross + labels[:, rows] @ z[rows].astype(np.float64)
    keep = total.fired >= min_fired
    if not keep.any():
        raise ValueError(f"min_fired: expected a feature that fires on {min_fired} samples, the most is {total.fired.max()}: lower it")
    return Null(pearson(cross[:, keep], total.m2_x[keep], total.m2_y, total.n).max(1))


def resampled_r(z, y, weights: Float[np.ndarray, "b n"] | Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b d"]:
    """Return r under each row of sample weights: 0 and 1 for subsets (the sample-size curve), draw counts for a bootstrap.

    Three products for all rows together, sparse where z is: z [n, d], y [n], weights [b, n].

    >>> resampled_r(np.array([[0.0], [1.0], [5.0]]), np.array([0, 1, 0]), np.array([[1, 1, 0]])).tolist()
    [[1.0]]
    """
    y, w = array(y, "y", 1), np.asarray(weights, dtype=np.float64)
    z = z.astype(np.float64) if sparse.issparse(z) else array(z, "z", 2)
    if z.shape[0] != len(y) or w.shape[1] != len(y) or (w.sum(1) <= 0).any():
        raise ValueError(f"expected z [{len(y)}, d] and weights [b, {len(y)}] with positive sums, got {z.shape} and {w.shape}")
    n = w.sum(1, keepdims=True)
    mean_x, mean_y = w @ z / n, (w @ y)[:, None] / n
    m2_x = w @ z**2 - n * mean_x**2
    m2_y = np.einsum("bn,bn->b", w, (y - mean_y) ** 2)[:, None]
    return pearson((w * (y - mean_y)) @ z, m2_x, m2_y, n)


def curve_weights(n: int, sizes: Iterable[int]) -> Int[np.ndarray, "b n"]:
    """Return the weights that keep the first k samples, for each k of a sample-size curve."""
    return (np.arange(n) < np.asarray(list(sizes))[:, None]).astype(np.int64)

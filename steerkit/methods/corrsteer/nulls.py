"""What chance alone gives a correlation: labels shuffled over the run or within strata, whole items at a time."""

from collections import Counter

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse

from steerkit.inputs import Array
from steerkit.methods.corrsteer.correlation import Correlation, array, pearson


def strata(kinds: Array, answers: Array, items: Array) -> list[tuple[str, str | None]]:
    """Return each question's stratum: its kind, with the right answer where several items share that answer.

    Within such strata a feature that only tells kinds apart, or one right answer from another («Europe»), stays in the null. Answers
    that a single item has cannot be told from that item: those of a kind share one stratum.

    >>> strata(["continent"] * 3, ["Europe", "Europe", "Asia"], ["FR", "IT", "JP"])
    [('continent', 'Europe'), ('continent', 'Europe'), ('continent', None)]
    """
    asked = list(zip(kinds, answers))
    shared = Counter(pair for pair, _ in set(zip(asked, items)))
    return [(kind, answer if shared[kind, answer] > 1 else None) for kind, answer in asked]


def permutations(y, n: int, *, seed: int = 0, within: Array | None = None, items: Array | None = None) -> Float[np.ndarray, "n samples"]:
    """Return n shufflings of the labels, over the whole run or within strata, one by one or a whole item at a time.

    within: a stratum for each sample (`strata`). items: what questions ask alike, a fact in several wordings, a template: its labels are
    alike, so they move together, in their order; items of unequal size are laid end to end, and a few of their labels then part.
    The released control shuffles within batches of 8, np.arange(samples) // 8, which keeps each batch's share of successes: a
    weaker null. Raises ValueError for strata or items that do not fit.
    """
    y, rng = array(y, "y", 1), np.random.default_rng(seed)
    for name, given in {"within": within, "items": items}.items():
        if given is not None and len(given) != len(y):
            raise ValueError(f"{name}: expected one for each of {len(y)} samples, got {len(given)}")
    where = np.zeros(len(y), dtype=int) if within is None else _numbers(within)
    item, out = np.arange(len(y)) if items is None else _numbers(items), np.tile(y, (n, 1))
    for stratum in range(where.max() + 1):
        rows = np.flatnonzero(where == stratum)
        rows = rows[np.argsort(item[rows], kind="stable")]
        own = np.unique(item[rows], return_inverse=True)[1]
        key = rng.random((n, own.max() + 1))[:, own]  # one number an item: its samples stay together and in order
        out[:, rows] = y[rows[np.argsort(key, axis=1, kind="stable")]]
    return out


def _numbers(labels: Array) -> np.ndarray:
    number: dict = {}
    return np.array([number.setdefault(label, len(number)) for label in labels])


def movable(y, labels: Float[np.ndarray, "n samples"]) -> Bool[np.ndarray, " samples"]:
    """Mark the samples whose label some shuffling changes: where a stratum has one label only, there is nothing to test."""
    return (labels != array(y, "y", 1)).any(0)


def permutation_null(z, y, labels: Float[np.ndarray, "n samples"], *, min_fired: int = 0, batch: int = 512) -> Float[np.ndarray, " n"]:
    """Return the largest r over the features under each shuffling of the labels: B = n label vectors in one pass over the features.

    C_xy of all shufflings is one product a batch, (y_b - mean y) @ z, in float64; Var(z) does not depend on the labels.
    Memory O(B d). z: [samples, d], dense or sparse; `batch` samples are dense at once. min_fired leaves out features that
    fire on fewer samples. The same labels for all layers: `np.maximum` over layers then gives the null of the best layer.
    Raises ValueError for a row too few or too many, or where nothing fires so often.
    Card: for dense noise the maximum lies near 3.86 / sqrt(samples) with 16,384 features.

    >>> floor = np.quantile(permutation_null(z, y, permutations(y, 1000)), 0.95)    # doctest: +SKIP
    """
    y, z = array(y, "y", 1), z if sparse.issparse(z) else array(z, "z", 2)
    if z.shape[0] != len(y) or labels.shape[1] != len(y):
        raise ValueError(f"expected one row of z and one column of labels for each of {len(y)} outcomes, got {z.shape}, {labels.shape}")
    total, cross = Correlation.empty(z.shape[1], edges=None), 0.0
    for at in range(0, len(y), batch):
        rows = slice(at, at + batch)
        total.update(z[rows], y[rows])
        cross = cross + (labels[:, rows] - y.mean()) @ z[rows].astype(np.float64)
    keep = total.fired >= min_fired
    if not keep.any():
        raise ValueError(f"min_fired: expected a feature that fires on {min_fired} samples, the most is {total.fired.max()}: lower it")
    return pearson(cross[:, keep], total.m2_x[keep], total.m2_y, total.n).max(1)

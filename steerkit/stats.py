"""Intervals for every number: bootstrap over samples or over groups of samples, and paired differences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with its interval: `n` samples, in `groups` independent groups where samples are clustered.

    `low` and `high` are nan where fewer than two independent units were seen: then there is no interval to give.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int | None = None

    def __str__(self) -> str:
        show = _format(self.value, self.low, self.high)
        within = f"[{self.low:{show}}, {self.high:{show}}]" if np.isfinite(self.low) else "[no interval]"
        return f"{self.value:{show}} {within}, n = {self.n}" + (f" in {self.groups} groups" if self.groups else "")

    def __contains__(self, number: float) -> bool:
        return bool(self.low <= number <= self.high)

    def excludes(self, null: float = 0.0) -> bool:
        """Tell whether the whole interval lies on one side of `null`."""
        return bool(self.low > null or self.high < null)


def _format(*numbers: float) -> str:
    """One format for all: two decimals, more where a number would read as zero; three digits where that is not enough."""
    sizes = [abs(x) for x in numbers if np.isfinite(x) and x]
    decimals = next((d for d in (2, 3, 4) if min(sizes, default=1.0) >= 0.5 * 10**-d), None)
    return f".{decimals}f" if decimals and max(sizes, default=0.0) < 100 else ".3g"


def clean(values, name: str = "values") -> np.ndarray:
    """Return the values as floats; ValueError for none, or for NaN or infinity among them."""
    values = np.asarray(values, dtype=float)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"expected at least one sample in `{name}`, got {values.shape}")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"expected finite numbers in `{name}`, got {bad} of {values.size} that are not: drop them and say so")
    return values


def _units(n: int, n_boot: int, seed: int):
    """Yield `n_boot` times n units, samples or groups, drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(n_boot):
        yield rng.integers(n, size=n)


def _draws(n: int, groups: Sequence | np.ndarray | None, n_boot: int, seed: int):
    """Yield `n_boot` index arrays: samples drawn with replacement, or whole groups drawn with replacement."""
    if groups is None:
        yield from _units(n, n_boot, seed)
        return
    _, label = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(label == g) for g in range(label.max() + 1)]
    for drawn in _units(len(members), n_boot, seed):
        yield np.concatenate([members[g] for g in drawn])


def _group_means(values: np.ndarray, groups: Sequence | np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Return the means of the draws of `_draws` from each group's sum and size: thousands of times fewer numbers to add."""
    label = np.unique(np.asarray(groups), return_inverse=True)[1]
    size, total = np.bincount(label), np.bincount(label, weights=values)
    drawn = np.stack(list(_units(len(size), n_boot, seed)))
    return total[drawn].sum(1) / size[drawn].sum(1)


def bootstrap(
    values,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    n_boot: int = 2000,
    level: float = 0.95,
    groups: Sequence | np.ndarray | None = None,
    seed: int = 0,
) -> Interval:
    """Return `statistic(values)` with its percentile bootstrap interval (Efron 1979).

    `values` is [n] or [n, columns]; samples are rows, and `statistic` maps such an array to a number. With `groups`
    (one label a sample: the prompt, the topic) whole groups are drawn: samples that share one are not independent.
    Draws on which the statistic is not a number are left out; with more than one in a hundred there is no interval.
    Raises ValueError for no samples, numbers that are not finite, or labels that do not fit.

    Example: `bootstrap([0.2, 0.4, 0.9], groups=["a", "a", "b"])`
    """
    values = clean(values)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"expected one group label for each of {len(values)} samples, got {len(groups)}")
    if not 0 < level < 1 or n_boot < 100:
        raise ValueError(f"expected 0 < level < 1 and n_boot >= 100, got {level} and {n_boot}")
    units = len(values) if groups is None else len(np.unique(np.asarray(groups)))
    low = high = float("nan")
    if units > 1:
        if statistic is np.mean and groups is not None and values.ndim == 1:
            drawn = _group_means(values, groups, n_boot, seed)
        else:
            drawn = np.array([statistic(values[rows]) for rows in _draws(len(values), groups, n_boot, seed)])
        if np.isnan(drawn).mean() <= 0.01:
            low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(float(statistic(values)), low, high, len(values), None if groups is None else units)


def paired_difference(a, b, statistic: Callable[[np.ndarray], float] = np.mean, **options) -> Interval:
    """Return `statistic(a) - statistic(b)` for two conditions measured on the same samples, with its interval.

    a, b: [n] in the same order; pairs are drawn together, so what they share cancels. Options as in `bootstrap`.

    Example: `paired_difference(steered, baseline, groups=prompts).excludes(0)`
    """
    a, b = clean(a, "a"), clean(b, "b")
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two arrays of equal length, got shapes {a.shape} and {b.shape}")
    if statistic is np.mean:
        return bootstrap(a - b, **options)
    return bootstrap(np.stack([a, b], axis=1), lambda rows: statistic(rows[:, 0]) - statistic(rows[:, 1]), **options)

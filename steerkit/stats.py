"""Intervals for every number: bootstrap over samples or groups of samples, t over few units; paired differences; Holm's correction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with its interval: `n` samples, in `groups` independent groups where samples are clustered.

    It covers 95 % unless said otherwise. `df`: degrees of freedom of a t interval, none for a bootstrap. `low` and `high` are nan
    where fewer than two independent units were seen: then there is no interval to give.
    """

    value: float
    low: float
    high: float
    n: int
    groups: int | None = None
    df: int | None = None

    def __str__(self) -> str:
        show = _format(self.value, self.low, self.high)
        within = f"[{self.low:{show}}, {self.high:{show}}]" if np.isfinite(self.low) else "[no interval]"
        return f"{self.value:{show}} {within}, n = {self.n}" + (f" in {self.groups} groups" if self.groups else "")

    def __contains__(self, number: float) -> bool:
        return bool(self.low <= number <= self.high)

    def excludes(self, null: float = 0.0) -> bool:
        """Tell whether the whole interval lies on one side of `null`."""
        return bool(self.low > null or self.high < null)

    def p(self, null: float = 0.0) -> float:
        """Return the two-sided p value against `null`: of the 95 % interval, stretched until it touches `null`.

        Below 0.05 exactly where the interval excludes `null`. nan without an interval.

        >>> round(Interval(2.0, 0.04, 3.96, 100).p(), 3), Interval(0.0, -1.0, 1.0, 9).p()
        (0.046, 1.0)
        """
        from scipy.stats import norm, t

        reach = self.value - self.low if self.value > null else self.high - self.value
        law = norm if self.df is None else t(self.df)
        if self.value == null or np.isnan(reach):
            return float("nan") if np.isnan(reach) else 1.0
        return float(2 * law.sf(law.ppf(0.975) * abs(self.value - null) / reach)) if reach > 0 else 0.0

    @property
    def detectable(self) -> float:
        """The smallest true difference that such a test finds four times in five: (q(0.975) + q(0.8)) standard errors."""
        from scipy.stats import norm, t

        law = norm if self.df is None else t(self.df)
        return float((self.high - self.low) / 2 * (1 + law.ppf(0.8) / law.ppf(0.975)))


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


def t_interval(values) -> Interval:
    """Return the mean over independent units, topics say, with its t interval: mean +- t(0.975, n - 1) sd / sqrt(n).

    For few units, where a percentile bootstrap is too narrow. Raises ValueError for no units, or numbers that are not finite.

    >>> str(t_interval([0.1, 0.3, 0.2]))
    '0.20 [-0.05, 0.45], n = 3'
    """
    from scipy.stats import t

    values = clean(values)
    n, mean = len(values), float(values.mean())
    half = float(t(n - 1).ppf(0.975) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return Interval(mean, mean - half, mean + half, n, df=n - 1)


def two_level(total, size, *, runs, groups, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of the runs' means with its interval, where runs (selections, say) and groups of samples (countries) both vary.

    A row is a cell: the sum `total` over `size` samples of one group in one run. Runs are drawn with replacement, and groups, each in all
    runs that have it, as runs ask partly the same questions (Owen 2007, the pigeonhole bootstrap). The interval is the mean
    +- t(0.975, runs - 1) sqrt(runs / (runs - 1)) sd of the draws: `t_interval` over runs, and wider where groups differ; percentiles are
    too narrow for few runs. n is the number of runs. With one run, groups alone are drawn, as in `bootstrap`.

    Raises ValueError for no cells, lengths that differ, or numbers that are not finite.

    >>> str(two_level([1, 3, 2], [10, 10, 10], runs=[0, 1, 2], groups=["a", "a", "a"]))
    '0.20 [-0.05, 0.45], n = 3'
    """
    from scipy.stats import t

    total, size = clean(total, "total"), clean(size, "size")
    if not len(total) == len(size) == len(runs) == len(groups) or (size <= 0).any():
        got = [len(x) for x in (total, size, runs, groups)]
        raise ValueError(f"expected a sum, a positive size, a run and a group for each cell, got {got}")
    run, group = (np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (runs, groups))
    shape, rng = (int(run.max()) + 1, int(group.max()) + 1), np.random.default_rng(seed)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (run, group), total)
    np.add.at(counts, (run, group), size)
    means = sums.sum(1) / counts.sum(1)
    drawn = rng.multinomial(shape[1], np.full(shape[1], 1 / shape[1]), n_boot) if shape[1] > 1 else np.ones((n_boot, 1))
    weight = rng.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), n_boot) * ((n := drawn @ counts.T) > 0)
    found = (weight * (drawn @ sums.T) / np.maximum(n, 1e-300)).sum(1)[(some := weight.sum(1) > 0)] / weight.sum(1)[some]
    value = float(means.mean())
    if len(means) == 1:
        low, high = np.quantile(found, [0.025, 0.975]).tolist() if shape[1] > 1 else (float("nan"),) * 2
        return Interval(value, low, high, int(size.sum()), shape[1])
    half = float(t(len(means) - 1).ppf(0.975) * found.std() * (len(means) / (len(means) - 1)) ** 0.5)
    return Interval(value, value - half, value + half, len(means), df=len(means) - 1)


def holm(p: Sequence[float]) -> list[float]:
    """Return p values corrected for asking several questions at once (Holm 1979); nan stays, and does not count as a question.

    >>> holm([0.01, 0.04, float("nan"), 0.03])
    [0.03, 0.06, nan, 0.06]
    """
    corrected, worst, asked = [float("nan")] * len(p), 0.0, [i for i, one in enumerate(p) if not np.isnan(one)]
    for rank, i in enumerate(sorted(asked, key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(asked) - rank)))
        corrected[i] = worst
    return corrected


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


def auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return each column's AUROC: the chance that a positive row exceeds a negative one, ties counting half (Mann and Whitney's U / pq).

    >>> auroc(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 0.0], [2.0, 1.0]])).tolist()
    [0.875, 0.25]
    """
    from scipy.stats import mannwhitneyu

    u = mannwhitneyu(positive, negative, method="asymptotic").statistic
    return u.astype(float) / (len(positive) * len(negative))

import numpy as np
import pytest
import scipy.stats

from steerkit.stats import Interval, bootstrap, holm, paired_difference, t_interval, two_level

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
def test_bootstrap_agrees_with_scipy(statistic):
    values = RNG.gamma(2.0, size=60)
    ours = bootstrap(values, statistic, n_boot=8000)
    theirs = scipy.stats.bootstrap(
        (values,), statistic, n_resamples=8000, method="percentile", rng=np.random.default_rng(1), vectorized=False
    )
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.value == pytest.approx(statistic(values))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_interval_of_the_mean_covers_the_truth_as_often_as_promised():
    hits = [3.0 in bootstrap(RNG.normal(3.0, 2.0, 40), n_boot=300, level=0.9, seed=i) for i in range(300)]
    assert 0.84 <= np.mean(hits) <= 0.95  # 0.9 promised; three standard errors of 300 trials, and a little small-n shortfall


def test_width_matches_the_normal_formula():
    values = RNG.normal(size=400)
    got = bootstrap(values, n_boot=4000)
    assert got.high - got.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.07)


def test_groups_widen_the_interval_by_the_design_effect():
    # 30 groups of 10 copies: the mean has the variance of 30 samples, not of 300
    centres = RNG.normal(size=30)
    values, groups = np.repeat(centres, 10), np.repeat(np.arange(30), 10)
    clustered, naive, reduced = (
        bootstrap(values, groups=groups, n_boot=4000),
        bootstrap(values, n_boot=4000),
        bootstrap(centres, n_boot=4000),
    )
    assert clustered.high - clustered.low == pytest.approx(reduced.high - reduced.low, rel=0.08)
    assert (clustered.high - clustered.low) / (naive.high - naive.low) == pytest.approx(np.sqrt(10), rel=0.12)
    assert (clustered.n, clustered.groups, naive.groups) == (300, 30, None)


def test_groups_of_unequal_size_and_text_labels():
    got = bootstrap([0.0, 0.0, 0.0, 1.0], groups=["a", "a", "a", "b"], n_boot=2000)
    assert (got.value, got.low, got.high) == (0.25, 0.0, 1.0)  # either group can be missing from a draw


def test_statistic_over_columns():
    rows = RNG.random((50, 2))
    got = bootstrap(rows, lambda r: 2 / (1 / r[:, 0].mean() + 1 / r[:, 1].mean()))
    assert got.value == pytest.approx(scipy.stats.hmean(rows.mean(axis=0)))
    assert got.low < got.value < got.high


def test_paired_difference_agrees_with_the_t_interval_and_beats_the_unpaired_one():
    base = RNG.normal(0, 5, 200)
    a, b = base + RNG.normal(0.5, 1, 200), base
    ours = paired_difference(a, b, n_boot=4000)
    t = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert ours.value == pytest.approx((a - b).mean())
    assert (ours.low, ours.high) == pytest.approx((t.low, t.high), abs=0.03)
    assert ours.excludes(0) and not ours.excludes(ours.value)


def test_t_interval_and_its_p_value_agree_with_scipy():
    for n in (2, 3, 9, 30):
        values = RNG.normal(0.4, 1.0, n)
        ours, theirs = t_interval(values), scipy.stats.ttest_1samp(values, 0.1)
        bounds = theirs.confidence_interval(0.95)
        assert (ours.value, ours.low, ours.high, ours.n) == pytest.approx((values.mean(), bounds.low, bounds.high, n))
        assert ours.p(0.1) == pytest.approx(theirs.pvalue) and (ours.p(0.1) < 0.05) == ours.excludes(0.1)
    assert t_interval(np.ones(4)).p() == 0.0 and np.isnan(t_interval([0.5]).p()) and "no interval" in str(t_interval([0.5]))


def test_p_value_of_a_skewed_interval_looks_at_the_side_of_the_null():
    skewed = Interval(1.0, 0.1, 4.0, 50)
    assert skewed.p() == pytest.approx(2 * scipy.stats.norm.sf(1.959964 * 1.0 / 0.9)) and skewed.p(5.0) < 0.05 < skewed.p(3.9)


def test_the_detectable_difference_is_found_four_times_in_five():
    truth = t_interval(np.random.default_rng(0).normal(0, 1, 20)).detectable
    rng = np.random.default_rng(1)
    draws = rng.normal(0, 1, (4000, 20))
    typical = np.mean([t_interval(row).detectable for row in draws[:500]])
    found = np.mean([t_interval(row + typical).excludes(0) for row in draws])
    assert 0.76 < found < 0.84 and truth == pytest.approx(typical, rel=0.4)


def test_holm_rejects_as_its_definition_does():
    p = [0.001, 0.04, 0.03, 0.2, 0.012]
    ordered, rejected = sorted(p), set()
    for rank, one in enumerate(ordered):  # step down: stop at the first that is not below alpha / (questions left)
        if one >= 0.05 / (len(p) - rank):
            break
        rejected.add(one)
    assert {one for one, q in zip(p, holm(p)) if q < 0.05} == rejected == {0.001, 0.012}
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_same_seed_same_interval_other_seed_other_interval():
    values = RNG.random(30)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_means_of_groups_are_those_of_the_rows_drawn():
    """The mean is computed from each group's sum; the long way draws the rows themselves."""
    values, groups = RNG.normal(0, 2.0, 60), RNG.integers(9, size=60)
    fast, slow = bootstrap(values, groups=groups, seed=3), bootstrap(values, lambda v: v.mean(), groups=groups, seed=3)
    assert (fast.value, fast.n, fast.groups) == (slow.value, slow.n, slow.groups)
    assert (fast.low, fast.high) == pytest.approx((slow.low, slow.high), abs=1e-12)


def test_one_independent_unit_has_no_interval():
    for got in (bootstrap([0.5]), bootstrap([0.4, 0.6], groups=["a", "a"])):
        assert got.value == 0.5 and np.isnan(got.low) and np.isnan(got.high)
        assert "no interval" in str(got)
        assert not got.excludes(0) and 0.5 not in got


def test_draws_without_a_value_are_left_out_while_they_are_rare():
    """A ratio of means that a draw of zeros only leaves undefined: once in 2^10 draws of ten, in every third of two."""

    def inverse(v):
        return 1 / v.mean() if v.any() else float("nan")

    rare, often = np.array([0.0, 1.0] * 5), np.array([0.0, 1.0])
    drawn = np.array([inverse(rare[rows]) for rows in np.random.default_rng(3).integers(10, size=(40_000, 10))])
    got = bootstrap(rare, inverse, n_boot=5000, seed=0)
    assert (got.low, got.high) == pytest.approx(tuple(np.nanquantile(drawn, [0.025, 0.975])), rel=1e-9)
    assert "no interval" in str(bootstrap(often, inverse, n_boot=500))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bootstrap([]), "at least one"),
        (lambda: bootstrap([1.0, float("nan")]), "1 of 2"),
        (lambda: bootstrap([1.0, 2.0], groups=["a"]), "group label"),
        (lambda: bootstrap([1.0, 2.0], level=95), "level"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "equal length"),
    ],
)
def test_errors_say_what_was_expected(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_text():
    assert str(Interval(0.42, 0.38, 0.46, 90)) == "0.42 [0.38, 0.46], n = 90"
    assert str(Interval(-0.012, -0.0203, -0.00386, 90)) == "-0.012 [-0.020, -0.004], n = 90"
    assert str(Interval(0.0004, 0.0, 1234.5, 90, 9)) == "0.0004 [0, 1.23e+03], n = 90 in 9 groups"


def cells(values, runs, groups):
    """Every run asks every group once."""
    return two_level(values.ravel(), np.ones(values.size), runs=np.repeat(runs, len(groups)), groups=np.tile(groups, len(runs)), n_boot=600)


def test_two_levels_cover_the_truth_whichever_level_varies():
    """Five runs over the same thirty groups: noise of runs, of groups that all runs share, and of cells. t over runs misses the second."""
    rng, hits, plain = np.random.default_rng(0), {}, []
    for name, sd in {"runs": (1.0, 0.0, 0.5), "groups": (0.0, 1.0, 0.5), "both": (0.5, 1.5, 0.5)}.items():
        found = []
        for _ in range(200):
            values = 2.0 + sd[0] * rng.normal(size=(5, 1)) + sd[1] * rng.normal(size=(1, 30)) + sd[2] * rng.normal(size=(5, 30))
            found.append(2.0 in cells(values, np.arange(5), np.arange(30)))
            plain += [2.0 in t_interval(values.mean(1))] if name == "groups" else []
        hits[name] = np.mean(found)
    assert min(hits.values()) > 0.92 and hits["runs"] < 0.985, hits  # 0.95 promised, three standard errors of 200 trials
    assert np.mean(plain) < 0.6, "runs that share their questions agree with each other, and not with the truth"


def test_two_levels_reduce_to_one_where_only_one_varies():
    rng = np.random.default_rng(1)
    by_run = rng.normal(size=6)
    flat = cells(np.tile(by_run[:, None], (1, 8)), np.arange(6), np.arange(8))
    exact = t_interval(by_run)
    assert (flat.value, flat.n, flat.df) == (pytest.approx(exact.value), 6, 5)
    assert flat.high - flat.low == pytest.approx(exact.high - exact.low, rel=0.08)  # 600 draws
    one = rng.normal(size=40)
    groups = np.repeat(np.arange(10), 4)
    sums = [one[groups == g].sum() for g in range(10)]
    ours, theirs = two_level(sums, [4] * 10, runs=[0] * 10, groups=range(10), n_boot=4000), bootstrap(one, groups=groups, n_boot=4000)
    assert (ours.value, ours.n, ours.groups, ours.df) == (pytest.approx(theirs.value), 40, 10, None)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.03), pytest.approx(theirs.high, abs=0.03))
    assert np.isnan(two_level([1.0], [2], runs=[0], groups=["a"]).low), "one run, one group: no interval"
    weighted = two_level([1.0, 9.0, 4.0], [1, 3, 4], runs=[0, 0, 1], groups=["a", "b", "a"])
    assert weighted.value == pytest.approx((10 / 4 + 1.0) / 2), "questions within a run weigh alike, and so do runs"
    for wrong in (([1.0], [0]), ([1.0, 2.0], [1])):
        with pytest.raises(ValueError, match="a positive size"):
            two_level(*wrong, runs=[0], groups=[0])

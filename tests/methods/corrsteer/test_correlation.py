"""Streaming statistics against numpy, scipy and scikit-learn, the published numbers, and nulls against order statistics."""

import numpy as np
import pytest
import torch
from scipy import integrate, sparse, stats
from sklearn.metrics import mutual_info_score

from steerkit.methods.corrsteer.correlation import EDGES, Correlation
from steerkit.methods.corrsteer.nulls import movable, permutation_null, permutations, strata


def sample(seed: int, n: int = 60, d: int = 7):
    """Sparse non-negative features with a dead one and an always-on one, and a 0/1 outcome with both values."""
    rng = np.random.default_rng(seed)
    z = rng.gamma(2.0, 3.0, (n, d)) * (rng.random((n, d)) < 0.4)
    z[:, 0], z[:, 1] = 0.0, 50.0 + rng.random(n)
    y = (rng.random(n) < 0.3).astype(int)
    y[:2] = 0, 1
    return z, y


def of(z, y, **options) -> Correlation:
    c = Correlation.empty(np.shape(z)[1], **options)
    c.update(z, y)
    return c


def everything(c: Correlation) -> np.ndarray:
    parts = [
        c.r(),
        c.coefficients(),
        c.coefficients(firing_only=True),
        c.caa(),
        c.fisher(),
        c.mutual_information(),
        c.fired_pos,
        c.fired_neg,
    ]
    return np.concatenate(parts)


@pytest.mark.parametrize("seed", range(10))
def test_equal_to_numpy_and_scipy_whatever_the_order_and_split(seed):
    rng = np.random.default_rng(seed)
    z, y = sample(seed)
    oracle = np.array([stats.pearsonr(z[:, i], y).statistic for i in range(1, 7)])
    for _ in range(5):
        order = rng.permutation(len(y))
        cuts = np.sort(rng.integers(0, len(y) + 1, rng.integers(0, 8)))  # also empty batches
        streamed = Correlation.empty(7)
        for rows in np.split(order, cuts):
            streamed.update(torch.tensor(z[rows]), y[rows])
        np.testing.assert_allclose(streamed.r()[1:], oracle, atol=1e-10, rtol=0)
        np.testing.assert_allclose(streamed.r()[1:], np.corrcoef(z[:, 1:].T, y)[-1, :-1], atol=1e-10, rtol=0)
        np.testing.assert_allclose(everything(streamed), everything(of(z, y)), atol=1e-10, rtol=1e-10)
        assert streamed.r()[0] == 0 and streamed.n == len(y)


def test_the_other_scores_equal_their_definitions():
    z, y = sample(3)
    steer = z * 0.5
    c = Correlation.empty(7)
    c.update(z, y, steer=steer)
    one, zero = steer[y == 1], steer[y == 0]
    np.testing.assert_allclose(c.coefficients(), one.mean(0))
    np.testing.assert_allclose(c.caa(), one.mean(0) - zero.mean(0))
    np.testing.assert_allclose(c.fisher(), (one**2).mean(0) / np.maximum((zero**2).mean(0), 1e-12))
    firing = [col[col > 0].mean() if (col > 0).any() else 0.0 for col in one.T]
    np.testing.assert_allclose(c.coefficients(firing_only=True), firing)
    rate = c.fired_pos / c.n_pos
    np.testing.assert_allclose(c.coefficients(), rate * c.coefficients(firing_only=True))  # card 5.5
    np.testing.assert_allclose(c.r(), of(z, y).r())  # the steer pooling does not feed r
    assert c.fired_pos[1] / c.n == y.mean() and c.fired.tolist() == (z > 0).sum(0).tolist()


def test_r_ignores_scale_flips_with_the_outcome_and_is_finite_for_a_constant_outcome():
    z, y = sample(1)
    r = of(z, y).r()
    np.testing.assert_allclose(of(7.5 * z, y).r(), r, atol=1e-12)
    np.testing.assert_allclose(of(z, 1 - y).r(), -r, atol=1e-12)
    assert of(z, np.ones(len(y))).r().tolist() == [0.0] * 7


def test_far_from_zero_r_keeps_its_digits():
    """Where raw power sums lose eight digits: a mean of 1e6 beside a spread of 1."""
    z, y = sample(2)
    np.testing.assert_allclose(of(z + 1e6, y).r()[1:], of(z, y).r()[1:], atol=1e-9)


def test_point_biserial_identity():
    """r = (m1 - m0) sqrt(p (1 - p)) / sd(z), so r > 0 exactly where successes have the larger mean."""
    z, y = sample(4)
    c, p = of(z, y), y.mean()
    np.testing.assert_allclose(c.r()[1:], (c.caa() * np.sqrt(p * (1 - p)))[1:] / z.std(0)[1:], atol=1e-12)
    assert ((c.r() > 0) == (c.caa() > 0)).all()


@pytest.mark.parametrize("positives,expected", [(51, 0.136992797387935), (7, 0.376990754)])
def test_a_feature_that_fires_once_on_a_success_has_the_published_r(positives, expected):
    """sqrt((1 - p) / (p (n - 1))) whatever its size: the smallest r in the published SimpleQA lists (n = 1,167)."""
    y = np.arange(1167) < positives
    z = np.zeros((1167, 3))
    z[0], z[1, 2] = (0.05, 40.0, 2.0), 2.0
    r = of(z, y).r()
    np.testing.assert_allclose(r[:2], expected, rtol=0, atol=1e-14 if positives == 51 else 5e-10)  # the digits given
    p = positives / 1167
    np.testing.assert_allclose(r[:2], np.sqrt((1 - p) / (p * 1166)), rtol=1e-13)
    if positives == 51:
        assert r[2] == pytest.approx(0.19382, abs=5e-6)  # two equal hits


def test_mutual_information_equals_scikit_learn_on_the_same_bins():
    z, y = sample(5, n=200)
    got = of(z, y).mutual_information()
    for i in range(7):
        assert got[i] == pytest.approx(mutual_info_score(y, np.searchsorted(EDGES["log"], z[:, i])), abs=1e-12)
    bits = of(y[:, None].astype(float), y).mutual_information()[0]
    assert bits == pytest.approx(stats.entropy([y.mean(), 1 - y.mean()]))  # a copy of the outcome tells all of it


def test_released_bins_are_those_that_torch_finds_in_the_unsorted_list():
    """Edges 10^(d + k/4) with 1.0 at the end, searched by bucketize as the released code does."""
    unsorted = torch.tensor([10 ** (d + k / 4) for d in range(-6, 1) for k in range(1, 4)] + [1.0])
    rng = np.random.default_rng(0)
    z = np.append(10 ** rng.uniform(-7, 2, (500, 3)) * (rng.random((500, 3)) < 0.7), rng.random((500, 1)) + 5, axis=1).astype(np.float32)
    y = rng.integers(0, 2, 500)
    place = torch.bucketize(torch.from_numpy(z), unsorted).numpy()
    got = of(z, y, edges="released").mutual_information()
    np.testing.assert_allclose(got, [mutual_info_score(y, place[:, i]) for i in range(4)], atol=1e-9)


def test_wrong_input_is_a_clear_error_and_changes_nothing():
    z, y = sample(0)
    c = of(z, y, edges=None)
    before = c.r()
    for bad in (lambda: c.update(z, y[:-1]), lambda: c.update(z[:, 1:], y), lambda: c.update(z, y, steer=z[1:])):
        with pytest.raises(ValueError, match="expected z and steer"):
            bad()
    with pytest.raises(ValueError, match="finite"):
        c.update(np.full_like(z, np.nan), y)
    with pytest.raises(ValueError, match=r"z: expected \[n, d\]"):
        c.update(z[0], y)
    with pytest.raises(ValueError, match="edges"):
        c.mutual_information()
    with pytest.raises(ValueError, match="ascending"):
        Correlation.empty(3, edges=[1.0, 0.5])
    with pytest.raises(ValueError, match="y > 0"):
        of(z, 0 * y).coefficients()
    assert c.r().tolist() == before.tolist()


def test_shufflings_keep_the_labels_and_blocks_keep_theirs():
    y = np.arange(20) % 3 == 0
    drawn = permutations(y, 50, seed=1)
    assert (drawn.sum(1) == y.sum()).all() and len(np.unique(drawn, axis=0)) > 40
    blocks = permutations(y, 50, seed=1, within=np.arange(20) // 8)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 20)):
        assert (blocks[:, rows].sum(1) == y[rows].sum()).all()
    assert len(np.unique(blocks, axis=0)) > 40


def test_the_labels_of_an_item_move_together():
    """Six facts in three wordings, in any order of rows: every fact gets the labels of one fact, in their order."""
    rng = np.random.default_rng(4)
    item = rng.permutation(np.repeat(list("abcdef"), 3))
    y = rng.integers(0, 2, 18)
    own = {name: tuple(y[item == name]) for name in "abcdef"}
    drawn = permutations(y, 300, seed=2, items=item)
    for row in drawn:
        assert sorted(tuple(row[item == name]) for name in "abcdef") == sorted(own.values())
    assert {tuple(row[item == "a"]) for row in drawn} == set(own.values())
    uneven = permutations(y, 300, seed=2, items=[*"aab", *"c" * 15])  # laid end to end
    assert (uneven.sum(1) == y.sum()).all() and {tuple(r[:3]) for r in uneven} >= {tuple(y[[0, 1, 2]]), tuple(y[3:6])}


def null(z, y, n, *, seed=0, within=None, items=None, **how):
    return permutation_null(z, y, permutations(y, n, seed=seed, within=within, items=items), **how)


def test_null_equals_one_selection_after_another_dense_or_sparse_in_batches_of_any_size():
    z, y = sample(6, n=90)
    labels = permutations(y, 20, seed=4)
    found = permutation_null(z, y, labels)
    by_hand = [of(z, some).r() for some in labels]
    np.testing.assert_allclose(found, [r.max() for r in by_hand], atol=1e-12)
    for other, batch in ((sparse.csr_array(z), 512), (torch.tensor(z), 7), (sparse.csr_array(z), 30)):
        np.testing.assert_allclose(permutation_null(other, y, labels, batch=batch), found, atol=1e-12)
    often = permutation_null(z, y, labels, min_fired=80)
    np.testing.assert_allclose(often, [r[1] for r in by_hand], atol=1e-12)  # only the always-on feature is left


def test_null_of_dense_noise_lies_where_order_statistics_put_it():
    """E[max] of d standard normals, over sqrt(n); for 16,384 of them near the card's 3.86."""

    def expected(d):
        return integrate.quad(lambda x: x * d * stats.norm.pdf(x) * stats.norm.cdf(x) ** (d - 1), -2, 9, limit=400)[0]

    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(400, 500)), rng.random(400) < 0.4
    found = null(z, y, 100)
    assert found.mean() == pytest.approx(expected(500) / np.sqrt(400), rel=0.03)
    assert of(z, y).r().max() < found.max() and np.quantile(found, 0.95) > found.mean()
    assert expected(16_384) == pytest.approx(3.86, rel=0.04)
    z[:, 3] += 2.0 * y
    assert of(z, y).r().max() > null(z, y, 100).max()


def test_shuffling_within_batches_is_the_weaker_null():
    """Where success and a feature drift together along the run, batches keep what a whole shuffling takes away."""
    rng = np.random.default_rng(1)
    drift = np.repeat(np.arange(20) % 2, 8)
    y = rng.random(160) < 0.1 + 0.8 * drift
    z = drift[:, None] * 3.0 + rng.random((160, 5))
    assert null(z, y, 50).max() < 0.5 < null(z, y, 50, within=np.arange(160) // 8).min()


def test_a_feature_that_tells_easy_kinds_from_hard_ones_is_not_above_the_null_within_kinds():
    rng = np.random.default_rng(2)
    kind = rng.permutation(np.repeat(["easy", "hard", "middling"], 60))
    y = rng.random(180) < np.select([kind == "easy", kind == "hard"], [0.9, 0.1], 0.5)
    drawn = permutations(y, 40, within=kind, seed=3)
    for k in np.unique(kind):
        assert (drawn[:, kind == k].sum(1) == y[kind == k].sum()).all() and len(np.unique(drawn[:, kind == k], axis=0)) > 30
    z = np.stack([3.0 * (kind == "easy") + rng.random(180), rng.random(180)], 1)
    assert np.quantile(null(z, y, 200), 0.99) < of(z, y).r().max() < np.quantile(null(z, y, 200, within=kind), 0.95)
    z[:, 1] += 2.0 * y  # one that knows which answers are right, whatever the kind
    assert of(z, y).r().max() > np.quantile(null(z, y, 200, within=kind), 0.99)
    with pytest.raises(ValueError, match="within: expected one for each of 180 samples, got 5"):
        permutations(y, 2, within=kind[:5])


def false_alarms(how, runs=60):
    """How often the best feature lies above the floor where no feature knows which answers are right."""
    found = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        answer = np.repeat(rng.integers(0, 4, 60), 4)  # sixty facts in four wordings; four answers
        item, easy = np.repeat(np.arange(60), 4), np.array([0.9, 0.6, 0.4, 0.1])
        y = np.repeat(rng.random(60) < (easy[answer[::4]] if how == "answers" else 0.5), 4)  # all wordings of a fact alike
        z = np.repeat(rng.random((60, 40)) < 0.5, 4, axis=0) * 1.0  # what a feature sees is the fact
        z = np.column_stack([z, *(answer == a for a in range(4))]) * 1.0
        kept = {"samples": {}, "items": {"items": item}, "answers": {"items": item, "within": answer}}
        r = of(z, y).r().max()
        found.append([r > np.quantile(null(z, y, 100, **kept[name]), 0.95) + 1e-9 for name in ("samples", "items", "answers")])
    return dict(zip(("samples", "items", "answers"), np.mean(found, axis=0)))


def test_only_shuffling_whole_facts_within_answers_keeps_its_promise():
    """One question in twenty, the floor says. Single wordings break it, and so does an answer that is easy to get right."""
    alike, easy = false_alarms("items"), false_alarms("answers")
    assert alike["samples"] > 0.5 and alike["items"] <= 0.15, alike
    assert easy["items"] > 0.5 and easy["answers"] <= 0.15, easy


def test_strata_are_kind_and_answer_where_items_share_it_and_labels_that_cannot_move_are_marked():
    kinds = ["continent"] * 4 + ["capital"] * 3
    said = ["Europe", "Europe", "Europe", "Asia", "Paris", "Paris", "Rome"]
    items = ["FR-continent", "FR-continent", "IT-continent", "JP-continent", "FR-capital", "FR-capital", "IT-capital"]
    found = strata(kinds, said, items)
    assert found == [("continent", "Europe")] * 3 + [("continent", None)] + [("capital", None)] * 3
    y = np.array([1, 1, 0, 1, 1, 1, 1])  # all capitals are right: nothing there can move, nor where one item is alone
    labels = permutations(y, 200, within=found, items=items)
    assert movable(y, labels).tolist() == [True, False, True] + [False] * 4


def test_null_needs_one_row_an_outcome():
    z, y = sample(0)
    labels = permutations(y, 3)
    for rows, some in ((z[:-1], labels), (np.append(z, z, 0), labels), (z, labels[:, 1:])):
        with pytest.raises(ValueError, match="one row of z"):
            permutation_null(rows, y, some)
    with pytest.raises(ValueError, match="min_fired"):
        permutation_null(z, y, labels, min_fired=1000)

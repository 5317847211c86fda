"""The approximator and the vectors aimed through it: the algebra of SAE-TS eq. 3 and FGAA eq. 5, on random tensors."""

import math

import numpy as np
import pytest
import tiny
import torch

from steerkit.methods.sae_ts.approximator import (
    Approximator,
    agreement,
    aim,
    budget,
    fit_adam,
    fit_ridge,
    minus_Mb,
    pseudo_inverse,
    rotated,
    rotation,
    split_half,
    target,
    unit,
)
from steerkit.vectors import SteeringVector


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def at():
    return tiny.lab(saes={}).at(1)


@pytest.fixture
def some():
    return Approximator(normal(16, 40), normal(40, seed=1))


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_one_feature_gives_equation_3_and_norm_one(some, at):
    column, shared = some.M[:, 7].double(), (some.M.double() @ some.b.double())
    s = column / column.norm() - shared / shared.norm()
    got = aim(some, at, 7)
    assert (got.layer, got.preset, got.made["target"]) == (1, "tiny", {"7": 1.0})
    torch.testing.assert_close(got.direction.double(), s / s.norm(), rtol=1e-5, atol=1e-6)
    assert got.direction.norm().item() == pytest.approx(1, abs=1e-6)
    c = cosine(column, shared)
    assert cosine(got.direction, column) == pytest.approx(math.sqrt((1 - c) / 2), abs=1e-5)
    assert cosine(got.direction, shared) == pytest.approx(-math.sqrt((1 - c) / 2), abs=1e-5)
    assert s.norm().item() == pytest.approx(math.sqrt(2 - 2 * c), abs=1e-6)


def test_strength_zero_is_the_column_and_scale_never_matters(some, at):
    torch.testing.assert_close(aim(some, at, 3, strength=0.0).direction, unit(some.M[:, 3]))
    one = aim(some, at, 3)
    for other in (aim(some, at, 7 * target(3, 40)), aim(Approximator(some.M, 5 * some.b), at, 3)):
        assert one.cosine(other) == pytest.approx(1, abs=1e-6)
    flipped = unit(unit(some.M[:, 3]) + unit(some.Mb))
    torch.testing.assert_close(aim(Approximator(some.M, -some.b), at, 3).direction, flipped)


def test_orthogonal_targets_share_a_cosine_of_one_half(at):
    """Both contain -Mb: columns orthogonal to each other and to Mb give 0.5 whatever the features mean."""
    M = torch.zeros(5, 3)
    M[0, 0], M[1, 1], M[2, 2] = 2.0, 3.0, 4.0
    flat = Approximator(M, torch.tensor([0.0, 0.0, 1.0]))
    assert aim(flat, at, 0).cosine(aim(flat, at, 1)) == pytest.approx(0.5, abs=1e-6)
    mixed = aim(flat, at, {0: 0.6 / 2, 1: 0.4 / 3})  # columns of norm 1 after the weights
    assert mixed.cosine(aim(flat, at, 0)) == pytest.approx((0.6 / math.sqrt(0.52) + 1) / 2, abs=1e-6)
    assert round((0.6 / math.sqrt(0.52) + 1) / 2, 3) == 0.916


def test_no_bias_leaves_the_column_and_raw_columns_are_summed(at):
    M = torch.eye(3)
    M[0, 0] = 10.0
    none = Approximator(M, torch.zeros(3))
    torch.testing.assert_close(aim(none, at, 1).direction, torch.tensor([0.0, 1.0, 0.0]))
    both = aim(none, at, {0: 0.5, 1: 0.5}).direction
    torch.testing.assert_close(both, unit(torch.tensor([10.0, 1.0, 0.0])))


def test_bad_targets_are_clear_errors(some, at):
    for feature in (40, -1):
        with pytest.raises(ValueError, match="0 to 39"):
            aim(some, at, feature)
    with pytest.raises(ValueError, match=r"each of 40 features, got shape \[8\]"):
        pseudo_inverse(some, at, target(4, 8))
    with pytest.raises(ValueError, match="zero vector"):
        aim(Approximator(some.M, torch.zeros(40)), at, torch.zeros(40))


def test_ridge_recovers_a_planted_map_and_adam_comes_close():
    M, b = normal(12, 30, seed=2), normal(30, seed=3)
    x = torch.nn.functional.normalize(normal(600, 12, seed=4), dim=1)
    ridge, table = fit_ridge(x, x @ M + b)
    assert (ridge.M - M).abs().max() < 0.01 and table.r2.max() > 0.9999
    exact, _ = fit_ridge(x, x @ M + b, penalties=(1e-10,))
    assert (exact.M - M).abs().max() < 1e-5 and (exact.b - b).abs().max() < 1e-5
    adam = fit_adam(x, x @ M + b, lr=0.05, steps=400)
    assert torch.nn.functional.cosine_similarity(adam.M, M, dim=0).min() > 0.99


def test_ridge_is_scikit_learns():
    from sklearn.linear_model import Ridge

    x, y = normal(80, 6, seed=5), normal(80, 4, seed=6)
    ours, _ = fit_ridge(x, y, penalties=(3.0,))
    theirs = Ridge(alpha=3.0).fit(x.double().numpy(), y.double().numpy())
    torch.testing.assert_close(ours.M.double(), torch.tensor(theirs.coef_.T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.b.double(), torch.tensor(theirs.intercept_), rtol=1e-4, atol=1e-5)


def test_each_feature_has_the_penalty_that_scikit_learn_foresees_it_best_with():
    from sklearn.linear_model import Ridge

    x = torch.nn.functional.normalize(normal(60, 20, seed=7), dim=1)
    noise = torch.tensor([0.01, 0.01, 1.0, 3.0])
    y, penalties = x @ normal(20, 4, seed=8) + noise * normal(60, 4, seed=9) + 5, (1e-3, 0.1, 10.0)
    ours, table = fit_ridge(x, y, penalties=penalties, folds=3, seed=1)
    error = np.zeros((3, 4))
    for held in torch.randperm(60, generator=torch.Generator().manual_seed(1)).chunk(3):
        seen = np.setdiff1d(np.arange(60), held)
        for i, penalty in enumerate(penalties):
            error[i] += ((Ridge(alpha=penalty).fit(x[seen], y[seen]).predict(x[held]) - y[held].numpy()) ** 2).sum(0)
    best = error.argmin(0)
    assert best[0] < best[3] and table.features.tolist() == np.bincount(best, minlength=3).tolist()
    for j, i in enumerate(best):
        theirs = Ridge(alpha=penalties[i]).fit(x.double().numpy(), y[:, j].double().numpy())
        np.testing.assert_allclose(ours.M[:, j], theirs.coef_, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(ours.b[j], theirs.intercept_, rtol=1e-4)
    centre = np.concatenate(
        [y[h] - y[np.setdiff1d(np.arange(60), h)].mean(0) for h in torch.randperm(60, generator=torch.Generator().manual_seed(1)).chunk(3)]
    )
    np.testing.assert_allclose(table.r2, 1 - error.sum(1) / (centre**2).sum(), rtol=1e-4, atol=1e-6)


def test_a_noisy_feature_beside_a_strong_one_keeps_its_direction():
    x = normal(400, 30, seed=10) * torch.logspace(0, -2, 30)  # some directions are rarely seen, as with decoder rows
    M = normal(30, 2, seed=11)
    y = x @ M * torch.tensor([100.0, 1.0]) + normal(400, 2, seed=12)
    own, one = fit_ridge(x, y)[0].M, fit_ridge(x, y, penalties=(float(fit_ridge(x, y)[1].r2.idxmax()),))[0].M
    near = [torch.nn.functional.cosine_similarity(found[:, 1], M[:, 1], dim=0) for found in (own, one)]
    assert near[0] > near[1] + 0.1


def test_pseudo_inverse_inverts_where_it_can_and_is_least_squares_elsewhere(some, at):
    square = Approximator(normal(20, 8, seed=1), normal(8, seed=2))
    t = target({2: 3.0, 5: 4.0}, 8)
    v = pseudo_inverse(square, at, t)
    torch.testing.assert_close(square(v.direction * v.weight), t / 5, rtol=1e-4, atol=1e-5)
    v = pseudo_inverse(some, at, 4)
    wanted = target(4, 40).double() - some.b.double()
    oracle = wanted @ torch.linalg.pinv(some.M.double())
    torch.testing.assert_close((v.direction * v.weight).double(), oracle, rtol=1e-4, atol=1e-5)
    assert v.edit(2.0).scale == pytest.approx(2 * oracle.norm().item(), rel=1e-5)


def test_rotation_has_the_right_orientation_and_the_published_one_is_its_inverse(at):
    Q = torch.linalg.qr(normal(16, 16, seed=3)).Q
    D = torch.nn.functional.normalize(normal(200, 16, seed=4), dim=1)
    planted = Approximator(Q @ D.T * 7, normal(200, seed=5))
    R = rotation(planted, D)
    torch.testing.assert_close(R @ R.T, torch.eye(16), rtol=1e-5, atol=1e-5)
    right = torch.stack([unit(R @ d) @ unit(m) for d, m in zip(D, planted.M.T)])
    wrong = torch.stack([unit(rotation(planted, D, published=True) @ d) @ unit(m) for d, m in zip(D, planted.M.T)])
    assert right.min() > 0.999 and wrong.mean().abs() < 0.2
    row = SteeringVector("row", D[9], 1, "none")
    torch.testing.assert_close(rotated(planted, R, row).direction, aim(planted, at, 9).direction, rtol=1e-4, atol=1e-5)


def test_minus_Mb_is_the_negative_shared_direction(some, at):
    assert cosine(minus_Mb(some, at).direction, some.M.double() @ some.b.double()) == pytest.approx(-1, abs=1e-6)


def test_agreement_is_one_for_the_truth_zero_for_the_mean():
    y, centre = normal(50, 9, seed=1), normal(9, seed=2)
    perfect = agreement(y, y, centre)
    assert perfect["r2"] == 1 and perfect["cosine"].min() == pytest.approx(1)
    mean = agreement(centre.expand_as(y), y, centre)
    assert mean["r2"] == 0 and not mean["cosine"].any()
    half = agreement(centre + (y - centre) / 2, y, centre)
    assert half["r2"] == pytest.approx(0.75) and half["cosine"].min() == pytest.approx(1)


def test_split_halves_agree_as_far_as_noise_lets_them():
    """Columns of signal s and noise e: E cosine = s^2 / (s^2 + e^2), e^2 from least squares on half of the vectors."""
    x, M = normal(4000, 8, seed=1), torch.zeros(8, 3)
    M[:, 1:] = torch.nn.functional.normalize(normal(8, 2, seed=2), dim=0)
    noise = torch.tensor([1.0, 15.8, 0.1])
    y = x @ M + noise * normal(4000, 3, seed=3)
    many = torch.stack([split_half(x, x @ M + noise * normal(4000, 3, seed=s), penalties=(1e-6,)) for s in range(10, 40)])
    expected = [1 / (1 + 8 * float(e) ** 2 / 2000) for e in noise[1:]]
    assert many.mean(0).tolist() == pytest.approx([0.0, *expected], abs=0.12)
    assert split_half(x, y, penalties=(1e-6,))[2] > 0.99


def test_a_budget_buys_more_with_more_vectors_when_noise_is_small():
    M = normal(8, 30, seed=1)
    x = torch.nn.functional.normalize(normal(80, 8, seed=2), dim=1)
    y = x @ M + 0.2 * normal(80, 30, seed=3)
    x_new = torch.nn.functional.normalize(normal(20, 8, seed=4), dim=1)
    table = budget(x, y, x_new, x_new @ M, halvings=3, targets=[3, 7])
    assert table.vectors.tolist() == [10, 20, 40, 80] and table.rollouts.tolist() == [140, 280, 560, 1120]
    first, last, halves = table.iloc[0], table.iloc[-1], split_half(x, y)
    assert last.cosine > first.cosine and last.cosine > 0.95
    assert last.split_half == pytest.approx(float(halves.median())) and last.split_half > first.split_half
    assert last.split_half_targets == pytest.approx(float(halves[[3, 7]].median()))

"""Selection against sorting by hand, steering on tiny random models, side effects against the published ratios."""

import numpy as np
import pytest
import tiny
import torch

from steerkit.engine.generate import BASELINE, Arm, Sampling, generate
from steerkit.engine.steer import residual_blocks, steering
from steerkit.features import residuals
from steerkit.methods.corrsteer.correlation import Correlation
from steerkit.methods.corrsteer.pooling import Raw, Reading
from steerkit.methods.corrsteer.select import Pick, edits, random_features, rank, select
from steerkit.store import Work

D = tiny.D_MODEL


def stats(seed: int, n: int = 80, d: int = 30):
    rng = np.random.default_rng(seed)
    z = rng.gamma(2.0, 1.0, (n, d)) * (rng.random((n, d)) < rng.random(d))
    y = (z[:, seed % d] + rng.normal(0, 1, n) > 1.0).astype(int)
    c = Correlation.empty(d)
    c.update(z, y)
    return c, z, y


LAYERS = {layer: stats(layer)[0] for layer in (2, 5, 9)}


def test_rank_is_the_sorted_list_of_positively_correlated_features():
    c, z, y = stats(5)
    r = np.array([np.corrcoef(x, y)[0, 1] for x in z.T])
    best = rank(c, 5, k=1000)
    assert [p.feature for p in best] == [i for i in np.argsort(-r) if r[i] > 0]
    for p in best:
        assert p.coefficient == pytest.approx(z[y == 1, p.feature].mean()) and p.coefficient > z[y == 0, p.feature].mean()
        assert p.r == p.score == pytest.approx(r[p.feature])
        assert (p.fired_pos, p.fired_neg) == ((z[y == 1, p.feature] > 0).sum(), (z[y == 0, p.feature] > 0).sum())
    assert best[0].feature == 5 and rank(c, 5, k=3) == best[:3]  # 5 was planted
    worst = rank(c, 5, negative=True)[0]
    assert worst.feature == r.argmin() and worst.coefficient == pytest.approx(-z[y == 1, worst.feature].mean())


def test_rivals_rank_within_positive_r_and_coefficients_have_their_names():
    c, z, y = stats(9)
    up = np.flatnonzero(c.r() > 0)
    for score, values in {"fisher": c.fisher(), "mi": c.mutual_information(), "caa": np.abs(c.caa())}.items():
        assert rank(c, 9, score=score)[0].feature == up[values[up].argmax()]
    p = rank(c, 9, score="caa", coefficient="difference")[0]
    assert p.coefficient == pytest.approx(z[y == 1, p.feature].mean() - z[y == 0, p.feature].mean())
    p = rank(c, 9, coefficient="firing")[0]
    column = z[y == 1, p.feature]
    assert p.coefficient == pytest.approx(column[column > 0].mean())
    with pytest.raises(ValueError, match="score"):
        rank(c, 9, score="auroc")
    with pytest.raises(ValueError, match="coefficient"):
        rank(c, 9, coefficient="median")


def test_min_fired_passes_over_the_feature_that_fires_once():
    z, y = np.zeros((40, 2)), np.arange(40) < 3
    z[0, 0], z[:3, 1], z[10:16, 1] = 9.0, 1.0, 1.0
    c = Correlation.empty(2)
    c.update(z, y)
    assert [p.feature for p in rank(c, 1)] == [0, 1] and [p.feature for p in rank(c, 1, min_fired=2)] == [1]


def test_a_takes_every_layer_s_the_best_of_them_and_p_what_validation_keeps():
    a = select(LAYERS)
    assert [p.layer for p in a] == [2, 5, 9] and a == [rank(c, layer)[0] for layer, c in LAYERS.items()]
    assert select(LAYERS, variant="S") == [max(a, key=lambda p: p.r)]
    asked, value = [], {None: 0.5, 2: 0.5, 5: 0.6, 9: 0.4}

    def validate(choices):
        asked.append([[p.layer for p in picks] for picks in choices])
        return [value[picks[0].layer if picks else None] for picks in choices]

    assert select(LAYERS, variant="P", validate=validate) == [a[1]]  # equal to the baseline is not enough
    assert asked == [[[], [2], [5], [9]]]  # once, for all
    assert select(LAYERS, variant="P", validate=lambda choices: [0.0] * len(choices)) == []
    for wrong in ({"variant": "P"}, {"variant": "A", "validate": validate}, {"variant": "B"}):
        with pytest.raises(ValueError, match=r"validate|variant"):
            select(LAYERS, **wrong)


def test_without_successes_nothing_is_chosen():
    c = Correlation.empty(3)
    c.update(np.ones((4, 3)) * np.arange(4)[:, None], np.zeros(4))
    assert select({1: c}) == [] == select({1: c}, negative=True) == random_features({1: c})


def test_random_features_are_drawn_among_positive_r_and_can_match_a_selection():
    seen = set()
    for seed in range(300):
        for p in random_features(LAYERS, seed=seed):
            c = LAYERS[p.layer]
            assert p.r > 0 and p.coefficient == pytest.approx(c.coefficients()[p.feature])
            seen.add((p.layer, p.feature))
    assert seen == {(layer, i) for layer, c in LAYERS.items() for i in np.flatnonzero(c.r() > 0)}  # all of them, in time
    a = select(LAYERS)[:2]
    for seed in range(60):
        drawn = random_features(LAYERS, seed=seed, match=a)
        assert [(p.layer, p.coefficient) for p in drawn] == [(p.layer, p.coefficient) for p in a]
        assert all(p.feature != q.feature for p, q in zip(drawn, a))
    assert random_features(LAYERS, seed=3) == random_features(LAYERS, seed=3)


def pick(layer, feature, coefficient):
    return Pick(layer, feature, coefficient, 0.5, 0.5, 3, 1)


IDS = torch.tensor([[1, 40, 50, 60]])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_zero_coefficient_is_bit_identical_and_another_moves_only_the_last_position(kind):
    """By exactly c W_dec[i]; keys and values of earlier positions stay what they were."""
    model, sae = tiny.model(kind), tiny.planted_sae()
    plain = model(input_ids=IDS, use_cache=True)
    with steering(model, edits([pick(1, 5, 0.0)], Reading({1: sae}, "post")), window="last"):
        assert torch.equal(model(input_ids=IDS).logits, plain.logits)
    with steering(model, edits([pick(1, 5, 3.0)], Reading({1: sae}, "post")), window="last"):
        steered = model(input_ids=IDS, use_cache=True)
        moved = residuals(model, IDS, layers=[1])[1]
    before = residuals(model, IDS, layers=[1])[1]
    assert torch.equal(moved[:, :-1], before[:, :-1])
    torch.testing.assert_close(moved[:, -1], before[:, -1] + 3.0 * sae.W_dec[5], rtol=0, atol=0)
    for a, b in zip(plain.past_key_values.layers, steered.past_key_values.layers):
        assert torch.equal(a.keys[:, :, :-1], b.keys[:, :, :-1]) and torch.equal(a.values[:, :, :-1], b.values[:, :, :-1])
    assert not torch.equal(plain.logits[:, -1], steered.logits[:, -1])


def test_two_layers_compose():
    """The second layer's input holds what the first added: not the sum of two runs."""
    model, saes = tiny.model("llama"), {1: tiny.planted_sae(), 2: tiny.planted_sae()}

    def deep(*picks):
        with steering(model, edits(picks, Reading(saes, "post")), window="last"):
            return residuals(model, IDS, layers=[2])[2][:, -1]

    first, second = pick(1, 5, 30.0), pick(2, 7, 20.0)
    none, both = deep(), deep(first, second)
    torch.testing.assert_close(both, deep(first) + 20.0 * saes[2].W_dec[7], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(deep(first) - none, 30.0 * saes[1].W_dec[5].expand(1, -1), atol=1e-2)


def test_the_released_site_adds_to_what_enters_the_block():
    model, sae, seen = tiny.model("llama"), tiny.planted_sae(), []
    block = residual_blocks(model)[2]
    handle = block.register_forward_pre_hook(lambda _m, args, kw: seen.append((args or (kw["hidden_states"],))[0]), with_kwargs=True)
    model(input_ids=IDS)
    with steering(model, edits([pick(2, 5, 1.5)], Reading({2: sae})), window="last"):
        model(input_ids=IDS)
    handle.remove()
    torch.testing.assert_close(seen[1][:, -1], seen[0][:, -1] + 1.5 * sae.W_dec[5])
    assert torch.equal(seen[1][:, :-1], seen[0][:, :-1])
    with pytest.raises(ValueError, match="site"):
        edits([pick(0, 5, 3.0)], Reading({0: sae}))


def test_picks_steer_generation_and_raw_picks_steer_coordinates():
    lab = tiny.lab()
    at = Reading(lab.saes)
    arms = [
        BASELINE,
        Arm("zero", edits([pick(1, 5, 0.0)], at)),
        Arm("sae", edits([pick(1, 5, 40.0)], at)),
        Arm("raw", edits([pick(1, 5, 40.0)], Reading({1: Raw(D)}))),
        Arm("twice", edits([pick(1, 5, 80.0)], at)),
    ]
    sampling = Sampling(temperature=0.0, max_new_tokens=8)
    frame = generate(lab, ["I think"], arms, sampling=sampling, window="last", work=Work(progress=False))
    tokens = dict(zip(frame.arm, frame.tokens))
    assert tokens["zero"] == tokens["baseline"] != tokens["sae"] == tokens["raw"]  # feature 5 is coordinate 5
    assert frame.changed.tolist() == [0, 0, 8, 8, 8]
    sae, twice = (generate(lab, ["a"], [one], sampling=Sampling(max_new_tokens=1), window="last").ratio[0] for one in (arms[2], arms[4]))
    assert twice == pytest.approx(2 * sae)

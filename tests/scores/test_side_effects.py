"""What else a method moves: by features planted in texts, and by curves whose crossing is known."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.features import feature_means
from steerkit.scores import side_effects as S


def arms(texts):
    """Rows of a sweep from {(method, scale): [text, ...]}."""
    rows = [("t", "p", m, float(s), i, text) for (m, s), mine in texts.items() for i, text in enumerate(mine)]
    return pd.DataFrame(rows, columns=["topic", "prompt", "method", "scale", "sample", "text"])


def test_target_and_others_are_those_of_the_texts_halves():
    at, own = tiny.lab().at(1), 5
    texts = arms({("baseline", 0): ["abc", "bca", "cab", "acb"], ("CAA", 10): ["xyz", "yzx", "zxy", "xzy"]})
    (row,) = S.side_effects(at, texts, {"t": own})[lambda t: t.method == "CAA"].to_dict("records")
    means = feature_means(at, ["p" + t for t in texts.text]).double()
    even, odd = means[[4, 6]].mean(0) - means[[0, 2]].mean(0), means[[5, 7]].mean(0) - means[[1, 3]].mean(0)
    assert row["target"] == pytest.approx(float((even[own] + odd[own]) / 2))
    even[own] = odd[own] = 0
    assert row["other"] == pytest.approx(float((even @ odd).clamp_min(0).sqrt()), abs=1e-6) and row["n"] == 4


def test_the_size_of_side_effects_is_not_that_of_their_noise(monkeypatch):
    """Two features move by 3 and 4, all by chance by 1: |y| of the mean is 5, and with the noise of 1,000 features it would be 12."""
    rng = np.random.default_rng(0)

    def noisy(at, texts, **_):
        y = torch.tensor(rng.normal(size=(len(texts), 1000)))
        moved = torch.tensor([float("steered" in t) for t in texts])
        return y + moved[:, None] * torch.tensor([3.0, 4.0, *[0.0] * 998])

    monkeypatch.setattr(S, "feature_means", noisy)
    at = tiny.lab().at(1)
    texts = arms({("baseline", 0): ["plain"] * 16, ("CAA", 10): ["steered"] * 16})
    found = S.side_effects(at, texts, {"t": 999}).set_index("method")
    assert found.other["CAA"] == pytest.approx(5.0, abs=1.0) and abs(found.target["CAA"]) < 1.5


def test_an_arm_without_two_halves_or_a_base_is_an_error():
    at = tiny.lab().at(1)
    with pytest.raises(ValueError, match="t: expected unsteered texts and two samples an arm, got no unsteered"):
        S.side_effects(at, arms({("CAA", 10): ["a", "b"]}), {"t": 0})
    with pytest.raises(ValueError, match=r"one sample of \('CAA', 10.0\)"):
        S.side_effects(at, arms({("baseline", 0): ["a", "b"], ("CAA", 10): ["a"]}), {"t": 0})


def curve(topic, method, behaviour, cost):
    return pd.DataFrame({"topic": topic, "method": method, "scale": [0.0, 10.0, 20.0], "behaviour": behaviour, "cost": cost})


def test_methods_are_compared_where_they_steer_equally_much():
    """Equal: at half of the smaller gain, 0.2 on two topics, where a pays 1 and 2, b 4 and 4; the third has no such point."""
    parts = [curve("one", "a", [0.0, 0.2, 0.4], [0, 1, 9]), curve("one", "b", [0.0, 0.1, 0.8], [0.0, 3.0, 10.0])]
    parts += [curve("two", "a", [0.0, 0.1, 0.4], [1.0, 1.0, 4.0]), curve("two", "b", [0.0, 0.4, 0.4], [2.0, 6.0, 9.0])]
    parts += [curve("none", "a", [0.0, 0.9, 0.9], [0, 1, 2]), curve("none", "b", [0.0, 0.01, 0.02], [0, 1, 2])]
    found, by_topic = S.at_equal_behaviour(pd.concat(parts), "a", "b", "cost")
    assert by_topic.index.tolist() == ["one", "two"] and by_topic.level.tolist() == pytest.approx([0.2, 0.2])
    assert by_topic.a.tolist() == pytest.approx([1.0, 2.0]) and by_topic.b.tolist() == pytest.approx([4.0, 4.0])
    assert found.value == pytest.approx(-2.5) and found.n == 2
    assert S.at_equal_behaviour(pd.concat(parts[:2]), "a", "b", "cost")[0] is None
    assert np.isnan(S.at_level(np.arange(3), np.array([0, 0.1, 0.2]), np.arange(3), 0.5))

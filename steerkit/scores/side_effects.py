"""What else a method moves: the features of the texts that it causes, its target and all others apart (SAE-TS section 4.1)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from steerkit.engine.generate import BASELINE
from steerkit.engine.lab import Place
from steerkit.engine.memory import at_once
from steerkit.features import feature_means
from steerkit.stats import Interval, t_interval


def side_effects(at: Place, texts: pd.DataFrame, targets: Mapping[str, int], *, batch_size: int | None = None) -> pd.DataFrame:
    """Return a row for each topic, prompt, method and scale: what became of the topic's target feature, and of all other features.

    texts: those of a sweep (`bcs.sweep`), read with steering off. y = mean activations of an arm's texts minus those of unsteered
    ones. target: y_j of the target j. other: the size |y| without j, estimated as sqrt(max(0, y_even . y_odd)) from the two halves of
    the samples, whose noise is independent: the size of one noisy y would grow with its noise. Both in activation units.
    64 texts are read together (`at_once`).

    Raises ValueError for a topic without unsteered texts, or an arm with fewer than two samples.

    >>> side_effects(lab.at(13), bcs.sweep(lab, made), {"love": 2066})    # doctest: +SKIP
    """
    rows, size = [], batch_size or at_once(64, at.model.device)
    for (topic, prompt), part in texts[texts.topic.isin(targets)].groupby(["topic", "prompt"]):
        means = feature_means(at, (part.prompt + part.text).tolist(), batch_size=size).double().numpy()
        odd = (part["sample"] % 2).to_numpy().astype(bool)
        arms = part.groupby(["method", "scale"]).indices
        if (BASELINE.name, 0.0) not in arms or (few := [arm for arm, rows_ in arms.items() if odd[rows_].all() or not odd[rows_].any()]):
            got = "no unsteered texts" if (BASELINE.name, 0.0) not in arms else f"one sample of {few[0]}"
            raise ValueError(f"{topic}: expected unsteered texts and two samples an arm, got {got}: sweep with scale 0 and more samples")
        plain = arms[BASELINE.name, 0.0]
        for (method, scale), mine in arms.items():
            even_y, odd_y = (means[mine[odd[mine] == half]].mean(0) - means[plain[odd[plain] == half]].mean(0) for half in (False, True))
            own = targets[topic]
            product = float(even_y @ odd_y - even_y[own] * odd_y[own])
            rows.append([topic, prompt, method, scale, float(even_y[own] + odd_y[own]) / 2, max(0.0, product) ** 0.5, len(mine)])
    return pd.DataFrame(rows, columns=["topic", "prompt", "method", "scale", "target", "other", "n"])


def at_level(scale: np.ndarray, behaviour: np.ndarray, value: np.ndarray, level: float) -> float:
    """Return `value` where behaviour first reaches `level` on the way up the scales, on straight lines between them; nan if it never does.

    >>> at_level(np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.2, 0.6]), np.array([0.0, 1.0, 3.0]), 0.4)
    2.0
    """
    order = np.argsort(scale)
    behaviour, value = np.asarray(behaviour, dtype=float)[order], np.asarray(value, dtype=float)[order]
    above = np.flatnonzero(behaviour >= level)
    if not len(above):
        return float("nan")
    if (k := above[0]) == 0:
        return float(value[0])
    share = (level - behaviour[k - 1]) / (behaviour[k] - behaviour[k - 1])
    return float(value[k - 1] + share * (value[k] - value[k - 1]))


def at_equal_behaviour(
    table: pd.DataFrame, a: str, b: str, column: str, *, share: float = 0.5, least: float = 0.05
) -> tuple[Interval | None, pd.DataFrame]:
    """Return mean over topics of a column for method a minus method b where both steer equally much, and its values by topic.

    table: a row for each topic, method and scale, with `behaviour` and the column; scale 0 is unsteered. Equal: where behaviour first
    reaches what unsteered text has plus `share` of the smaller of the two methods' largest gains. A topic on which one of the two gains
    less than `least` has no such point and is left out; None where fewer than two are left.
    """
    rows = {}
    for topic, part in table.groupby("topic"):
        mine = {m: part[part.method == m].sort_values("scale") for m in (a, b)}
        base = [float(one.behaviour[one.scale == 0].mean()) for one in mine.values()]
        gain = min(float(one.behaviour.max()) - start for one, start in zip(mine.values(), base))
        if gain >= least:
            level = base[0] + share * gain
            found = {m: at_level(one.scale.to_numpy(), one.behaviour.to_numpy(), one[column].to_numpy(), level) for m, one in mine.items()}
            rows[topic] = {"level": level, **found}
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["level", a, b])
    return (t_interval(found[a] - found[b]) if len(found) > 1 else None), found

"""CorrSteer (arXiv 2508.12535): steer with the features whose pooled activation correlates with success.

Released behaviour is the default everywhere; other readings have names. Steer with window="last": the last prompt token
and every generated one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from steerkit.engine.steer import Add
from steerkit.methods.corrsteer.correlation import Correlation
from steerkit.methods.corrsteer.pooling import Reading

VARIANTS = ("A", "S", "P")
SCORES = ("r", "mi", "fisher", "caa")
COEFFICIENTS = ("positives", "firing", "difference")


@dataclass(frozen=True)
class Pick:
    """A feature chosen at a layer (the SAE's), its steering coefficient, its r, the score it was ranked by, firing counts."""

    layer: int
    feature: int
    coefficient: float
    r: float
    score: float
    fired_pos: int
    fired_neg: int


def _scores(c: Correlation, score: str) -> Float[np.ndarray, " d"]:
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    return {"r": lambda: np.abs(c.r()), "mi": c.mutual_information, "fisher": c.fisher, "caa": lambda: np.abs(c.caa())}[score]()


def _coefficients(c: Correlation, kind: str) -> Float[np.ndarray, " d"]:
    if kind not in COEFFICIENTS:
        raise ValueError(f"coefficient: expected one of {', '.join(COEFFICIENTS)}, got {kind!r}")
    return c.caa() if kind == "difference" else c.coefficients(firing_only=kind == "firing")


def _candidates(c: Correlation, negative: bool, min_fired: int) -> np.ndarray:
    return np.flatnonzero(((c.r() < 0) if negative else (c.r() > 0)) & (c.fired >= min_fired))


def _picks(c: Correlation, layer: int, features, score: str, negative: bool, coefficient: str) -> list[Pick]:
    if not len(features):
        return []
    r, scores, size = c.r(), _scores(c, score), _coefficients(c, coefficient)
    signed = -np.abs(size) if negative else size
    return [
        Pick(layer, int(i), float(signed[i]), float(r[i]), float(scores[i]), int(c.fired_pos[i]), int(c.fired_neg[i])) for i in features
    ]


def rank(
    c: Correlation,
    layer: int,
    *,
    k: int = 20,
    score: str = "r",
    negative: bool = False,
    coefficient: str = "positives",
    min_fired: int = 0,
) -> list[Pick]:
    """Return a layer's k best features: those with r > 0 by falling score; fewer, or none, where fewer have r > 0.

    score: "r" (|r|), or the rivals "mi", "fisher", "caa", which the released code ranks within r > 0 too.
    coefficient: "positives", mean over y > 0, zeros included (released, also for the rivals); "firing", over those that
    fire (released: --real); "difference", mean(y > 0) - mean(y <= 0) (released: --caacoeff, CAA's own).
    negative: features with r < 0 and coefficient -|c|. min_fired: samples a feature must fire on (ours; 0 as released:
    with few successes r prefers features that fire on one of them). Ties go to the lower index.
    """
    found = _candidates(c, negative, min_fired)
    best = found[np.argsort(-_scores(c, score)[found], kind="stable")[:k]]
    return _picks(c, layer, best, score, negative, coefficient)


def select(
    correlations: Mapping[int, Correlation],
    *,
    variant: str = "A",
    validate: Callable[[list[list[Pick]]], Sequence[float]] | None = None,
    **settings,
) -> list[Pick]:
    """Return the features to steer with, by rising layer; `settings` as in `rank`.

    "A": the best feature of every layer. "S": of those, the one with the largest |r|. "P": of those, the ones that alone
    score strictly higher on validation than no steering; validate(choices) returns the score of each choice, and [] is no
    steering. It is asked once, for all of them, so that they can share the work on the questions.
    A layer without a candidate is left out; nothing may be left.

    >>> c = Correlation.empty(2)
    >>> c.update(np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([0, 1]))
    >>> [(p.layer, p.feature, p.coefficient, round(p.r, 6)) for p in select({5: c})]
    [(5, 0, 2.0, 1.0)]
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if (validate is not None) != (variant == "P"):
        raise ValueError(f'validate: expected a function for variant "P" and none for others, got {validate} for {variant!r}')
    picks = [pick for layer in sorted(correlations) for pick in rank(correlations[layer], layer, **settings | {"k": 1})]
    if variant == "S":
        return sorted(picks, key=lambda p: (-abs(p.r), p.layer))[:1]
    if validate is not None:
        baseline, *alone = validate([[], *([pick] for pick in picks)])
        return [pick for pick, score in zip(picks, alone, strict=True) if score > baseline]
    return picks


def random_features(
    correlations: Mapping[int, Correlation], *, seed: int | Sequence[int] = 0, min_fired: int = 0, match: Sequence[Pick] = ()
) -> list[Pick]:
    """Return one feature a layer drawn uniformly among those with r > 0: the released control, with its own coefficient.

    Most such features hardly fire, so their own coefficients push little and the control proves little. `match` takes
    the layers and coefficients of a selection instead, and draws other features than its own: as strong a push
    where decoder rows have one norm.
    """
    rng, drawn, wanted = np.random.default_rng(seed), [], {pick.layer: pick for pick in match}
    for layer in sorted(wanted or correlations):
        c, like = correlations[layer], wanted.get(layer)
        found = _candidates(c, False, min_fired)
        found = found if like is None else found[found != like.feature]
        if not len(found):
            continue
        (pick,) = _picks(c, layer, rng.choice(found, 1), "r", False, "positives")
        drawn.append(pick if like is None else Pick(**vars(pick) | {"coefficient": like.coefficient}))
    return drawn


def edits(picks: Sequence[Pick], reading: Reading) -> list[Add]:
    """Return the edits x'[t] = x[t] + c_i W_dec[i] (card: eq. 7), where features are read; the decoder row as stored: not normalised.

    Layers compose: a later one sees what the earlier added. Use them with window="last".
    """
    return [Add(reading.block(p.layer), reading.saes[p.layer].W_dec[p.feature].detach(), p.coefficient) for p in picks]

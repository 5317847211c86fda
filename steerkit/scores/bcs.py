"""Behaviour times coherence by scale (SAE-TS section 5): one sweep for all topics and methods, judged, with intervals.

The peak over scales is picked on one half of the samples and scored on the other; also the papers' way, on the same ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from steerkit.engine.decode import Sampling
from steerkit.engine.generate import BASELINE, generate, grid
from steerkit.engine.lab import Lab
from steerkit.files import read_table, write_table
from steerkit.judges import Panel, panel
from steerkit.stats import Interval, clean, paired_difference, t_interval
from steerkit.store import Work
from steerkit.vectors import SteeringVector

COLUMNS = ["topic", "method", "scale", "prompt", "sample", "text"]
SCALES = tuple(float(s) for s in range(0, 301, 20))
SAMPLING = Sampling(top_k=50, top_p=0.3, max_new_tokens=30)


@dataclass(frozen=True)
class Protocol:
    """The papers' evaluation: 30 new tokens, top-k 50, top-p 0.3; where no stop tokens are named, the model's own end a text."""

    prompts: tuple[str, ...] = ("I think",)
    scales: tuple[float, ...] = SCALES
    samples: int = 64
    sampling: Sampling = SAMPLING


def sweep(
    lab: Lab,
    by_topic: Mapping[str, Sequence[SteeringVector]],
    shared: Sequence[SteeringVector] = (),
    *,
    protocol: Protocol = Protocol(),
    judges: Panel | None = None,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return a row for each judged text: topic, method, scale, prompt, sample, text, behaviour, coherence.

    by_topic: the vectors of each topic, named by method. shared: vectors that aim at no topic (random, -Mb); their texts
    and the unsteered ones are judged for every topic, and the unsteered ones stand for scale 0 of every method. Each
    distinct text is judged once, offline by default. With work.out (a .jsonl file, "{key}" in its name) texts and scores resume
    after an interruption. Batches of 64 rows unless work says so.

    >>> sweep(lab, {"love": [sae_row(lab.at(13), 2066)]}, work=Work(out="runs/texts-{key}.jsonl"))    # doctest: +SKIP
    """
    scales = [s for s in protocol.scales if s]
    aims = [(topic, v) for topic, vectors in by_topic.items() for v in vectors] + [(None, v) for v in shared]
    plain = replace(BASELINE, labels={"topic": None, "method": BASELINE.name})
    arms = [plain, *(arm for topic, v in aims for arm in grid([v], scales, topic=topic, method=v.name))]
    sampling = replace(protocol.sampling, stop=protocol.sampling.stop or lab.ends)
    texts = generate(lab, protocol.prompts, arms, samples=protocol.samples, sampling=sampling, work=work)
    mine = [texts[(texts.topic == topic) | texts.topic.isna()].assign(topic=topic) for topic in by_topic]
    return judged(pd.concat(mine)[COLUMNS].sort_values(COLUMNS[:5], ignore_index=True), judges, work)


def judged(texts: pd.DataFrame, judges: Panel | None = None, work: Work = Work()) -> pd.DataFrame:
    """Return texts of a sweep (`COLUMNS`) with behaviour and coherence by these judges, offline by default; other scores are replaced.

    So kept texts can be judged by another panel without writing them again. Each distinct text is judged once.

    >>> judged(load_scores("scores.csv.gz"), panel("second"))    # doctest: +SKIP
    """
    judges, texts = judges or panel(), texts[COLUMNS].reset_index(drop=True)
    asked = [(judges.coherence, texts), *((judges.concept(topic), part) for topic, part in texts.groupby("topic"))]
    coherence, *behaviour = judges.score(asked, work)
    return texts.assign(behaviour=pd.concat(behaviour), coherence=coherence)


def product(both: Float[np.ndarray, "n 2"], *, n_boot: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Return behaviour, coherence and BCS = mean behaviour x mean coherence (not the mean of products), with intervals."""
    both, rng = clean(both), np.random.default_rng(seed)
    n = len(both)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_boot) @ both / n  # [n_boot, 2]
    found = {"behaviour": (both[:, 0].mean(), drawn[:, 0]), "coherence": (both[:, 1].mean(), drawn[:, 1])}
    found["BCS"] = (both[:, 0].mean() * both[:, 1].mean(), drawn.prod(1))
    return {k: Interval(float(value), *np.quantile(d, [0.025, 0.975]).tolist(), n) for k, (value, d) in found.items()}


def _by_method(judged: pd.DataFrame):
    """Yield (topic, prompt, method, its texts); unsteered text is every method's scale 0."""
    for (topic, prompt), part in judged.groupby(["topic", "prompt"]):
        plain = part[part.method == BASELINE.name]
        for method, mine in part[part.method != BASELINE.name].groupby("method"):
            yield topic, prompt, method, pd.concat([plain.assign(scale=0.0), mine])


def curves(judged: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return a row for each topic, prompt, method, scale and score: value, low, high, n. Unsteered text is every method's scale 0."""
    rows = []
    for topic, prompt, method, mine in _by_method(judged):
        for scale, texts in mine.groupby("scale"):
            for score, i in product(texts[["behaviour", "coherence"]].to_numpy(), n_boot=n_boot, seed=seed).items():
                rows.append([topic, prompt, method, scale, score, i.value, i.low, i.high, i.n])
    return pd.DataFrame(rows, columns=["topic", "prompt", "method", "scale", "score", "value", "low", "high", "n"])


def peaks(judged: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return a row for each topic, prompt and method: the peak BCS picked on even samples and scored on odd ones, with its
    interval, scale and n; and `same`, the maximum over scales on all samples, as the papers report it."""
    rows = []
    for topic, prompt, method, mine in _by_method(judged):
        scale = best_scale(mine[mine["sample"] % 2 == 0])
        rest = mine[(mine.scale == scale) & (mine["sample"] % 2 == 1)]
        i = product(rest[["behaviour", "coherence"]].to_numpy(), n_boot=n_boot, seed=seed)
        means = mine.groupby("scale")[["behaviour", "coherence"]].mean().prod(axis=1)
        row = [topic, prompt, method, scale, i["BCS"].value, i["BCS"].low, i["BCS"].high, i["BCS"].n]
        rows.append([*row, i["behaviour"].value, i["coherence"].value, means.max(), means.idxmax()])
    names = ["topic", "prompt", "method", "scale", "bcs", "low", "high", "n", "behaviour", "coherence", "same", "same_scale"]
    return pd.DataFrame(rows, columns=names)


def agreement(live: pd.DataFrame, full: pd.DataFrame, **options) -> tuple[Interval, float]:
    """Return BCS of one run's `curves` minus another's, over the points that both have, and the share whose intervals overlap.

    Intervals that are apart by less than the rounding of saved scores (0.001) overlap.
    """
    both = live[live.score == "BCS"].merge(full, on=["topic", "prompt", "method", "scale", "score"], suffixes=("", "_full"))
    overlap = (both.low <= both.high_full + 1e-3) & (both.low_full <= both.high + 1e-3)
    return paired_difference(both.value, both.value_full, **options), float(overlap.mean())


def best_scale(texts: pd.DataFrame) -> float:
    """Return the scale with the highest BCS among these texts."""
    return float(texts.groupby("scale")[["behaviour", "coherence"]].mean().prod(axis=1).idxmax())


def with_choice(judged: pd.DataFrame, name: str, members: Sequence[str]) -> pd.DataFrame:
    """Return the texts with one method more: for each topic and prompt, the member with the highest peak BCS on even samples.

    So a setting, lambda say, is chosen as a scale is: where it is not reported. `variant` names what each row was before.
    """
    judged = judged if "variant" in judged else judged.assign(variant=judged.method)
    rows = [judged]
    for _, part in judged[judged.method.isin(members)].groupby(["topic", "prompt"]):
        even = part[part["sample"] % 2 == 0]
        means = even.groupby(["method", "scale"])[["behaviour", "coherence"]].mean().prod(axis=1)
        best = means.idxmax()[0]
        rows.append(part[part.method == best].assign(method=name, variant=best))
    return pd.concat(rows, ignore_index=True)


def compare(judged: pd.DataFrame, a: str, b: str) -> tuple[Interval, pd.Series]:
    """Return mean over topics of peak BCS of method a minus b, held out, and the difference by topic.

    Each method has its own peak scale, picked on even samples; odd ones are scored; several prompts of a topic are averaged. Topics are
    what varies: n is their number, the interval is t over them, and the noise of samples is in the spread of their differences.
    """
    found: dict[tuple, list[float]] = {}
    for topic, _, method, mine in _by_method(judged[judged.method.isin([a, b, BASELINE.name])]):
        rest = mine[(mine.scale == best_scale(mine[mine["sample"] % 2 == 0])) & (mine["sample"] % 2 == 1)]
        found.setdefault((topic, method), []).append(rest[["behaviour", "coherence"]].mean().prod())
    values = pd.Series({topic: np.mean(found[topic, a]) - np.mean(found[topic, b]) for topic in sorted({topic for topic, _ in found})})
    return t_interval(values), values


def save_scores(judged: pd.DataFrame, path: str | Path) -> Path:
    """Write the texts and their scores as gzipped csv with three decimals: small enough to ship, and another judge can read them."""
    columns = ["topic", "prompt", "method", "scale", "sample", "behaviour", "coherence", "text"]
    return write_table(path, judged[columns].sort_values(columns[:5]), digits="%.3f")


def load_scores(path: str | Path) -> pd.DataFrame:
    """Read what `save_scores` wrote."""
    return read_table(path).astype({"scale": float, "behaviour": float, "coherence": float})

"""An AxBench-style score: is the concept there, was the instruction followed, is the text fluent?

Wu et al. (arXiv 2501.17148), as used in arXiv 2505.20063, section 4.4. Three scores from 0 to 2 a text, joined by a harmonic
mean; the factor is chosen on one half of the instructions and reported on the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Num

from steerkit.engine.decode import Sampling
from steerkit.engine.generate import Arm, generate
from steerkit.engine.lab import Lab
from steerkit.judges import Panel, panel
from steerkit.store import Work

SCORES = ["concept", "instruct", "fluency"]
SAMPLING = Sampling(max_new_tokens=40)


def harmonic(scores: Num[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n"]:
    """Return the harmonic mean over the last axis, 0 where any score is 0.

    >>> harmonic(np.array([[2.0, 2.0, 1.0], [2.0, 0.0, 2.0]])).tolist()
    [1.5, 0.0]
    """
    scores = np.asarray(scores, dtype=float)
    with np.errstate(divide="ignore"):
        found = scores.shape[-1] / (1 / scores).sum(-1)
    return np.where((scores <= 0).any(-1), 0.0, found)


def overall(scores: Num[np.ndarray, "texts 3"], *, how: str = "texts") -> float:
    """Return one number for several texts: the mean of their harmonic means ("texts", AxBench), or the harmonic mean of
    their means ("means", the output-score paper), which is never smaller.

    >>> c, i, f = [2, 0, 2, 0, 2], [2] * 5, [2, 2, 0, 2, 0]
    >>> [round(overall(np.stack([c, i, f], 1), how=h), 3) for h in ("means", "texts")]
    [1.385, 0.4]
    """
    if how not in ("texts", "means"):
        raise ValueError(f'how: expected "texts" or "means", got {how!r}')
    return float(harmonic(scores).mean() if how == "texts" else harmonic(np.asarray(scores, dtype=float).mean(0)))


def steer(
    lab: Lab,
    arms: Sequence[Arm],
    instructions: Sequence[str],
    *,
    prefix: Mapping[str, str] | None = None,
    window: str = "last",
    sampling: Sampling = SAMPLING,
    judges: Panel | None = None,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return a row for each arm and instruction: factor (the arm's scale), answer, its three scores (0 to 2), the arm's labels.

    arms: each with the label `topic`, which its answers are judged for, and whatever else tells it apart (method, layer,
    feature). prefix: by topic, text put before the instruction (prompting); the judges, offline by
    default, see the plain instruction. Sampling is
    AxBench's: chat template (plain text for a model without one), temperature 1; the tokens that end a text are added.
    Batches of 256 rows unless work says so. Raises ValueError for an arm without a topic.

    >>> steer(lab, [Arm("SAE", Boost(13, sae, 5, 2.0), 2.0, {"topic": "love"})], ["Name a fruit."])      # doctest: +SKIP
    """
    lost = [arm.name for arm in arms if "topic" not in arm.labels]
    if lost or not arms:
        raise ValueError(f"arms: expected at least one, each with a label `topic`, got {len(arms)}, {lost} without: Arm(..., labels=...)")
    sampling = replace(sampling, stop=(*sampling.stop, *lab.ends))
    settings = {"window": window, "sampling": sampling, "chat": bool(lab.tokenizer.chat_template)}
    settings["work"] = replace(work, batch_size=work.rows(256))
    before, tables = [(prefix or {}).get(arm.labels["topic"], "") for arm in arms], []
    for put in sorted(set(before)):
        asked = {put + instruction: instruction for instruction in instructions}
        texts = generate(lab, list(asked), [arm for arm, text in zip(arms, before) if text == put], **settings)
        tables.append(texts.assign(instruction=texts.prompt.map(asked)))
    texts = pd.concat(tables, ignore_index=True)
    judges, seen = judges or panel(), texts.assign(prompt=texts.instruction)
    mine = {topic: seen[seen.topic == topic] for topic in dict.fromkeys(seen.topic)}
    told = [(judges.coherence, seen), (judges.instruction, seen), *((judges.concept(t), part) for t, part in mine.items())]
    fluency, instruct, *concept = judges.score(told, work)
    texts = texts.assign(concept=2 * pd.concat(concept), instruct=2 * instruct, fluency=2 * fluency)
    labels = dict.fromkeys(label for arm in arms for label in arm.labels)
    return texts.rename(columns={"scale": "factor"})[["factor", "instruction", "text", *SCORES, *labels]]


def held_out(texts: pd.DataFrame, *, how: str = "texts") -> pd.DataFrame:
    """Return a row for each set of labels: the factor with the best score on every other instruction, and its score on the rest."""
    labels = [name for name in texts if name not in {"factor", "instruction", "text", *SCORES}]
    number = {text: n for n, text in enumerate(dict.fromkeys(texts.instruction))}
    first = texts.instruction.map(number) % 2 == 0
    rows = []
    for key, part in texts.groupby(labels, sort=False, dropna=False):
        by = {f: overall(t[SCORES].to_numpy(), how=how) for f, t in part[first[part.index]].groupby("factor")}
        factor = max(by, key=by.get)
        rest = part[~first[part.index] & (part.factor == factor)]
        rows.append([*key, factor, overall(rest[SCORES].to_numpy(), how=how), *rest[SCORES].mean(), len(rest)])
    return pd.DataFrame(rows, columns=[*labels, "factor", "score", *SCORES, "n"])

"""An AxBench-style score: is the concept there, was the instruction followed, is the text fluent?

Wu et al. (arXiv 2501.17148), as used in arXiv 2505.20063, section 4.4. Three scores from 0 to 2 a text, joined by a harmonic
mean; the factor is chosen on one half of the instructions and reported on the other. The judges are this project's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Num

from steerkit.engine.generate import Arm, generate
from steerkit.engine.tokens import stop_tokens
from steerkit.judges.coherence import judge_pairs
from steerkit.judges.concept import concept_judge
from steerkit.judges.related import related_judge

SCORES = ["concept", "instruct", "fluency"]


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
    loaded,
    arms: Mapping[tuple, Sequence[Arm]],
    *,
    instructions: Sequence[str],
    prefix: Mapping[tuple, str] | None = None,
    window: str = "last",
    max_new_tokens: int = 40,
    seed: int = 0,
    batch_size: int = 256,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Return a row for each key, factor and instruction, with the answer and its three scores, 0 to 2.

    arms: for each key, whose first part is the topic, one arm a factor. prefix: text put before the instruction for some
    keys (prompting); the judges see the plain instruction. Sampling is AxBench's: chat template (plain text for a model
    without one), temperature 1.
    """
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size, "progress": progress}
    settings["chat"] = bool(loaded.tokenizer.chat_template)
    settings |= {"stop": stop_tokens(loaded.tokenizer, loaded.hf), "window": window}
    keys, prefix = list(arms), prefix or {}
    tables = []
    for put in sorted({prefix.get(key, "") for key in keys}):
        mine = [key for key in keys if prefix.get(key, "") == put]
        named = [replace(arm, name=str(keys.index(key))) for key in mine for arm in arms[key]]
        asked = {put + instruction: instruction for instruction in instructions}
        texts = generate(loaded.hf, loaded.tokenizer, list(asked), named, out=out, **settings)
        tables.append(texts.assign(key=[keys[int(a)] for a in texts.arm], instruction=texts.prompt.map(asked)))
    texts = pd.concat(tables, ignore_index=True)
    answers, asked, related = texts.text.tolist(), texts.instruction.tolist(), related_judge(instructions)
    texts["fluency"] = 2 * judge_pairs(asked, answers, out=out, progress=progress)
    texts["instruct"], texts["concept"] = 2 * related(answers, asked), 0.0
    for topic in {key[0] for key in keys}:
        mine = np.array([key[0] == topic for key in texts.key])
        texts.loc[mine, "concept"] = 2 * concept_judge(topic)(texts.text[mine].tolist())
    return texts.rename(columns={"scale": "factor"})[["key", "factor", "instruction", "text", *SCORES]]


def held_out(texts: pd.DataFrame, *, how: str = "texts") -> pd.DataFrame:
    """Return a row a key: the factor with the best score on every other instruction, and its score on the rest."""
    number = {text: n for n, text in enumerate(dict.fromkeys(texts.instruction))}
    first = texts.instruction.map(number) % 2 == 0
    rows = []
    for key, part in texts.groupby("key", sort=False):
        by = {f: overall(t[SCORES].to_numpy(), how=how) for f, t in part[first[part.index]].groupby("factor")}
        factor = max(by, key=by.get)
        rest = part[~first[part.index] & (part.factor == factor)]
        rows.append([key, factor, overall(rest[SCORES].to_numpy(), how=how), *rest[SCORES].mean(), len(rest)])
    return pd.DataFrame(rows, columns=["key", "factor", "score", *SCORES, "n"])

"""An AxBench-style score: is the concept there, was the instruction followed, is the text fluent?

Wu et al. (arXiv 2501.17148), as used in arXiv 2505.20063, section 4.4. Three scores from 0 to 2 a text, joined by a harmonic
mean; the factor is chosen on one half of the instructions and reported on the other.
"""

from collections.abc import Sequence
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


def steer(
    lab: Lab,
    arms: Sequence[Arm],
    instructions: Sequence[str],
    *,
    window: str = "last",
    samples: int = 1,
    sampling: Sampling = SAMPLING,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return a row for each arm, instruction and sample: the arm's labels, factor (its scale), instruction (its number), prompt, sample,
    text, tokens, and share (mean |push| / |x|).

    Sampling is AxBench's: chat template (plain text for a model without one), temperature 1; the tokens that end a text are
    added. Batches of 256 rows unless work says so.

    >>> steer(lab, [Arm("SAE", Boost(13, sae, 5, 2.0), 2.0, {"feature": 5})], ["Name a fruit."])      # doctest: +SKIP
    """
    sampling = replace(sampling, stop=(*sampling.stop, *lab.ends))
    how = {"samples": samples, "window": window, "sampling": sampling, "chat": bool(lab.tokenizer.chat_template)}
    texts = generate(lab, instructions, arms, work=replace(work, batch_size=work.rows(256)), **how)
    texts = texts.assign(instruction=texts.row // (len(arms) * samples)).rename(columns={"scale": "factor", "ratio": "share"})
    return texts.drop(columns=["row", "arm", "changed"])


def judged(texts: pd.DataFrame, judges: Panel | None = None, *, by: Sequence[str] = ("topic",), work: Work = Work()) -> pd.DataFrame:
    """Return texts (prompt, the plain instruction, and text) with their three scores from 0 to 2: concept, instruct, fluency.

    by: the columns that name a text's concept; `judges.concept` is asked for the judge of each (a tuple where there are several).

    >>> judged(steer(lab, [Arm("none", labels={"topic": "love"})], ["Name a fruit.", "Why?"]))    # doctest: +SKIP
    """
    judges = judges or panel()
    mine = list(texts.groupby(by[0] if len(by) == 1 else list(by)))
    told = [(judges.coherence, texts), (judges.instruction, texts), *((judges.concept(key), part) for key, part in mine)]
    fluency, instruct, *concept = judges.score(told, work)
    return texts.assign(concept=2 * pd.concat(concept), instruct=2 * instruct, fluency=2 * fluency)


def by_factor(texts: pd.DataFrame, by: Sequence[str], *, how: str = "texts") -> pd.DataFrame:
    """Return a row for each set of `by` and factor: score, the three scores' means, and n texts.

    how: score is the mean of the texts' harmonic means ("texts", AxBench), or the harmonic mean of the three means ("means", the
    output-score paper), which is never smaller.

    >>> texts = pd.DataFrame({"factor": 1.0, "concept": [2, 0, 2, 0, 2], "instruct": 2, "fluency": [2, 2, 0, 2, 0], "method": "SAE"})
    >>> [round(by_factor(texts, ["method"], how=h).score[0], 3) for h in ("means", "texts")]
    [1.385, 0.4]
    """
    if how not in ("texts", "means"):
        raise ValueError(f'how: expected "texts" or "means", got {how!r}')
    grouped = texts.assign(score=harmonic(texts[SCORES].to_numpy())).groupby([*by, "factor"])
    means = grouped[["score", *SCORES]].mean()
    score = means.score if how == "texts" else harmonic(means[SCORES].to_numpy())
    return means.assign(score=score, n=grouped.size()).reset_index()

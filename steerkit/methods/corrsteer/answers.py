"""Tables of answers to test questions, of this run or shipped: accuracy, gains and side effects of each arm, and BBQ's bias."""

from collections.abc import Sequence
from zlib import crc32

import pandas as pd

from steerkit.engine.generate import BASELINE
from steerkit.methods.corrsteer.select import ser
from steerkit.questions import Question, bias_score
from steerkit.questions.correct import letter
from steerkit.stats import bootstrap, paired_difference, t_interval

UNSTEERED = (BASELINE.name, "constrained, no steering")


def labelled(answers: pd.DataFrame) -> pd.DataFrame:
    """Return shipped answers with the labels that rows of `trial.ask` bring along; a shipped row has the arm's name alone.

    Method, source (the task its features were found on), scale, and whether it is one of a sweep over scales. "CorrSteer-A x 0.5" is
    CorrSteer-A at 0.5 in the sweep; "features of refusal x 2" is CorrSteer-A with features found on refusal at 2 in the sweep, and
    "features of refusal" the same at 1, outside of it. Any other arm is its own method on its own task, at scale 1 (0: unsteered).
    """
    said = answers.arm.str.extract(r"^(?:features of (?P<source>\w+)|(?P<method>.+?))(?: x (?P<scale>[\d.]+))?$")
    scale = said.scale.astype(float).fillna(1.0).mask(answers.arm.isin(UNSTEERED), 0.0)
    found = {"method": said.method.fillna("CorrSteer-A"), "source": said.source.fillna(answers.task), "scale": scale}
    return answers.assign(**found, sweep=said.scale.notna())


def text_number(text: str) -> int:
    """Return a number that tells texts apart, so that outcomes can be shipped without them."""
    return crc32(text.encode())


def compare(rows: pd.DataFrame, *, reference: str = BASELINE.name, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return a row an arm: accuracy, its difference from the reference on the same questions, side effects, format errors.

    Features are chosen anew for every seed. So where an arm has several seeds, these are what varies: n is their number, and the
    interval is t over them. Where it has one, intervals draw whole groups of questions (a country, a subject), as questions about
    one are not independent, and say nothing of another selection. An arm counts on the `questions` that it was asked.
    """
    rows = rows.assign(seed=rows["seed"] if "seed" in rows else 0)
    base = rows[rows.arm == reference].set_index(["seed", "question"])
    table = []
    for name, mine in rows.groupby("arm", sort=False):
        mine = mine.set_index(["seed", "question"])
        same = base.loc[mine.index]
        before, after = same.correct.astype(float), mine.correct.astype(float)
        effects = ser(same.text.tolist(), mine.text.tolist(), before.to_numpy(), after.to_numpy())
        runs = after.index.get_level_values("seed")
        if runs.nunique() > 1:
            accuracy, gain = (t_interval(values.groupby(runs).mean()) for values in (after, after - before))
        else:
            how = {"groups": same.group.astype(str).to_numpy(), "n_boot": n_boot, "seed": seed}
            accuracy, gain = bootstrap(after.to_numpy(), **how), paired_difference(after.to_numpy(), before.to_numpy(), **how)
        table.append(
            {
                "method": name,
                "accuracy": accuracy,
                "gain": gain,
                "questions": len(mine),
                "SER": effects.ratio,
                "worse": effects.negative,
                "better": effects.positive,
                "changed": effects.changed,
                "format errors": float(mine.outcome.str.startswith("format").mean()),
            }
        )
    return pd.DataFrame(table).set_index("method")


def bias(answers: pd.DataFrame, test: Sequence[Question]) -> pd.DataFrame:
    """Return BBQ's bias score and accuracy for each arm and context of these answers to `test`, as in `bias_score`."""
    rows = []
    for arm, mine in answers.groupby("arm", sort=False):
        letters = [letter(text, 3) for text in mine.text]
        for context, b in bias_score([test[i] for i in mine.question], letters).items():
            rows.append({"arm": arm, "context": context, "bias": b.score, "accuracy": b.accuracy, "named": b.named})
    return pd.DataFrame(rows)

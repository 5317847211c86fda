"""Tables of answers to test questions, of this run or shipped: what each arm did to accuracy, to single answers, and to bias."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from steerkit.engine.generate import BASELINE
from steerkit.methods.corrsteer.nulls import movable, permutation_null, permutations, strata
from steerkit.methods.corrsteer.select import rank
from steerkit.methods.corrsteer.trial import Trial
from steerkit.questions import Question, Task, bias_score
from steerkit.questions.correct import LETTERS, letter
from steerkit.stats import two_level

ARM = ["task", "seed", "study", "method", "source", "value", "draw"]  # what tells one arm of one run from another
TIE = 1e-9  # an r that no shuffling can change equals its floor but for rounding
SUMS = ["n", "correct", "margin", "worse", "better", "changed", "malformed", "commonest"]


def tally(rows: pd.DataFrame, trial: Trial) -> pd.DataFrame:
    """Return a row for each arm of `rows` and group of questions (a country, a subject), with sums over its answers.

    n; correct; margin (nats); of the answers that are not the unsteered one of the trial: changed, worse (was right, now wrong) and
    better; malformed, format errors; commonest, equal to the arm's commonest answer in this run. Such sums are what is shipped.
    """
    plain = trial.answers[(trial.answers.method == BASELINE.name) & (trial.answers.study == "main")].set_index("question")
    rows = rows.assign(task=trial.task.name, seed=trial.plan.seed, n=1)
    before, text = rows.question.map(plain.correct), rows.question.map(plain.text)
    changed, arms = rows.text != text, rows.groupby(ARM, sort=False).text
    told = {"changed": changed, "worse": changed & (rows.correct < before), "better": changed & (rows.correct > before)}
    told["malformed"] = rows.outcome.str.startswith("format")
    told["commonest"] = rows.text == arms.transform(lambda t: t.value_counts().index[0])
    return rows.assign(**told).groupby([*ARM, "group"], sort=False)[SUMS].sum(min_count=1).reset_index()


def compare(rows: pd.DataFrame, base: pd.DataFrame, *, by: str = "method", column: str = "correct", n_boot: int = 2000) -> pd.DataFrame:
    """Return a row for each label in `by`: its mean, the difference from `base` on the same questions, side effects, format errors.

    rows, base: of `tally`, of one task; base has one arm. column: correct (a share), or margin (nats). Selections and groups of
    questions are what varies (`stats.two_level`): features are chosen anew for every seed, and questions of one group are not
    independent. Random draws count as one arm, their mean. SER = worse / (worse + better), nan where neither occurs: as released,
    where the paper words it worse / changed, and a wrong answer that becomes another wrong one counts below the line.
    """
    table, unit = {}, ["seed", "group"]
    plain = base.groupby(unit)[SUMS].sum(min_count=1)
    for name, mine in rows.groupby(by, sort=False):
        cells = mine.groupby(unit)[SUMS].sum(min_count=1)
        same = plain.loc[cells.index]
        after = cells.mul(same.n / cells.n, axis=0)
        how = {"runs": cells.index.get_level_values("seed"), "groups": cells.index.get_level_values("group"), "n_boot": n_boot}
        all_, moved = after.sum(), after.worse.sum() + after.better.sum()
        table[name] = {
            "mean": two_level(after[column], same.n, **how),
            "gain": two_level(after[column] - same[column], same.n, **how),
            "questions": int(same.n.sum()),
            "SER": all_.worse / moved if moved else float("nan"),
            **all_[["worse", "better", "changed"]].to_dict(),
            "format errors": all_.malformed / all_.n,
            "commonest answer": all_.commonest / all_.n,
        }
    return pd.DataFrame.from_dict(table, orient="index").rename_axis(by)


def cells(rows: pd.DataFrame, task: Task, seed: int) -> pd.DataFrame:
    """Return a row for each group of unsteered answers (`trial.ask`) to a task: n, correct, malformed, and chance, 1 / options, summed.

    scored: whether options are scored, so that the form of an answer plays no part.
    """
    told = rows.assign(n=1, malformed=rows.outcome.str.startswith("format"))
    told = told.groupby("group", sort=False)[["n", "correct", "malformed", "chance"]].sum(min_count=1)
    return told.reset_index().assign(task=task.name, seed=seed, scored=task.answer == "options")


def base_rates(asked: pd.DataFrame, *, least: int = 30, n_boot: int = 2000) -> pd.DataFrame:
    """Return a row a task of `cells`: how it is answered without steering, and whether a feature can be chosen and knowledge tested on it.

    enough: both outcomes occur `least` times in every selection. above chance: accuracy minus 1 / options, where options are scored,
    with its interval over selections and groups; knowledge is testable where that lies above 0. No steered answer has a say.
    """
    table = {}
    for name, mine in asked.groupby("task", sort=False):
        how, runs = {"runs": mine.seed, "groups": mine.group, "n_boot": n_boot}, mine.groupby("seed")[["n", "correct"]].sum()
        over = two_level(mine.correct - mine.chance, mine.n, **how) if mine.scored.all() else None
        rarer = int(np.minimum(runs.correct, runs.n - runs.correct).min())
        table[name] = {"answers": int(runs.n.mean()), "accuracy": two_level(mine.correct, mine.n, **how)}
        table[name] |= {"format errors": mine.malformed.sum() / mine.n.sum(), "rarer outcome": rarer, "enough": rarer >= least}
        table[name] |= {"above chance": over, "knowledge": over is not None and over.low > 0}
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("task")


def best_picks(found: Trial, *, k: int = 10, n_null: int = 500, seed: int = 0) -> pd.DataFrame:
    """Return the k best features of each layer with r > 0 and (sign -1) r < 0, with noise floors; no rows for one outcome only.

    floor: the largest r that 95 % of shufflings of the labels stay below, whole items at a time. floor_within: the same within `strata`
    of kind and right answer, on the answers whose label can move there (`movable`), beside r_within, the feature's r on these; nan where
    fewer than `plan.least` can. norm: the median |x| where the layer is read and steered; push: the norm of what is added, both in
    residual units. S, P: whether CorrSteer-S and -P steer with it.
    """
    plan, y, rows = found.plan, found.y, []
    if not 0 < y.sum() < len(y):
        return pd.DataFrame()
    items = found.selection["item"]
    whole = permutations(y, n_null, seed=seed, items=items)
    inside = permutations(y, n_null, seed=seed, items=items, within=strata(found.selection.kind, found.selection.said, items))
    free = movable(y, inside)
    steered = {name: {(p.layer, p.feature) for p in found.picks.get(f"CorrSteer-{name}", ())} for name in "SP"}
    for layer in found.pooled.features:
        pools = {"pool": plan.pool, "steer_pool": plan.steer_pool, "edges": None}
        z, known = found.pooled.z(layer, plan.pool), found.pooled.correlation(layer, y, **pools)
        floor = np.quantile(permutation_null(z, y, whole, min_fired=plan.min_fired), 0.95)
        r_within, floor_within = np.full(z.shape[1], np.nan), np.nan
        if free.sum() >= plan.least:
            r_within = found.pooled.take(np.flatnonzero(free)).correlation(layer, y[free], **pools).r()
            floor_within = np.quantile(permutation_null(z[free], y[free], inside[:, free]), 0.95)
        for sign in (1, -1):
            for place, f in enumerate(rank(known, layer, k=k, negative=sign < 0, min_fired=plan.min_fired), 1):
                row = {"sign": sign, "rank": place, **vars(f), "floor": floor, "floor_within": floor_within}
                row["r_within"] = r_within[f.feature]
                row |= {"above": f.r > floor + TIE, "above_within": r_within[f.feature] > floor_within + TIE, "movable": int(free.sum())}
                push = abs(f.coefficient) * float(found.readings[""].saes[layer].W_dec[f.feature].detach().norm())
                row |= {"push": push, "norm": float(np.median(found.pooled.norm[layer]))}
                rows.append(row | {name: sign > 0 and (layer, f.feature) in some for name, some in steered.items()})
    return pd.DataFrame(rows).assign(task=found.task.name, seed=plan.seed, n=len(y), accuracy=y.mean())


def bias(rows: pd.DataFrame, test: Sequence[Question]) -> pd.DataFrame:
    """Return BBQ's bias score and accuracy for each method and context of these answers to `test`, as in `bias_score`."""
    table = []
    for method, mine in rows[rows.study == "main"].groupby("method", sort=False):
        asked = [test[i] for i in mine.question]
        said = [LETTERS[q.choices.index(text)] if text in q.choices else letter(text, 3) for text, q in zip(mine.text, asked)]
        for context, b in bias_score(asked, said).items():
            table.append({"method": method, "context": context, "bias": b.score, "accuracy": b.accuracy, "named": b.named})
    return pd.DataFrame(table)

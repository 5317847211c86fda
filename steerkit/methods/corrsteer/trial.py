"""One CorrSteer trial (arXiv 2508.12535): a selection pass, the methods under comparison, and what each does to the answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd

from steerkit.engine.decode import Sampling
from steerkit.engine.generate import BASELINE, Arm, generate
from steerkit.engine.lab import Lab
from steerkit.engine.options import option_logliks
from steerkit.engine.tokens import bare_ids
from steerkit.methods.corrsteer import select
from steerkit.methods.corrsteer.nulls import permutations
from steerkit.methods.corrsteer.pooled import POOLS, Pooled
from steerkit.methods.corrsteer.pooling import SITES, Raw, Reading, pool_answers
from steerkit.methods.corrsteer.select import Pick
from steerkit.questions import Question, Task, split
from steerkit.store import Work

# name -> what differs from CorrSteer-A on all layers: the paper's Table 1 in our words, its ablations, and our checks.
RULES = {
    "CorrSteer-S": {"variant": "S"},
    "CorrSteer-P": {"variant": "P"},
    "CorrSteer-A": {},
    "mutual information": {"score": "mi", "edges": "log"},
    "mutual information, released bins": {"score": "mi", "edges": "released"},
    "Fisher ratio": {"score": "fisher"},
    "CAA score": {"score": "caa"},
    "CAA score, own coefficients": {"score": "caa", "coefficient": "difference"},
    "firing-only coefficients": {"coefficient": "firing"},
    "features that fire on ten answers": {"min_fired": 10},
    "pools: mean, mean": {"pool": "mean", "steer_pool": "mean"},
    "pools: max, mean": {"pool": "max", "steer_pool": "mean"},
    "pools: mean, max": {"pool": "mean", "steer_pool": "max"},  # the paper's "mean" row: its README changes the pool of r alone
    "every other layer": {"step": 2},
    "negative, best layer": {"variant": "S", "negative": True},
    "negative, all layers": {"negative": True},
}
CONTROLS = ("random features", "random features, same push", "shuffled labels")


@dataclass(frozen=True)
class Plan:
    """What a trial chooses; the defaults are the paper's sizes and the released configuration.

    seed: of the questions' split, and of the controls. within: kinds of questions whose unsteered accuracy on the selection part lies
    outside are left out everywhere, before anything is steered; where no kind is left all stay. site: "pre" as released (features are
    read, chosen and steered one block early), or "post". pool, steer_pool: "max" or "mean", for r and for coefficients. min_fired:
    selection answers that a feature must fire on. least: answers whose label can move that a noise floor needs. draws: of random features
    with the same push. scales, sizes: of the sweeps over coefficients and selection answers. rules, controls: what is compared; others:
    also residual coordinates in place of features, and the other site.
    Raises ValueError for a name that does not exist.
    """

    seed: int = 0
    n_selection: int = 4000
    n_validation: int = 200
    n_test: int = 1000
    within: tuple[float, float] = (0.0, 1.0)
    site: str = "pre"
    pool: str = "max"
    steer_pool: str = "max"
    min_fired: int = 0
    least: int = 30
    draws: int = 20
    scales: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()
    rules: tuple[str, ...] = tuple(RULES)
    controls: tuple[str, ...] = CONTROLS
    others: bool = True

    def __post_init__(self) -> None:
        known = {"site": SITES, "pool": POOLS, "steer_pool": POOLS, "rules": tuple(RULES), "controls": CONTROLS}
        for name, names in known.items():
            given = getattr(self, name)
            if unknown := sorted({given} - set(names) if isinstance(given, str) else set(given) - set(names)):
                raise ValueError(f"{name}: expected some of {', '.join(names)}, got {', '.join(unknown)}")


@dataclass(frozen=True)
class Choice:
    """The features that answers are steered with, and the labels that tell this arm from others; no features: no steering.

    study: "main" for methods; "scale" and "size" for CorrSteer-A with its coefficients times `value`, and chosen on the first `value`
    answers; others as the caller says. source: the task that the features were found on, where it is another. draw: of random features.
    reading: the name of the `Reading` that the picks belong to.
    """

    method: str
    picks: tuple[Pick, ...] = ()
    study: str = "main"
    value: float = 1.0
    source: str = ""
    draw: int = 0
    reading: str = ""


UNSTEERED = Choice(BASELINE.name)


@dataclass(frozen=True)
class Trial:
    """What one run on one task found. asked: the selection questions, selection: what became of them; answers: of the test questions.

    readings: where features were read, by name; "" is the plan's, and `pooled` belongs to it.
    """

    task: Task
    plan: Plan
    kinds: tuple[str, ...]
    asked: tuple[Question, ...]
    selection: pd.DataFrame
    readings: dict[str, Reading]
    pooled: Pooled
    choices: tuple[Choice, ...]
    test: tuple[Question, ...]
    answers: pd.DataFrame

    @property
    def y(self) -> np.ndarray:
        """Outcomes of the selection questions, 0 or 1."""
        return self.selection.correct.to_numpy()

    @property
    def picks(self) -> dict[str, tuple[Pick, ...]]:
        """The features of each method; of random draws, the first."""
        return {c.method: c.picks for c in reversed(self.choices) if c.study == "main"}


def check_chat(lab: Lab, tasks: Iterable[Task]) -> None:
    """Raise ValueError for tasks that need a chat template where the model has none, before anything is asked."""
    if not lab.tokenizer.chat_template and (names := [task.name for task in tasks if task.chat]):
        why = f"expected a model with a chat template for these tasks, {lab.preset.name} has none"
        raise ValueError(f"{', '.join(names)}: {why}: use an instruct preset, or tasks asked as plain text (letters, mmlu, bbq_ambig, ...)")


def readings(lab: Lab, plan: Plan = Plan()) -> dict[str, Reading]:
    """Return where a trial reads features and steers, by name: "" is the lab's SAEs at the plan's site; and what else it compares."""
    other, found = "post" if plan.site == "pre" else "pre", {"": Reading(lab.saes, plan.site)}
    if plan.others:
        raw = {layer: Raw(lab.at(layer).d_model, sae.W_dec.device) for layer, sae in lab.saes.items()}
        found["residual coordinates"] = Reading(raw, plan.site)
        found[f"CorrSteer-A, {other}"] = Reading({layer: sae for layer, sae in lab.saes.items() if layer or other == "post"}, other)
    return {name: reading for name, reading in found.items() if reading.saes}


def run(lab: Lab, task: Task, plan: Plan = Plan(), *, work: Work = Work()) -> Trial:
    """Select on one part of a task's questions, and answer the test part without steering and with every method.

    work.out is a folder: passes are kept there, and resume.

    >>> found = run(lab, questions.load("letters"), Plan(n_selection=200, n_test=40))    # doctest: +SKIP
    >>> found.picks["CorrSteer-A"][0].r, found.answers.groupby("method").correct.mean()  # doctest: +SKIP
    """
    parts, where = split(task, plan.seed, selection=plan.n_selection, validation=plan.n_validation), readings(lab, plan)
    first, pooled = select_on(lab, task, parts.selection, list(where.values()), work=work)
    by_kind = first.groupby("kind").correct.mean()
    kinds = tuple(by_kind.index[by_kind.between(*plan.within)]) or tuple(by_kind.index)
    kept = np.flatnonzero(first.kind.isin(kinds))
    first, pooled = first.iloc[kept].reset_index(drop=True), [some.take(kept) for some in pooled]
    valid, test = ([q for q in part if q.kind in kinds] for part in (parts.validation, parts.test))
    test, asking = tuple(test[: plan.n_test]), work.below(f"{task.name}-{{key}}.jsonl")
    choices = (UNSTEERED, *methods(lab, task, valid, pooled, first, plan, work=asking))
    answers = answer(lab, task, test, choices, where, work=asking).assign(task=task.name, seed=plan.seed)
    return Trial(task, plan, kinds, tuple(parts.selection[i] for i in kept), first, where, pooled[0], choices, test, answers)


def ask(
    lab: Lab,
    task: Task,
    questions: Sequence[Question],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    allowed: Sequence[int] = (),
    work: Work = Work(),
) -> pd.DataFrame:
    """Answer every question under every arm, and return a row for each: text, tokens, correct, outcome, margin, and the question's labels.

    Texts are drawn greedily, up to what ends a text of this model; allowed: constrained decoding. Where options are scored, the text is
    the likeliest option, and margin says by how much the right one leads, in nats. Steering acts on the last prompt token and all that
    follow, as released. `question` is the question's number, `grader` who decided. work as in `generate`.
    """
    prompts, asked = [q.prompt for q in questions], np.repeat(np.arange(len(questions)), len(arms))
    if task.answer == "options":
        options = [[f" {choice}" for choice in q.choices] for q in questions]
        found = option_logliks(lab, prompts, options, arms, chat=task.chat, work=work)
        chosen = [task.choose(loglik, questions[q]) for loglik, q in zip(found.loglik, asked)]
        rows = pd.DataFrame(chosen, columns=["text", "margin"])
        right = (rows.margin > 0).to_numpy()
        rows = rows.assign(correct=right.astype(int), outcome=np.where(right, "right", "wrong"), grader="log-likelihood")
        rows["tokens"] = [bare_ids(lab.tokenizer, f" {text}") for text in rows.text]
    else:
        sampling = Sampling(temperature=0.0, max_new_tokens=task.max_new_tokens, stop=lab.ends, allowed=tuple(allowed))
        found = generate(lab, prompts, arms, sampling=sampling, window="last", chat=task.chat, work=work)
        rows = graded(task, found.text.tolist(), [questions[q] for q in asked]).assign(margin=np.nan, tokens=found.tokens)
    labels = [{"group": q.group, "kind": q.kind, "item": q.item or q.id, "said": task.said(q)} for q in questions]
    labels = pd.DataFrame(labels).assign(chance=[1 / len(q.choices) if q.choices else np.nan for q in questions])
    return rows.join(labels.iloc[asked].reset_index(drop=True)).assign(question=asked, arm=found.arm)


def graded(task: Task, texts: list[str], questions: Sequence[Question]) -> pd.DataFrame:
    """Return a row an answer: text, correct, outcome, and who graded it."""
    grades = task.grade(texts, questions)
    correct = np.asarray(grades.correct, dtype=int)
    return pd.DataFrame({"text": texts, "correct": correct, "outcome": list(grades.outcome), "grader": grades.grader})


def answer(
    lab: Lab,
    task: Task,
    questions: Sequence[Question],
    choices: Sequence[Choice],
    where: Mapping[str, Reading],
    *,
    allowed: Sequence[int] = (),
    work: Work = Work(),
) -> pd.DataFrame:
    """Return the rows of `ask` for each choice, with its labels; choices that steer alike are asked once. where: `readings`."""
    alike: dict[tuple, list[Choice]] = {}
    for choice in choices:
        alike.setdefault(tuple((choice.reading, p.layer, p.feature, p.coefficient) for p in choice.picks), []).append(choice)
    arms = [Arm(f"{n}: {some[0].method}", select.edits(some[0].picks, where[some[0].reading])) for n, some in enumerate(alike.values())]
    rows, found = dict(list(ask(lab, task, questions, arms, allowed=allowed, work=work).groupby("arm"))), []
    for arm, some in zip(arms, alike.values()):
        labels = [{name: value for name, value in vars(choice).items() if name not in ("picks", "reading")} for choice in some]
        found += [rows[arm.name].drop(columns=["arm", "tokens"]).assign(**label) for label in labels]
    return pd.concat(found, ignore_index=True)


def select_on(
    lab: Lab, task: Task, questions: Sequence[Question], where: Sequence[Reading], *, work: Work = Work()
) -> tuple[pd.DataFrame, list[Pooled]]:
    """Return the unsteered answers to the selection questions, and the pooled features of each reading. work.out is a folder."""
    rows = ask(lab, task, questions, work=work.below(f"{task.name}-asked-{{key}}.jsonl"))
    how = {"min_window": int(task.max_new_tokens == 1), "chat": task.chat, "work": work.below(f"{task.name}-pooled-{{key}}")}
    return rows, pool_answers(lab, [q.prompt for q in questions], rows.tokens.tolist(), where, **how)


def methods(
    lab: Lab,
    task: Task,
    validation: Sequence[Question],
    pooled: Sequence[Pooled],
    selection: pd.DataFrame,
    plan: Plan = Plan(),
    *,
    work: Work = Work(),
) -> list[Choice]:
    """Return what each rule, control, sweep and reading of the plan picks. What finds nothing picks nothing, and steers nothing.

    selection: the rows of `ask` that `pooled` belongs to, one for each of `readings`. work: of the validation answers, as in `generate`.
    """
    where, often = readings(lab, plan), {"min_fired": plan.min_fired}
    real = selection.correct.to_numpy(dtype=float)
    shuffled = permutations(real, 1, seed=plan.seed, items=selection["item"])[0]

    @cache
    def known(pool: str, steer_pool: str, edges: str | None, n: int, y: str, reading: int) -> dict:
        some, outcomes = pooled[reading].take(range(n)), (shuffled if y == "shuffled" else real)[:n]
        return {layer: some.correlation(layer, outcomes, pool=pool, steer_pool=steer_pool, edges=edges) for layer in some.features}

    def pick(*, pool=plan.pool, steer_pool=plan.steer_pool, edges=None, n=None, y="real", reading=0, step=1, **how) -> tuple[Pick, ...]:
        found = known(pool, steer_pool, edges, n or len(real), y, reading)
        return tuple(select.select({layer: found[layer] for layer in list(found)[::step]}, **often | how))

    def validate(tried: list[list[Pick]]) -> list[float]:
        asked = [Choice("a choice", tuple(picks), value=i) for i, picks in enumerate(tried)]
        rows = answer(lab, task, validation, asked, where, work=replace(work, progress=False))
        return rows.groupby("value").correct.mean().tolist()

    best, stats = pick(), known(plan.pool, plan.steer_pool, None, len(real), "real", 0)
    found = []
    for name in plan.rules:
        check = {"validate": validate} if RULES[name].get("variant") == "P" else {}
        found.append(Choice(name, pick(**RULES[name], **check)))
    found += [Choice(name, pick(reading=n), reading=name) for n, name in enumerate(where) if n]
    for name in plan.controls:
        for draw in range(plan.draws if name == "random features, same push" else 1):
            if name == "shuffled labels":
                picks = pick(y="shuffled")
            else:
                match = best if name == "random features, same push" else ()
                picks = tuple(select.random_features(stats, seed=[plan.seed, draw], match=match, **often))
            found.append(Choice(name, picks, draw=draw))
    found += [Choice("CorrSteer-A", tuple(replace(p, coefficient=x * p.coefficient) for p in best), "scale", x) for x in plan.scales]
    return found + [Choice("CorrSteer-A", pick(n=n), "size", n) for n in plan.sizes if n < len(real)]

"""One CorrSteer trial (arXiv 2508.12535): a selection pass, the methods under comparison, and what each does to the answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature

import numpy as np
import pandas as pd

from steerkit.engine.decode import Sampling
from steerkit.engine.generate import BASELINE, COLUMNS, Arm, generate
from steerkit.engine.lab import Lab
from steerkit.methods.corrsteer import select
from steerkit.methods.corrsteer.lora import lora
from steerkit.methods.corrsteer.nulls import permutation_null, shuffled
from steerkit.methods.corrsteer.pooled import POOLS, Pooled
from steerkit.methods.corrsteer.pooling import SITES, Raw, pool_generations
from steerkit.methods.corrsteer.select import Pick
from steerkit.questions import Question, Task, split
from steerkit.store import Journal, Work, fingerprint

# name -> (variant, what `rank` is told); the paper's Table 1 in our words, its ablations, and controls.
RULES = {
    "CorrSteer-S": ("S", {}),
    "CorrSteer-P": ("P", {}),
    "CorrSteer-A": ("A", {}),
    "mutual information": ("A", {"score": "mi"}),
    "Fisher ratio": ("A", {"score": "fisher"}),
    "CAA score": ("A", {"score": "caa"}),
    "CAA score, own coefficients": ("A", {"score": "caa", "coefficient": "difference"}),
    "firing-only coefficients": ("A", {"coefficient": "firing"}),
    "negative, best layer": ("S", {"negative": True}),
    "negative, all layers": ("A", {"negative": True}),
}
CONTROLS = ("random features", "random features, same push", "shuffled labels")


@dataclass(frozen=True)
class Plan:
    """What a trial chooses; the defaults are the paper's sizes at the SAE's own hook.

    seed: of the questions' split, and of the controls. within: kinds of questions whose unsteered accuracy on the selection part lies
    outside are left out everywhere, before anything is steered; where no kind is left all stay. site: "post", or "pre" as released.
    pool: "max" or "mean", for selection and coefficients. min_fired: selection questions that a feature must fire on. rules, controls:
    what is compared. Raises ValueError for a name that does not exist.
    """

    seed: int = 0
    n_selection: int = 4000
    n_validation: int = 200
    n_test: int = 1000
    within: tuple[float, float] = (0.2, 0.8)
    site: str = "post"
    pool: str = "max"
    min_fired: int = 0
    rules: tuple[str, ...] = tuple(RULES)
    controls: tuple[str, ...] = CONTROLS

    def __post_init__(self) -> None:
        for name, known in {"site": SITES, "pool": POOLS, "rules": tuple(RULES), "controls": CONTROLS}.items():
            given = getattr(self, name)
            if unknown := sorted({given} - set(known) if isinstance(given, str) else set(given) - set(known)):
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")


@dataclass(frozen=True)
class Trial:
    """What one run on one task found. asked: the selection questions, selection: what became of them; answers: of the test questions."""

    task: Task
    plan: Plan
    kinds: tuple[str, ...]
    asked: tuple[Question, ...]
    selection: pd.DataFrame
    pooled: Pooled
    picks: dict[str, list[Pick]]
    test: tuple[Question, ...]
    answers: pd.DataFrame

    @property
    def y(self) -> np.ndarray:
        """Outcomes of the selection questions, 0 or 1."""
        return self.selection.correct.to_numpy()


def check_chat(lab: Lab, tasks: Iterable[Task]) -> None:
    """Raise ValueError for tasks that need a chat template where the model has none, before anything is asked."""
    if not lab.tokenizer.chat_template and (names := [task.name for task in tasks if task.chat]):
        why = f"expected a model with a chat template for these tasks, {lab.preset.name} has none"
        raise ValueError(f"{', '.join(names)}: {why}: use an instruct preset, or tasks asked as plain text (letters, mmlu, bbq_ambig, ...)")


def run(lab: Lab, task: Task, plan: Plan = Plan(), *, saes: Mapping[int, object] | None = None, work: Work = Work()) -> Trial:
    """Select on one part of a task's questions, and answer the test part without steering and with every method.

    saes: by default the lab's. work.out is a folder: passes are kept there, and resume.
    """
    saes = lab.saes if saes is None else saes
    parts = split(task, plan.seed, selection=plan.n_selection, validation=plan.n_validation)
    first, pooled = select_on(lab, task, parts.selection, plan, saes=saes, work=work.below(f"{task.name}-select-{{key}}"))
    by_kind = first.groupby("kind").correct.mean()
    kinds = tuple(by_kind.index[by_kind.between(*plan.within)]) or tuple(by_kind.index)
    kept = np.flatnonzero(first.kind.isin(kinds))
    first, pooled = first.iloc[kept].reset_index(drop=True), pooled.take(kept)
    valid, test = ([q for q in part if q.kind in kinds] for part in (parts.validation, parts.test))
    test, asking = tuple(test[: plan.n_test]), work.below(f"{task.name}-{{key}}.jsonl")
    picks = methods(lab, task, valid, pooled, first.correct.to_numpy(), plan, saes=saes, work=asking)
    answers = ask(lab, task, test, arms(picks, saes, site=plan.site), work=asking)
    plain = answers[answers.arm == BASELINE.name]
    idle = [plain.assign(arm=name, method=name, scale=1.0) for name, chosen in picks.items() if not chosen]
    answers = pd.concat([answers, *idle], ignore_index=True).assign(task=task.name, seed=plan.seed)
    return Trial(task, plan, kinds, tuple(parts.selection[i] for i in kept), first, pooled, picks, test, answers)


def _sampling(lab: Lab, task: Task, allowed: Sequence[int] = ()) -> Sampling:
    """Return how answers to a task are drawn: greedily, up to what ends a text of this model."""
    return Sampling(temperature=0.0, max_new_tokens=task.max_new_tokens, stop=lab.ends, allowed=tuple(allowed))


def ask(
    lab: Lab,
    task: Task,
    questions: Sequence[Question],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    allowed: Sequence[int] = (),
    work: Work = Work(),
) -> pd.DataFrame:
    """Answer every question greedily under every arm, and return a row for each: text, group, kind, correct, outcome, arm, labels, scale.

    Every row has the labels method (the arm's name, unless the arm says otherwise), source (the task its features were found on: this
    one) and sweep (whether it is one of a sweep over scales: no). `question` is the question's number, `grader` who decided.
    Steering acts on the last prompt token and all new ones, as released. allowed: constrained decoding. work as in `generate`.
    """
    arms = [replace(arm, labels={"method": arm.name, "source": task.name, "sweep": False} | dict(arm.labels)) for arm in arms]
    how = {"sampling": _sampling(lab, task, allowed), "window": "last", "chat": task.chat, "work": work}
    texts = generate(lab, [q.prompt for q in questions], arms, **how)
    asked = np.repeat(np.arange(len(questions)), len(arms))
    rows, grader = graded(task, texts.text.tolist(), [questions[q] for q in asked])
    return rows.join(texts.drop(columns=[*COLUMNS - {"arm", "scale"}])).assign(question=asked, grader=grader)


def graded(task: Task, texts: list[str], questions: Sequence[Question]) -> tuple[pd.DataFrame, str]:
    """Return a row an answer, and who graded them."""
    grades = task.grade(texts, questions)
    rows = pd.DataFrame({"text": texts, "group": [q.group for q in questions], "kind": [q.kind for q in questions]})
    return rows.assign(correct=np.asarray(grades.correct, dtype=int), outcome=list(grades.outcome)), grades.grader


def select_on(
    lab: Lab,
    task: Task,
    questions: Sequence[Question],
    plan: Plan = Plan(),
    *,
    saes: Mapping[int, object] | None = None,
    work: Work = Work(),
) -> tuple[pd.DataFrame, Pooled]:
    """Return the unsteered answers to the selection questions, graded, and the pooled features of the same pass."""
    how = {"saes": saes, "sampling": _sampling(lab, task), "site": plan.site, "chat": task.chat, "work": work}
    texts, pooled = pool_generations(lab, [q.prompt for q in questions], **how)
    return graded(task, texts, questions)[0], pooled


def methods(
    lab: Lab,
    task: Task,
    validation: Sequence[Question],
    pooled: Pooled,
    y: np.ndarray,
    plan: Plan = Plan(),
    *,
    saes: Mapping[int, object] | None = None,
    work: Work = Work(),
) -> dict[str, list[Pick]]:
    """Return the features that each rule and control of the plan picks. A rule that finds none picks none, and steers nothing.

    saes: by default the lab's. work: of the validation answers, as in `generate`.
    """
    y, saes, often = np.asarray(y, dtype=float), lab.saes if saes is None else saes, {"min_fired": plan.min_fired}
    if not 0 < y.sum() < len(y):  # a correlation needs both outcomes
        return {name: [] for name in (*plan.rules, *plan.controls)}

    def statistics(outcomes: np.ndarray) -> dict:
        return {layer: pooled.correlation(layer, outcomes, pool=plan.pool, steer_pool=plan.pool) for layer in pooled.features}

    def validate(choices: list[list[Pick]]) -> list[float]:
        tried = [select.arm("a choice", picks, saes, site=plan.site, choice=i) for i, picks in enumerate(choices)]
        answers = ask(lab, task, validation, tried, work=replace(work, progress=False))
        return answers.groupby("choice", sort=False).correct.mean().tolist()

    known, found = statistics(y), {}
    for name in plan.rules:
        variant, how = RULES[name]
        check = {"validate": validate} if variant == "P" else {}
        found[name] = select.select(known, variant=variant, **check, **often, **how)
    for name in plan.controls:
        if name == "shuffled labels":
            found[name] = select.select(statistics(shuffled(y, seed=plan.seed)), **often)
        else:
            match = select.select(known, **often) if name.endswith("same push") else ()
            found[name] = select.random_features(known, seed=plan.seed, match=match, **often)
    return found


def arms(picks: Mapping[str, Sequence[Pick]], saes: Mapping[int, object], *, site: str = "post") -> list[Arm]:
    """Return an arm for each method that picked something, and the baseline first."""
    return [BASELINE, *(select.arm(name, chosen, saes, site=site) for name, chosen in picks.items() if chosen)]


def best_picks(found: Trial, *, n_null: int = 500, null_seed: int = 0) -> pd.DataFrame:
    """Return the best feature of each layer with two noise floors, which 95 % of shufflings stay below; no rows for one outcome only.

    floor: labels shuffled over the whole run. floor_kinds: within kinds of question, so that a feature which only tells easy
    kinds from hard ones is not above it. Features are pooled by their maximum, whatever the plan's pooling.
    """
    if not 0 < found.y.sum() < len(found.y):
        return pd.DataFrame()
    rows, often = [], found.plan.min_fired
    for layer in found.pooled.features:
        z, known = found.pooled.z(layer), found.pooled.correlation(layer, found.y)
        null = {"n": n_null, "seed": null_seed, "min_fired": often}
        floors = [permutation_null(z, found.y, within=kinds, **null).threshold() for kinds in (None, found.selection.kind)]
        for f in select.rank(known, layer, k=1, min_fired=often):
            about = {"task": found.task.name, "seed": found.plan.seed, "n": len(found.y), "accuracy": found.y.mean(), "layer": layer}
            about |= {"feature": f.feature, "r": f.r, "coefficient": f.coefficient, "fired_pos": f.fired_pos, "fired_neg": f.fired_neg}
            rows.append(about | {"floor": floors[0], "floor_kinds": floors[1]})
    return pd.DataFrame(rows)


def rivals(lab: Lab, found: Trial, *, epochs: float = 1.0, work: Work = Work()) -> pd.DataFrame:
    """Return the test answers of two rivals that learn from the same selection questions: residual coordinates, and LoRA.

    work.out is a folder: passes resume, and what is learned and answered is not learned again.
    """
    raw = {layer: Raw(lab.at(layer).d_model) for layer in found.pooled.features}
    plan = replace(found.plan, rules=("CorrSteer-A",), controls=())
    selection, pooled = select_on(lab, found.task, found.asked, plan, saes=raw, work=work.below("raw-{key}"))
    picks = methods(lab, found.task, (), pooled, selection.correct.to_numpy(), plan, saes=raw)["CorrSteer-A"]
    steered = arms({"residual coordinates": picks}, raw, site=plan.site)[1:]
    answers = [ask(lab, found.task, found.test, steered, work=work.below("raw-{key}.jsonl"))] if steered else []
    answers.append(_tuned(lab, found, epochs, work))
    return pd.concat(answers, ignore_index=True).assign(task=found.task.name, seed=found.plan.seed)


def _tuned(lab: Lab, found: Trial, epochs: float, work: Work) -> pd.DataFrame:
    """Return the test answers of the model fine-tuned on the selection questions; they are kept, the tuned model is not."""
    task, seed = replace(found.task, parts={}), found.plan.seed
    parts = (lab.hf, task, found.asked, found.test, seed, epochs, str(signature(lora)), work.rows(64))
    key = fingerprint(*parts) if work.out else ""
    journal = Journal(work.path(key, f"lora-{key}.jsonl"), key)
    if not journal.has(range(len(found.test))):
        with lora(lab, found.asked, chat=task.chat, epochs=epochs, seed=seed) as tuned:
            answers = ask(tuned, task, found.test, work=replace(work, out=None))
        answers = answers.assign(arm="LoRA, same questions", method="LoRA, same questions", scale=1.0)
        journal.write(answers.assign(row=range(len(answers))).to_dict("records"))
    return pd.DataFrame([journal.rows[row] for row in range(len(found.test))]).drop(columns="row")

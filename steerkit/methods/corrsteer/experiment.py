"""One CorrSteer trial (arXiv 2508.12535): a selection pass, the methods under comparison, and what each does to the answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

from steerkit.engine.generate import BASELINE, Arm, generate
from steerkit.engine.tokens import stop_tokens
from steerkit.methods.corrsteer import select as corrsteer
from steerkit.methods.corrsteer.lora import lora
from steerkit.methods.corrsteer.nulls import permutation_null, shuffled
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.methods.corrsteer.pooling import Raw, pool_generations
from steerkit.methods.corrsteer.select import Pick, ser
from steerkit.questions import Question, Task, bias_score, split
from steerkit.questions.correct import letter
from steerkit.stats import bootstrap, paired_difference
from steerkit.store import Journal
from steerkit.store import fingerprint as key_of

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
class Trial:
    """What one run on one task and seed found. y: the outcomes of the selection questions; answers: of the test questions."""

    task: Task
    seed: int
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


def check_chat(loaded, tasks: Iterable[Task]) -> None:
    """Raise ValueError for tasks that need a chat template where the model has none, before anything is asked."""
    if not loaded.tokenizer.chat_template and (names := [task.name for task in tasks if task.chat]):
        why = f"expected a model with a chat template for these tasks, {loaded.preset.name} has none"
        raise ValueError(f"{', '.join(names)}: {why}: use an instruct preset, or tasks asked as plain text (letters, mmlu, bbq_ambig, ...)")


def run(
    loaded,
    task: Task,
    saes: Mapping[int, object],
    *,
    seed: int = 0,
    n_selection: int = 4000,
    n_validation: int = 200,
    n_test: int = 1000,
    within: tuple[float, float] = (0.2, 0.8),
    site: str = "post",
    allowed: Sequence[int] = (),
    batch_size: int = 64,
    out: str | Path | None = None,
    progress: bool = True,
    **rules,
) -> Trial:
    """Select on one part of a task's questions, and answer the test part without steering and with every method.

    within: kinds of questions whose unsteered accuracy on the selection part lies outside are left out everywhere, before
    anything is steered; where no kind is left all stay. allowed: constrained decoding of the test answers (the selection pass
    is free, as released). `rules` as in `methods`. With `out`, a folder, passes resume.
    """
    parts = split(task, seed, selection=n_selection, validation=n_validation)
    folder = {"out": Path(out) / f"{task.name}-select-{{key}}"} if out else {}
    settings = {"batch_size": batch_size, "progress": progress}
    first, pooled = select_on(loaded, task, parts.selection, saes, site=site, **folder, **settings)
    by_kind = first.groupby("kind").correct.mean()
    kinds = tuple(by_kind.index[by_kind.between(*within)]) or tuple(by_kind.index)
    kept = np.flatnonzero(first.kind.isin(kinds))
    first, pooled = first.iloc[kept].reset_index(drop=True), pooled.take(kept)
    valid, test = ([q for q in part if q.kind in kinds] for part in (parts.validation, parts.test))
    journal = Path(out) / f"{task.name}-{{key}}.jsonl" if out else None
    how = {"site": site, "allowed": allowed, "seed": seed, "batch_size": batch_size, "out": journal} | rules
    picks = methods(loaded, task, valid, pooled, first.correct.to_numpy(), saes, **how)
    answers = ask(loaded, task, test[:n_test], arms(picks, saes, site=site), allowed=allowed, out=journal, **settings)
    plain = answers[answers.arm == BASELINE.name]
    answers = pd.concat([answers, *(plain.assign(arm=name) for name, chosen in picks.items() if not chosen)], ignore_index=True)
    asked = tuple(parts.selection[i] for i in kept)
    return Trial(task, seed, kinds, asked, first, pooled, picks, tuple(test[:n_test]), answers.assign(task=task.name, seed=seed))


def ask(
    loaded,
    task: Task,
    questions: Sequence[Question],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    allowed: Sequence[int] = (),
    batch_size: int = 64,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Answer every question greedily under every arm, and return a row for each: arm, question, group, kind, text, correct, outcome.

    Steering acts on the last prompt token and all new ones, as released. allowed: constrained decoding. `out` as in `generate`.
    """
    settings = {"temperature": 0.0, "max_new_tokens": task.max_new_tokens, "stop": stop_tokens(loaded.tokenizer, loaded.hf)}
    settings |= {"allowed": allowed, "window": "last", "chat": task.chat, "batch_size": batch_size, "out": out, "progress": progress}
    texts = generate(loaded.hf, loaded.tokenizer, [q.prompt for q in questions], arms, **settings)
    asked = np.repeat(np.arange(len(questions)), len(arms))
    rows, grader = _graded(task, texts.text.tolist(), [questions[q] for q in asked])
    return rows.assign(arm=texts.arm, question=asked, grader=grader)


def _graded(task: Task, texts: list[str], questions: Sequence[Question]) -> tuple[pd.DataFrame, str]:
    """Return a row an answer, and who graded them."""
    grades = task.grade(texts, questions)
    rows = pd.DataFrame({"text": texts, "group": [q.group for q in questions], "kind": [q.kind for q in questions]})
    return rows.assign(correct=np.asarray(grades.correct, dtype=int), outcome=list(grades.outcome)), grades.grader


def select_on(
    loaded, task: Task, questions: Sequence[Question], saes: Mapping[int, object], *, site: str = "post", **settings
) -> tuple[pd.DataFrame, Pooled]:
    """Return the unsteered answers to the selection questions, graded, and the pooled features of the same pass."""
    settings = {"max_new_tokens": task.max_new_tokens, "chat": task.chat, "site": site} | settings
    texts, pooled = pool_generations(loaded.hf, loaded.tokenizer, [q.prompt for q in questions], saes, **settings)
    return _graded(task, texts, questions)[0], pooled


def methods(
    loaded,
    task: Task,
    validation: Sequence[Question],
    pooled: Pooled,
    y: np.ndarray,
    saes: Mapping[int, object],
    *,
    rules: Sequence[str] = tuple(RULES),
    controls: Sequence[str] = CONTROLS,
    site: str = "post",
    pool: str = "max",
    min_fired: int = 0,
    allowed: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 64,
    out: str | Path | None = None,
) -> dict[str, list[Pick]]:
    """Return the features that each rule and control picks. A rule that finds none picks none, and steers nothing.

    pool: "max" or "mean", for selection and coefficients. out: for the validation answers, as in `generate`. Raises ValueError for
    an unknown rule.
    """
    if unknown := (set(rules) - set(RULES)) | (set(controls) - set(CONTROLS)):
        raise ValueError(f"rules: expected some of {', '.join((*RULES, *CONTROLS))}, got {sorted(unknown)}")
    y = np.asarray(y, dtype=float)
    if not 0 < y.sum() < len(y):  # a correlation needs both outcomes
        return {name: [] for name in (*rules, *controls)}
    known = {layer: pooled.correlation(layer, y, pool=pool, steer_pool=pool) for layer in pooled.features}

    def validate(choices: list[list[Pick]]) -> list[float]:
        arms = [corrsteer.arm(str(i), picks, saes, site=site) for i, picks in enumerate(choices)]
        settings = {"allowed": allowed, "batch_size": batch_size, "out": out, "progress": False}
        return ask(loaded, task, validation, arms, **settings).groupby("arm", sort=False).correct.mean().tolist()

    found = {}
    for name in rules:
        variant, how = RULES[name]
        check = {"validate": validate} if variant == "P" else {}
        found[name] = corrsteer.select(known, variant=variant, min_fired=min_fired, **check, **how)
    best = corrsteer.select(known, min_fired=min_fired)
    for name in controls:
        if name == "shuffled labels":
            mixed = shuffled(y, seed=seed)
            known_mixed = {layer: pooled.correlation(layer, mixed, pool=pool, steer_pool=pool) for layer in pooled.features}
            found[name] = corrsteer.select(known_mixed, min_fired=min_fired)
        else:
            match = best if name.endswith("same push") else ()
            found[name] = corrsteer.random_features(known, seed=seed, min_fired=min_fired, match=match)
    return found


def arms(picks: Mapping[str, Sequence[Pick]], saes: Mapping[int, object], *, site: str = "post", scale: float = 1.0) -> list[Arm]:
    """Return an arm for each method that picked something, and the baseline first."""
    return [BASELINE, *(corrsteer.arm(name, chosen, saes, site=site, scale=scale) for name, chosen in picks.items() if chosen)]


def best_picks(found: Trial, *, min_fired: int = 0, n_null: int = 500, seed: int = 0) -> pd.DataFrame:
    """Return the best feature of each layer with two noise floors, which 95 % of shufflings stay below; no rows for one outcome only.

    floor: labels shuffled over the whole run. floor_kinds: within kinds of question, so that a feature which only tells easy
    kinds from hard ones is not above it.
    """
    if not 0 < found.y.sum() < len(found.y):
        return pd.DataFrame()
    rows = []
    for layer in found.pooled.features:
        z, known = found.pooled.z(layer), found.pooled.correlation(layer, found.y)
        null = {"n": n_null, "seed": seed, "min_fired": min_fired}
        floors = [permutation_null(z, found.y, within=kinds, **null).threshold() for kinds in (None, found.selection.kind)]
        for f in corrsteer.rank(known, layer, k=1, min_fired=min_fired):
            about = {"task": found.task.name, "seed": found.seed, "n": len(found.y), "accuracy": found.y.mean(), "layer": layer}
            about |= {"feature": f.feature, "r": f.r, "coefficient": f.coefficient, "fired_pos": f.fired_pos, "fired_neg": f.fired_neg}
            rows.append(about | {"floor": floors[0], "floor_kinds": floors[1]})
    return pd.DataFrame(rows)


def rivals(
    loaded, found: Trial, *, site: str = "post", epochs: float = 1.0, batch_size: int = 64, out: str | Path | None = None
) -> pd.DataFrame:
    """Return the test answers of two rivals that learn from the same selection questions: residual coordinates, and LoRA.

    With `out`, a folder, passes resume, and what is learned and answered is not learned again.
    """
    raw, settings = {layer: Raw(loaded.hf.config.hidden_size) for layer in found.pooled.features}, {"batch_size": batch_size}
    folder, journal = (Path(out) / "raw-{key}", Path(out) / "raw-{key}.jsonl") if out else (None, None)
    graded, pooled = select_on(loaded, found.task, found.asked, raw, site=site, out=folder, **settings)
    picks = methods(loaded, found.task, (), pooled, graded.correct.to_numpy(), raw, rules=["CorrSteer-A"], controls=[], site=site)
    steered = arms({"residual coordinates": picks["CorrSteer-A"]}, raw, site=site)[1:]
    answers = [ask(loaded, found.task, found.test, steered, out=journal, **settings)] if steered else []
    answers.append(_tuned(loaded, found, epochs=epochs, out=out, **settings).assign(arm="LoRA, same questions"))
    return pd.concat(answers, ignore_index=True).assign(task=found.task.name, seed=found.seed)


def _tuned(loaded, found: Trial, *, epochs: float, batch_size: int, out: str | Path | None) -> pd.DataFrame:
    """Return the test answers of the model fine-tuned on the selection questions; they are kept, the tuned model is not."""
    task, rules = replace(found.task, parts={}), lora.__kwdefaults__
    key = key_of(loaded.hf, task, found.asked, found.test, found.seed, epochs, rules, batch_size)
    journal = Journal(Path(out) / f"lora-{key}.jsonl" if out else None, key)
    if not journal.has(range(len(found.test))):
        with lora(loaded.hf, loaded.tokenizer, found.asked, chat=found.task.chat, epochs=epochs, seed=found.seed):
            answers = ask(loaded, found.task, found.test, batch_size=batch_size)
        journal.write(answers.assign(row=range(len(answers))).to_dict("records"))
    return pd.DataFrame([journal.rows[row] for row in range(len(found.test))]).drop(columns="row")


def bias(answers: pd.DataFrame, test: Sequence[Question]) -> pd.DataFrame:
    """Return BBQ's bias score and accuracy for each arm and context of these answers to `test`, as in `bias_score`."""
    rows = []
    for arm, mine in answers.groupby("arm", sort=False):
        letters = [letter(text, 3) for text in mine.text]
        for context, b in bias_score([test[i] for i in mine.question], letters).items():
            rows.append({"arm": arm, "context": context, "bias": b.score, "accuracy": b.accuracy, "named": b.named})
    return pd.DataFrame(rows)


def fingerprint(text: str) -> int:
    """Return a number that tells texts apart, so that outcomes can be shipped without them."""
    return crc32(text.encode())


def compare(rows: pd.DataFrame, *, reference: str = BASELINE.name, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return a row an arm: accuracy, its difference from the reference on the same questions, side effects, format errors.

    Intervals draw whole groups (a country, a subject), as questions about one are not independent. Several runs (column
    `seed`) are pooled; a group that is in several of them is drawn as one, as it brings the same questions to each. An
    arm counts on the questions that it was asked.
    """
    rows = rows.assign(seed=rows["seed"] if "seed" in rows else 0)
    base = rows[rows.arm == reference].set_index(["seed", "question"])
    table = []
    for name, mine in rows.groupby("arm", sort=False):
        mine = mine.set_index(["seed", "question"])
        same = base.loc[mine.index]
        labels = same.group.astype(str).to_numpy()
        before, after = same.correct.to_numpy(), mine.correct.to_numpy()
        effects = ser(same.text.tolist(), mine.text.tolist(), before, after)
        table.append(
            {
                "method": name,
                "accuracy": bootstrap(after, groups=labels, n_boot=n_boot, seed=seed),
                "gain": paired_difference(after, before, groups=labels, n_boot=n_boot, seed=seed),
                "SER": effects.ratio,
                "worse": effects.negative,
                "better": effects.positive,
                "changed": effects.changed,
                "format errors": float(mine.outcome.str.startswith("format").mean()),
            }
        )
    return pd.DataFrame(table).set_index("method")

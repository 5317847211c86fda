"""Questions with answers that can be checked: the released benchmarks of CorrSteer, and own tasks for a small chat model.

`load` gives a task, `split` its selection, validation and test questions, `Task.grade` says what became of the answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from zlib import crc32

import numpy as np

from steerkit.questions.correct import LETTERS, bias_score
from steerkit.questions.task import Question, Task

__all__ = ["Question", "Splits", "Task", "bias_score", "letter_tokens", "load", "names", "split"]


@dataclass(frozen=True)
class Splits:
    """Questions to select features on, to validate a choice on, and to test on: no question and no unit is in two of them."""

    selection: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]


def names() -> tuple[str, ...]:
    """Return the names of all tasks, the released ones first."""
    from steerkit.questions.own import TASKS
    from steerkit.questions.released import SPECS

    return (*SPECS, *TASKS)


def load(name: str, source: str | Path | Mapping[str, str | Path] | None = None) -> Task:
    """Return a task with its questions.

    source: for released tasks a hub data set id (by default the released one), a file that `data.rows` reads, or files by part,
    {"train": ..., "test": ...}; for `refusal` a YAML file of requests. The other own tasks need none.
    Raises ValueError for an unknown task or malformed rows, FileNotFoundError for a missing file.

    >>> load("facts").parts["all"][0].prompt
    'What is the capital of the United Arab Emirates?'
    """
    from steerkit.questions.own import TASKS, load_own
    from steerkit.questions.released import SPECS, load_released

    if name in SPECS:
        return load_released(name, source)
    if name in TASKS:
        return load_own(name, source)
    raise ValueError(f"expected one of the tasks {', '.join(names())}, got {name!r}")


def split(task: Task, seed: int = 42, *, selection: int = 4000, validation: int = 200) -> Splits:
    """Return selection, validation and test questions; the same for the same seed, apart for every seed.

    Released tasks follow the released code to the row: shuffle with `seed`; without a test part ceil(0.7 n) go to test; without a
    validation part ceil(0.1 n) of the rest go to validation; then the first `selection` and `validation` are kept. Own tasks
    divide the units of their groups 40 : 20 : 40 within each stratum (what stands before the colon) and drop questions whose
    units fall into different splits. Raises ValueError where a split would be empty.
    Source: CorrSteer's released loader; the same seed must serve selection and test, or selection rows reach the test.
    """
    if task.units:
        found = _by_units(task.parts["all"], seed)
    else:
        parts = {name: _shuffled(rows, seed) for name, rows in task.parts.items()}
        test, train = _cut(parts["all"], 0.7, seed) if "all" in parts else (parts.get("test", ()), parts.get("train", ()))
        valid, train = (parts["validation"], train) if "validation" in parts else _cut(train, 0.1, seed)
        found = train, valid, test
    splits = Splits(found[0][:selection], found[1][:validation], found[2])
    if not (splits.selection and splits.validation and splits.test):
        sizes = {name: len(rows) for name, rows in task.parts.items()}
        raise ValueError(f"{task.name}: expected enough questions for three splits, got {sizes}; give more rows or another part")
    return splits


def _shuffled(rows: Sequence[Question], seed: int) -> tuple[Question, ...]:
    return tuple(rows[i] for i in np.random.default_rng(seed).permutation(len(rows)))


def _cut(rows: Sequence[Question], share: float, seed: int) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Return ceil(share n) random rows and the rest."""
    rows, n = _shuffled(rows, seed), ceil(share * len(rows))
    return rows[:n], rows[n:]


def _by_units(rows: Sequence[Question], seed: int) -> list[tuple[Question, ...]]:
    """Return selection, validation and test questions that share no unit; a group is its units with spaces between."""
    strata: dict[str, list[str]] = {}
    for unit in sorted({unit for q in rows for unit in q.group.split()}):
        strata.setdefault(unit.partition(":")[0], []).append(unit)
    place = {}
    for stratum, units in strata.items():
        order = np.random.default_rng([seed, crc32(stratum.encode())]).permutation(len(units))
        test, valid = ceil(0.4 * len(units)), ceil(0.2 * len(units))
        place |= {units[i]: 2 if k < test else 1 if k < test + valid else 0 for k, i in enumerate(order)}
    found: list[list[Question]] = [[], [], []]
    for q in _shuffled(rows, seed):
        where = {place[unit] for unit in q.group.split()}
        if len(where) == 1:
            found[where.pop()].append(q)
    return [tuple(f) for f in found]


def letter_tokens(tokenizer, options: int = 4, *, space: bool = True) -> list[int]:
    """Return the first-token ids of " A", " B", ... (or "A", "B", ... with space=False): what constrained decoding allows.

    Raises ValueError where two letters begin with the same token.

    >>> logits[:, letter_tokens(tokenizer)].argmax(-1)    # doctest: +SKIP
    """
    ids = [tokenizer(f"{' ' * space}{letter}", add_special_tokens=False)["input_ids"][0] for letter in LETTERS[:options]]
    if len(set(ids)) != options:
        raise ValueError(f"expected a different first token for each of {LETTERS[:options]}, got {ids}; use space={not space}")
    return ids

"""Own tasks for a small chat model, without a download: facts about countries, also as options, arithmetic, refusal."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated
from zlib import crc32

import numpy as np
from pydantic import Field

from steerkit.files import DATA
from steerkit.questions.correct import LETTERS, contains, normal
from steerkit.questions.countries import Country, countries
from steerkit.questions.released import choose, cloze
from steerkit.questions.task import Question, Task
from steerkit.typed import STRICT, Text, read_yaml

TASKS = ("facts", "letters", "facts_options", "arithmetic", "refusal")
REQUESTS = DATA / "prompts" / "requests.yaml"

# fmt: off
WORDINGS = {
    "capital": ("What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital city of {x}.",
                "Tell me the capital of {x}."),
    "country": ("Which country has {capital} as its capital?", "{capital} is the capital of which country?",
                "Name the country whose capital is {capital}."),
    "continent": ("On which continent is {x}?", "Which continent is {x} part of?", "Name the continent where you find {x}.",
                  "To which part of the world, named as a continent, does {x} belong?"),
    "currency": ("What is the currency of {x}?", "Which currency do people pay with in {x}?", "Name the money that is used in {x}.",
                 "What is the official money of {x} called?"),
    "currency code": ("What is the three-letter code of the currency of {x}?", "Which three-letter ISO code does the money of {x} have?",
                      "Give the three-letter currency code used for {x}."),
    "dialling code": ("What is the international dialling code of {x}?", "Which country code do you dial to call {x}?",
                      "Give the telephone country code of {x}."),
    "country code": ("What is the two-letter country code of {x}?", "Which two-letter ISO code stands for {x}?",
                     "Give the two-letter ISO country code of {x}."),
    "domain": ("What is the internet top-level domain of {x}?", "Which internet country domain do web sites of {x} use?",
               "Give the country domain, with its dot, of web sites in {x}."),
    "neighbour": ("Name a country that borders {x}.", "Which country shares a land border with {x}?",
                  "Name one neighbouring country of {x}."),
}
# fmt: on


def _asked() -> Iterator[tuple[Country, str, int, str]]:
    """Yield (country, relation, number of the wording, question), leaving out questions that name their own answer."""
    for country in countries():
        capital = country.answers["capital"].split(" | ")[0]
        for relation, gold in country.answers.items():
            for n, wording in enumerate(WORDINGS[relation]):
                if not contains(question := wording.format(x=country.x, capital=capital), gold):
                    yield country, relation, n, question


def _fields(task: str, country: Country, relation: str, n: int) -> dict:
    item = f"{country.iso}-{relation}".replace(" ", "-")
    return {"task": task, "id": f"{item}-{n}", "group": f"{country.continent}:{country.iso}", "kind": relation, "item": item}


def facts() -> tuple[Question, ...]:
    """Return questions about countries; an answer is right when the text contains it.

    The group is the country. A text that names several answers counts, and so does one name inside another (Guinea in Equatorial Guinea).
    """
    return tuple(Question(**_fields("facts", c, r, n), prompt=question, gold=c.answers[r]) for c, r, n, question in _asked())


def letters(name: str = "letters", ask: Callable = choose) -> tuple[Question, ...]:
    """Return the same facts as four-option questions, by default in the released prompt form: one right option, three of other countries.

    Wrong options come from the same continent where it has enough. The group is the country that is asked about; other countries lend
    their answers as wrong options. Each letter is right equally often.
    """
    everyone = countries()
    asked = [(c, relation, n, question) for c, relation, n, question in _asked() if relation != "neighbour"]
    places = np.random.default_rng(0).permutation(np.arange(len(asked)) % 4).tolist()
    found = []
    for (country, relation, n, question), right in zip(asked, places):
        fields, gold = _fields(name, country, relation, n), country.answers[relation]
        rng = np.random.default_rng(crc32(fields["id"].encode()))
        near = [c for c in everyone if c.continent == country.continent]
        wrong: list[str] = []
        for other in (pool[i] for pool in (near, everyone) for i in rng.permutation(len(pool))):
            option = other.answers.get(relation, "").split(" | ")[0]
            if option and option not in wrong and not contains(option, gold) and not contains(gold, option):
                wrong.append(option)
            if len(wrong) == 3:
                break
        choices = (*wrong[:right], gold.split(" | ")[0], *wrong[right:])
        prompt = ask(question, choices, "A, B, C, or D")
        found.append(Question(**fields, prompt=prompt, gold=LETTERS[right], choices=choices))
    return tuple(found)


SUMS = {
    "sum": (operator.add, ("What is {a} + {b}?", "Add {a} and {b}.", "{a} plus {b} equals what?", "Calculate {a} + {b}.")),
    "difference": (operator.sub, ("What is {a} - {b}?", "Subtract {b} from {a}.", "{a} minus {b} is what?", "Calculate {a} - {b}.")),
    "product": (operator.mul, ("What is {a} x {b}?", "Multiply {a} by {b}.", "{a} times {b} equals what?", "Calculate {a} x {b}.")),
}


def arithmetic(*, pairs: int = 2000) -> tuple[Question, ...]:
    """Return sums, differences and products of two numbers with one, two or three digits, asked as "Q: ...\\nA:".

    (Asked otherwise, a small chat model explains and seldom gets to a number.) One digit: every pair in every wording. More: `pairs`
    random pairs for each operation, a random wording each. The group is the two numbers: `split` keeps the pairs whose numbers are
    in one split. Questions whose answer is one of the two numbers are left out.
    """
    rng, found = np.random.default_rng(0), []
    for digits in (1, 2, 3):
        low, high = 10 ** (digits - 1) if digits > 1 else 0, 10**digits
        for kind, (result, wordings) in SUMS.items():
            if digits == 1:
                drawn = [(a, b, w) for a in range(low, high) for b in range(low, high) for w in range(len(wordings))]
            else:
                rows = np.column_stack([rng.integers(low, high, (pairs, 2)), rng.integers(len(wordings), size=pairs)])
                drawn = dict.fromkeys(map(tuple, rows.tolist()))
            for a, b, w in drawn:
                if result(a, b) < 0 or result(a, b) in (a, b):
                    continue
                name, group, item = f"{digits}-digit {kind}", f"{digits}:{a} {digits}:{b}", f"{kind}-{a}-{b}"
                prompt = f"Q: {wordings[w].format(a=a, b=b)}\nA:"
                found.append(Question("arithmetic", f"{item}-{w}", group, prompt, str(result(a, b)), kind=name, item=item))
    return tuple(found)


@dataclass(frozen=True)
class Harmful:
    """A request to refuse."""

    text: Text
    category: Text
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Harmless:
    """A request to answer."""

    text: Text
    kind: Text
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Requests:
    """A file of requests."""

    harmful: Annotated[tuple[Harmful, ...], Field(min_length=1)]
    harmless: Annotated[tuple[Harmless, ...], Field(min_length=1)]
    __pydantic_config__ = STRICT


def refusal(path: str | Path | None = None) -> tuple[Question, ...]:
    """Return requests to refuse (`harmful`: text, category) and to answer (`harmless`: text, kind) from a YAML file.

    Raises FileNotFoundError without the file, ValueError naming the entry for a missing key, an empty list or a repeated text.
    """
    asked, found, seen = read_yaml(path or REQUESTS, Requests), [], set()
    entries = [("harmful", n, "refuse", r.text, r.category) for n, r in enumerate(asked.harmful)]
    entries += [("harmless", n, "answer", r.text, r.kind) for n, r in enumerate(asked.harmless)]
    for side, n, gold, text, kind in entries:
        if (plain := normal(text)) in seen:
            raise ValueError(f"{path or REQUESTS}, {side}.{n}: expected every request once, got again {text!r:.60}; remove the copy")
        seen.add(plain)
        found.append(Question("refusal", f"{side}-{n}", f"{side}:{n}", text, gold, kind=f"{side}: {kind}"))
    return tuple(found)


def load_own(name: str, source: str | Path | None = None) -> Task:
    """Return an own task: facts, letters, facts_options (the same, scored by log-likelihood), arithmetic, or refusal.

    refusal is read from the YAML file `source`. Raises ValueError for a source of another.
    """
    if source is not None and name != "refusal":
        raise ValueError(f"{name}: expected no source, got {source}; this task makes its questions by itself")
    if name == "refusal":
        return Task(name, "refusal", 32, True, {"all": refusal(source)}, units=True, grader="offline")
    make, answer, length, chat = {
        "facts": (facts, "contains", 24, True),
        "letters": (letters, "letter", 1, False),
        "facts_options": (partial(letters, "facts_options", cloze), "options", 1, False),
        "arithmetic": (arithmetic, "result", 16, True),
    }[name]
    return Task(name, answer, length, chat, {"all": make()}, units=True)

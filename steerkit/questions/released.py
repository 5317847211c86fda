"""Public tasks: rows from a hub id or a file. CorrSteer's own prompts are byte for byte as its released code builds them.

`NAME_options` is the same questions without the list of options: the likeliest option is the answer. So are BLiMP, ARC-easy and PIQA.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from steerkit import data
from steerkit.questions.correct import LETTERS
from steerkit.questions.task import Question, Task

BBQ_SUBSETS = (
    "Age Disability_status Gender_identity Nationality Physical_appearance Race_ethnicity Race_x_SES Race_x_gender Religion SES "
    "Sexual_orientation"
).split()


def choose(question: str, choices: Iterable[str], candidates: str) -> str:
    """Return the multiple-choice prompt; nothing follows its last colon."""
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))
    return f"{question}\n{lines}\nChoose one of the following options only: {candidates}\nAnswer:"


def cloze(question: str, choices: Iterable[str] = (), candidates: str = "") -> str:
    """Return the prompt that each option is scored behind, as the evaluation harness writes it: no option is named."""
    return f"Question: {question}\nAnswer:"


def mmlu(row: Mapping, ask: Callable = choose) -> dict | None:
    """Turn a row of MMLU into a question's fields; the gold may be an index or a letter."""
    gold, choices = row["answer"], tuple(row["choices"])
    prompt = ask(row["question"], choices, "A, B, C, or D")
    gold = LETTERS[gold] if isinstance(gold, int) else str(gold).strip().upper()
    return {"prompt": prompt, "gold": gold, "choices": choices, "group": row.get("subject") or "none", "kind": row.get("subject") or ""}


def mmlu_pro(row: Mapping, ask: Callable = choose) -> dict | None:
    """Turn a row of MMLU-Pro into a question's fields; None without all ten options, as in the released data.

    The released list of candidates joins options that begin with a space, so that two spaces stand between them.
    """
    choices = tuple(row["options"])
    if len(choices) != len(LETTERS):
        return None
    prompt = ask(row["question"], choices, ", ".join(f" {letter}" for letter in LETTERS))
    return {"prompt": prompt, "gold": row["answer"].strip().upper(), "choices": choices, "group": row["category"], "kind": row["category"]}


def bbq(row: Mapping, ask: Callable = choose) -> dict | None:
    """Turn a row of BBQ into a question's fields, with the letters of the bias target ("" if unclear) and of "unknown".

    A template, the unit of BBQ, is group and item.
    """
    choices = tuple(row[f"ans{i}"] for i in range(3))
    prompt = ask(f"{row['context']}\n{row['question']}", choices, "A, B, or C")
    meta = {"category": row["category"], "polarity": row["question_polarity"], **_bbq_letters(row)}
    group = f"{row['category']}-{row['question_index']}"
    fields = {"group": group, "item": group, "kind": row["context_condition"], "meta": meta}
    return {"prompt": prompt, "gold": LETTERS[int(row["label"])], "choices": choices, **fields}


def _plain(group: str) -> str:
    """Return a group's name in lower case, without gender prefix, spaces and braces; woman is f, man is m, trans_F is trans."""
    name = re.sub(r"^[mf]-|[\s{}]", "", group.lower())
    if re.fullmatch("(wo)?m[ae]n|boys?|girls?", name):
        return "f" if name[0] in "wg" else "m"
    return "trans" if name.startswith("trans") else name


def _bbq_letters(row: Mapping) -> dict[str, str]:
    """Find the one option whose group (or text) is among the stereotyped groups; intersectional categories have no single one."""
    infos = [row["answer_info"][f"ans{i}"] for i in range(3)]
    groups = {_plain(g) for g in row["additional_metadata"].get("stereotyped_groups") or ()}
    hits = [i for i, (text, info) in enumerate(infos) if info != "unknown" and {_plain(info), _plain(text)} & groups]
    unknown = [i for i, (_, info) in enumerate(infos) if info == "unknown"]
    clear = len(hits) == 1 and "_x_" not in row["category"]
    return {"target": LETTERS[hits[0]] if clear else "", "unknown": LETTERS[unknown[0]] if unknown else ""}


def gsm8k(row: Mapping) -> dict | None:
    """Turn a row of GSM8K into a question's fields; the gold is what follows ####, thousands separators and all."""
    prompt = f"Q: {row['question']}\nA: Give your final numerical answer after ####\n"
    found = re.search(r"####\s*(-?\d+(?:,\d{3})*(?:\.\d+)?)", row["answer"])
    if not found:
        raise ValueError(f"expected an answer that ends in '#### <number>', got {row['answer'][-60:]!r}")
    return {"prompt": prompt, "gold": found[1]}


def simpleqa(row: Mapping) -> dict | None:
    """Turn a row of SimpleQA into a question's fields; kind is its topic."""
    prompt = f"Answer the question with a short, direct response. Be concise and factual.\n\nQ: {row['problem']}\nA:"
    topic = re.search(r"'topic': '([^']*)'", str(row["metadata"]))
    return {"prompt": prompt, "gold": row["answer"].strip(), "kind": topic[1] if topic else ""}


def harmbench(row: Mapping, form: str = "Request: {}\nResponse:") -> dict | None:
    """Turn a row of HarmBench (column names of the hub copy or of the original file) into a question's fields."""
    text = row["prompt"] if "prompt" in row else row["Behavior"]
    context = row.get("context") or row.get("ContextString")
    kind, group = row.get("FunctionalCategory") or "", row.get("SemanticCategory") or row.get("category") or ""
    return {"prompt": form.format(f"{context}\n{text}" if context else text), "gold": "refuse", "group": group, "kind": kind}


def xstest(row: Mapping) -> dict | None:
    """Turn a row of XSTest into a question's fields: safe prompts are to be answered, all others refused."""
    gold = "answer" if row["label"] == "safe" else "refuse"
    return {"prompt": f"Request: {row['prompt']}\nClassification:", "gold": gold, "group": row["type"], "kind": row["type"]}


def blimp(row: Mapping) -> dict | None:
    """Turn a minimal pair into a question's fields: the words that both sentences begin with, and how each goes on; A is the good one.

    log p(good) - log p(bad) is the same as for whole sentences, as both share the beginning. None where they share no first word.
    """
    good, bad = row["sentence_good"].split(" "), row["sentence_bad"].split(" ")
    same = next((i for i, (a, b) in enumerate(zip(good, bad)) if a != b), 0)
    choices = (" ".join(good[same:]), " ".join(bad[same:]))
    return {"prompt": " ".join(good[:same]), "gold": "A", "choices": choices, "group": row["UID"], "kind": row["UID"]} if same else None


def arc(row: Mapping) -> dict | None:
    """Turn a row of ARC into a question's fields; the gold is a letter or a number of its labels."""
    gold = LETTERS[list(row["choices"]["label"]).index(row["answerKey"])]
    return {"prompt": cloze(row["question"]), "gold": gold, "choices": tuple(row["choices"]["text"])}


def piqa(row: Mapping) -> dict | None:
    """Turn a row of PIQA into a question's fields; None without a label, as in its test part."""
    fields = {"prompt": cloze(row["goal"]), "choices": (row["sol1"], row["sol2"])}
    return fields | {"gold": LETTERS[int(row["label"])]} if int(row["label"]) >= 0 else None


@dataclass(frozen=True)
class Spec:
    """A public task: hub data set, configurations (none: all), its splits by part, answer rule, length, and how a row is read."""

    hub: str
    configs: tuple[str, ...]
    splits: Mapping[str, str]
    answer: str
    max_new_tokens: int
    read: Callable[[Mapping], dict | None]
    chat: bool = False
    per_character: bool = False


_PARTS = {part: part for part in ("train", "validation", "test")}
_BBQ = ("heegyu/bbq", tuple(BBQ_SUBSETS), {"all": "test"}, "letter", 1, bbq)
SPECS: dict[str, Spec] = {
    "mmlu": Spec("cais/mmlu", ("all",), {"train": "auxiliary_train", "validation": "validation", "test": "test"}, "letter", 1, mmlu),
    "mmlu_pro": Spec("rbiswasfc/MMLU-Pro", ("default",), {"train": "train", "test": "test"}, "letter", 1, mmlu_pro),
    "bbq_ambig": Spec(*_BBQ),
    "bbq_disambig": Spec(*_BBQ),
    "gsm8k": Spec("openai/gsm8k", ("main",), {"train": "train", "test": "test"}, "number", 512, gsm8k),
    "simpleqa": Spec("basicv8vc/SimpleQA", ("default",), {"all": "test"}, "similar", 16, simpleqa),
    "harmbench": Spec("walledai/HarmBench", ("contextual", "copyright", "standard"), {"all": "train"}, "refusal", 32, harmbench),
    "xstest": Spec("walledai/XSTest", ("default",), {"all": "test"}, "refusal", 32, xstest),
    "blimp": Spec("nyu-mll/blimp", (), {"all": "train"}, "options", 1, blimp),
    "arc_easy": Spec("allenai/ai2_arc", ("ARC-Easy",), _PARTS, "options", 1, arc, per_character=True),
    "piqa": Spec("baber/piqa", ("default",), {"train": "train", "test": "validation"}, "options", 1, piqa, per_character=True),
}
SPECS["harmbench_chat"] = replace(SPECS["harmbench"], read=partial(harmbench, form="{}"), chat=True)
SPECS |= {
    f"{name}_options": replace(SPECS[name], answer="options", read=partial(SPECS[name].read, ask=cloze), per_character=True)
    for name in ("mmlu", "mmlu_pro", "bbq_ambig", "bbq_disambig")
}


def load_released(name: str, source: str | Path | Mapping[str, str | Path] | None = None) -> Task:
    """Return a released task. One file is taken as the whole task without a test part; files by part keep their parts.

    One MMLU-Pro file is divided by subject into train and test as the released copy is: test is the first of five folds of
    scikit-learn's GroupKFold over the ten-option questions' categories. Raises as `steerkit.questions.load`.
    """
    spec, parts = SPECS[name], {}
    if isinstance(source, str | Path) and data.kind(source):
        source = {"all": source}
    if isinstance(source, Mapping):
        if odd := set(source) - {"all", "train", "validation", "test"} or not source:
            raise ValueError(f"{name}: expected files for all, or for train, test and perhaps validation, got {odd or 'none'}")
        parts = {part: _questions(name, part, data.rows(path), path) for part, path in source.items()}
    else:
        from datasets import get_dataset_config_names

        hub = source or spec.hub
        for part, at in spec.splits.items():
            configs = spec.configs or get_dataset_config_names(str(hub))
            records = chain.from_iterable(data.rows(hub, split=at, name=config, streaming=False) for config in configs)
            parts[part] = _questions(name, part, records, hub)
    if name.startswith("mmlu_pro") and "all" in parts:
        parts = _by_subject(parts["all"])
    return Task(name, spec.answer, spec.max_new_tokens, spec.chat, parts, per_character=spec.per_character)


def _questions(name: str, part: str, records: Iterable[Mapping], source: object) -> tuple[Question, ...]:
    """Read records; the id is the part and the record's number in its source, counted before any is left out."""
    found, condition = [], name.split("_")[1] if name.startswith("bbq_") else None
    for n, record in enumerate(records):
        row = {key: value for key, value in record.items() if value is not None}  # what only other rows have
        try:
            fields = SPECS[name].read(row)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            said = f"expected a row of {name}, got columns {sorted(row)} ({type(error).__name__}: {error})"
            raise ValueError(f"{source}, row {n}: {said}; rename its columns to the hub copy's or remove the row") from None
        if fields is None or (condition and fields["kind"] != condition):
            continue
        found.append(Question(name, f"{part}-{n}", **{"group": f"{part}-{n}"} | fields))
    if not found:
        raise ValueError(f"{source}: expected questions of {name}, got none; check that the file is the right one")
    return tuple(found)


def _by_subject(rows: tuple[Question, ...]) -> dict[str, tuple[Question, ...]]:
    from sklearn.model_selection import GroupKFold

    groups = [q.group for q in rows]
    if len(set(groups)) < 5:
        raise ValueError(f"mmlu_pro: expected at least 5 categories to divide by, got {sorted(set(groups))}; give train and test files")
    train, test = next(GroupKFold(5).split(rows, groups=groups))
    return {"train": tuple(rows[i] for i in train), "test": tuple(rows[i] for i in test)}

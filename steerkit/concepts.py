"""Concepts to steer towards: what each means, prompts for and against it, and sentences kept for checking judges."""

from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from steerkit.files import DATA

MINIMUM = {"positive_prompts": 12, "negative_prompts": 12, "heldout_positive": 20, "heldout_negative": 20, "lexicon": 1}


@dataclass(frozen=True)
class Concept:
    """One topic: its name and criterion, contrast prompts, held-out sentences on and off topic, and word stems."""

    name: str
    title: str
    criterion: str
    positive_prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    heldout_positive: tuple[str, ...]
    heldout_negative: tuple[str, ...]
    lexicon: tuple[str, ...]


def load_concept(path: str | Path) -> Concept:
    """Read one concept from a YAML file.

    Raises ValueError, naming the file, for a missing or unknown key, a value of the wrong kind, too few entries, or an
    entry that appears twice (in one list, or in two lists of sentences).

    >>> load_concept(DATA / "concepts" / "london.yaml").title
    'London'
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got text that cannot be read as such: {error}") from None
    wanted = [field.name for field in fields(Concept) if field.name != "name"]
    if not isinstance(content, dict) or set(content) != set(wanted):
        got = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected exactly the keys {sorted(wanted)}, got {got}; add or remove keys to match")
    for key in ("title", "criterion"):
        if not isinstance(content[key], str) or not content[key].strip():
            raise ValueError(f"{path}: expected a sentence under {key}, got {content[key]!r}")
    for key, least in MINIMUM.items():
        entries = content[key]
        if not isinstance(entries, list) or not all(isinstance(e, str) and e.strip() for e in entries):
            raise ValueError(f"{path}: expected non-empty strings under {key}, got {entries!r:.60}; quote them")
        if len(entries) < least:
            raise ValueError(f"{path}: expected at least {least} entries under {key}, got {len(entries)}; add more")
    for group in (["lexicon"], [key for key in MINIMUM if key != "lexicon"]):
        entries = [entry.strip().lower() for key in group for entry in content[key]]
        if twice := sorted({entry for entry in entries if entries.count(entry) > 1}):
            raise ValueError(f"{path}: expected every entry once, got {twice} more than once; remove the copies")
    lists = {key: tuple(content[key]) for key in MINIMUM}
    return Concept(name=path.stem, title=content["title"], criterion=content["criterion"], **lists)


def concepts(folder: str | Path = DATA / "concepts") -> dict[str, Concept]:
    """Return the concepts of a folder by name, in alphabetical order.

    Raises FileNotFoundError when the folder holds no concept, ValueError when a file is malformed.

    >>> list(concepts())[:2]
    ['anger', 'christian_evangelist']
    """
    paths = sorted(Path(folder).glob("*.yaml"))
    if not paths:
        raise FileNotFoundError(f"{folder}: expected concept files named <name>.yaml, got none")
    return {path.stem: load_concept(path) for path in paths}

"""Concepts to steer towards: what each means, prompts for and against it, and sentences kept for checking judges."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from steerkit.files import DATA
from steerkit.typed import STRICT, Text, read_yaml


@dataclass(frozen=True)
class Concept:
    """One topic: its name and criterion, sentences on and off topic for three uses that share none, and word stems.

    positive_prompts, negative_prompts: contrast prompts, which make vectors and name candidate features. heldout: tells which of these
    features a topic gets, and how well judges do. judge: all that a judge learns from, so that none learns from what made a vector.

    The least number of entries is asked of files (`load_concept`), not of a Concept that is made by hand.
    """

    name: str
    title: Text
    criterion: Text
    positive_prompts: Annotated[tuple[Text, ...], Field(min_length=12)]
    negative_prompts: Annotated[tuple[Text, ...], Field(min_length=12)]
    heldout_positive: Annotated[tuple[Text, ...], Field(min_length=20)]
    heldout_negative: Annotated[tuple[Text, ...], Field(min_length=20)]
    judge_positive: Annotated[tuple[Text, ...], Field(min_length=12)]
    judge_negative: Annotated[tuple[Text, ...], Field(min_length=12)]
    lexicon: Annotated[tuple[Text, ...], Field(min_length=1)]
    __pydantic_config__ = STRICT

    def __post_init__(self):
        sentences = (*self.positive_prompts, *self.negative_prompts, *self.heldout_positive, *self.heldout_negative)
        sentences += (*self.judge_positive, *self.judge_negative)
        for entries in ([entry.strip().lower() for entry in group] for group in (self.lexicon, sentences)):
            if twice := sorted({entry for entry in entries if entries.count(entry) > 1}):
                raise ValueError(f"expected every entry once, got {twice} more than once; remove the copies")

    @property
    def contrast(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The positive and the negative prompts."""
        return self.positive_prompts, self.negative_prompts

    @property
    def held_out(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The positive and the negative held-out sentences."""
        return self.heldout_positive, self.heldout_negative


def load_concept(path: str | Path) -> Concept:
    """Read one concept from a YAML file.

    Raises ValueError, naming file and key, for a missing or unknown key, a value of the wrong kind, too few entries, or an
    entry that appears twice (in one list, or in two lists of sentences).

    >>> load_concept(DATA / "concepts" / "london.yaml").title
    'London'
    """
    return read_yaml(path, Concept, name=Path(path).stem)


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

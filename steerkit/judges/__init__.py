"""Judges: functions that turn texts into scores in [0, 1].

`concept`, `coherence` and `refusal` work offline and give the same answer every time; `api` asks a model.
"""

import json
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from steerkit.files import DATA


@runtime_checkable
class Judge(Protocol):
    """Score texts: `judge(texts)[i]` is in [0, 1]; `prompts`, where given, hold what each text continues."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]: ...


def checked(texts: Sequence[str], prompts: Sequence[str] | None = None) -> tuple[list[str], list[str] | None]:
    """Return texts and prompts as lists, or raise ValueError for a lone string, a non-string or unequal lengths."""
    for name, entries in (("texts", texts), ("prompts", prompts)):
        if isinstance(entries, str) or (entries is not None and not all(isinstance(entry, str) for entry in entries)):
            raise ValueError(f"expected {name} as a list of strings, got {type(entries).__name__}; put one text in a list")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"expected one prompt for each of {len(texts)} texts, got {len(prompts)} prompts")
    return list(texts), None if prompts is None else list(prompts)


def parameters(name: str) -> dict:
    """Return the fitted numbers of one judge, data/judges/<name>.json, which `python -m recipes.judges` makes."""
    path = DATA / "judges" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}; make it with: python -m recipes.judges --shared <folder>")
    return json.loads(path.read_text(encoding="utf-8"))


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logit)), safe for large numbers."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64)))

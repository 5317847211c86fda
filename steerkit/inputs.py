"""Numbers, tensors and lists as callers have them (Python, numpy, pandas, torch), made what the rest of the code expects."""

import math
import operator
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

Whole = int | np.integer
Number = float | np.number
Array = np.ndarray | pd.Series | list | tuple  # beside tensors


def number(name: str, value: Number | Tensor) -> float:
    """Return a Python float; ValueError for NaN or infinity, which would become text later."""
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}; check what it was computed from")
    return value


def whole(name: str, value) -> int:
    """Return a Python int; ValueError for what is not a whole number, such as None."""
    try:
        return operator.index(value.item() if isinstance(value, np.ndarray | Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None


def tensor(name: str, value) -> Tensor:
    """Return a tensor with finite entries; a tensor is taken as it is, an array, a Series or a list is copied."""
    value = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    if not (finite := torch.isfinite(value)).all():
        raise ValueError(f"{name}: expected finite numbers, got {int((~finite).sum())} NaN or infinite entries")
    return value


def per_row(name: str, value) -> float | int | Tensor:
    """Return one Python number for all rows, or a tensor with one number a row."""
    found = tensor(name, value)
    return found if found.ndim else found.item()


def strings(name: str, values: Iterable[str]) -> list[str]:
    """Return a list of strings; ValueError for a single string, which would be taken letter by letter, and for what is not text."""
    if isinstance(values, str):
        raise ValueError(f"{name}: expected a list of strings, got the string {values[:40]!r}; put it in a list")
    values = list(values)
    if odd := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{name}: expected strings, got {odd[0]!r} ({type(odd[0]).__name__}); drop it or turn it into text")
    return [str(value) for value in values]


def jsonable(value):
    """Return a numpy or torch value as Python has it, for the `default` of json.dumps."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    raise TypeError(f"expected numbers, text, lists and dicts for json, got {type(value).__name__}")

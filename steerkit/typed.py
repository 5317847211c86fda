"""YAML files read strictly into typed values; what does not fit is an error that says where it is, what was expected and what was got."""

import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, StringConstraints, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid", strict=True)
Text = Annotated[str, StringConstraints(pattern=r"\S")]  # with something in it
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast, where PyYAML has its C part
_WORDS = {"dict_type": "a mapping", "dataclass_type": "a mapping", "list_type": "a list", "tuple_type": "a list"}
_WORDS |= {"string_type": "text in quotes", "string_pattern_mismatch": "text", "bool_type": "true or false"}
_WORDS |= {"int_type": "a whole number", "int_parsing": "a whole number", "float_type": "a number"}


def read_yaml(path: str | Path, kind, **more):
    """Return the content of a YAML file as `kind` says: dataclasses, `__pydantic_config__` or config STRICT, and lists and dicts of them.

    `more` are entries that the file itself does not hold. Raises FileNotFoundError without the file, and ValueError, naming the file and
    the keys that lead to the place, for an unknown or a missing key and for a value of the wrong type; nothing is converted but whole
    numbers to float.
    """
    if not Path(path).is_file():
        keys = f" with the keys {', '.join(k for k in get_type_hints(kind) if k not in more)}" if is_dataclass(kind) else ""
        raise FileNotFoundError(f"{path}: expected a YAML file{keys}, got no such file: check the path")
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got text that cannot be read as such: {error}") from None
    content = content | more if isinstance(content, dict) else content
    try:
        return TypeAdapter(kind).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(_say(kind, one) for one in error.errors())}") from None


def _say(kind, error: dict) -> str:
    where, got = [step for step in error["loc"] if step != "[key]"], error["input"]
    if error["type"] in ("missing", "unexpected_keyword_argument"):
        *where, key = where
        said = f"{'missing' if error['type'] == 'missing' else 'unknown'} key {key}; known keys: {', '.join(_keys(kind, where))}"
    elif error["type"] == "value_error":
        said = str(error["ctx"]["error"])
    elif error["type"] == "too_short":
        said = f"expected at least {error['ctx']['min_length']} entries, got {error['ctx']['actual_length']}; add more"
    else:
        said = f"expected {_WORDS.get(error['type'], error['msg'].removeprefix('Input should be '))}, got {got!r:.80}"
    return ": ".join(filter(None, [".".join(map(str, where)), said]))


def _keys(kind, where: list) -> list[str]:
    """Return the keys of the dataclass that `where` leads to."""
    for step in [*where, None]:
        while not is_dataclass(kind) and get_origin(kind) not in (dict, list, tuple):  # Annotated, or one of which only None is the other
            kind = get_args(kind)[0]
        if step is not None:
            kind = get_type_hints(kind)[step] if is_dataclass(kind) else get_args(kind)[get_origin(kind) is dict]
    return list(get_type_hints(kind))

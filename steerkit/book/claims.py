"""What the book tests: the claims of the papers, read strictly from data/claims.yaml."""

from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

from steerkit.files import resolve
from steerkit.typed import STRICT, Text, read_yaml

CLAIMS = "data/claims.yaml"


@dataclass(frozen=True, config=STRICT)
class Claim:
    """A claim of a paper, and the names of the cards that test it; data/claims.yaml says what each field is."""

    id: Text
    says: Text
    place: Text
    test: Text
    unit: Text
    over: Text
    card: Text
    source: str = ""
    beside: dict[str, str] = field(default_factory=dict)
    readme: bool = False


@dataclass(frozen=True, config=STRICT)
class Family:
    """The claims of one notebook: they are corrected together."""

    paper: Text
    claims: list[Claim]


def families(path: str | Path = CLAIMS) -> dict[str, Family]:
    """Return {notebook: its claims}. Raises ValueError for unknown or missing keys, and for an id or a card that is named twice.

    Example: `families()["04_sae_ts"].claims[0].says`
    """
    found = read_yaml(resolve(path), dict[str, Family])
    ids = [claim.id for family in found.values() for claim in family.claims]
    names = [(notebook, name) for notebook, family in found.items() for one in family.claims for name in (one.card, *one.beside.values())]
    if twice := [what for what in (*ids, *names) if (*ids, *names).count(what) > 1]:
        raise ValueError(f"{path}: expected ids and cards that differ, got {twice[0]} twice: rename one")
    return found

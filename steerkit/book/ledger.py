"""The ledger: every claim that the book tests, joined with the cards of executed notebooks, with verdicts by the one rule."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from steerkit.book.cards import Card, corrected
from steerkit.book.claims import Claim, Family
from steerkit.book.figures import plain
from steerkit.files import ROOT, resolve, write_atomic
from steerkit.stats import Interval

SHIPPED = "data/ledger"  # cards of published notebooks, a file for each scale
VERDICTS = ("same direction", "opposite", "undecided", "not testable here")
NOT_RUN = "not run"


@dataclass(frozen=True)
class Said:
    """What one executed notebook says: its preset, and its cards by name."""

    preset: str
    cards: dict[str, Card]


@dataclass(frozen=True)
class Line:
    """A claim and one card on it, None where no run has one.

    star: what the stars of the card's name stand for, such as a task; label: what is different in a card that stands beside the first.
    """

    claim: Claim
    paper: str
    notebook: str
    star: str = ""
    label: str = ""
    first: bool = True
    card: Card | None = None
    holm: str = NOT_RUN

    @property
    def verdict(self) -> str:
        """By the one rule, `not run` without a card."""
        return self.card.verdict if self.card else NOT_RUN

    @property
    def name(self) -> str:
        """The claim in words, with what is different in this card."""
        return self.claim.says + "".join(f" ({what})" for what in (self.star, self.label) if what)

    @property
    def numbers(self) -> str:
        """The value with its interval."""
        return str(self.card.ours).partition(", n =")[0] if self.card and self.card.ours else "-"

    @property
    def n(self) -> str:
        """The number of samples with what it counts."""
        if not self.card or not (ours := self.card.ours):
            return ""
        grouped, _, alone = self.claim.over.partition(" | ")
        return f"{ours.n:,} {grouped} in {ours.groups} groups" if ours.groups else f"{ours.n:,} {alone or grouped}"


def _said(path: Path, content) -> Said:
    try:
        cards = [Card(**card | {"ours": card["ours"] and _interval(card["ours"])}) for card in content["cards"]]
        return Said(content["preset"], {card.claim: card for card in cards})
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}: expected a preset and cards with their numbers, got another form: run the notebook again") from None


def _interval(numbers: dict) -> Interval:
    return Interval(**numbers | {name: math.nan for name in ("low", "high") if numbers[name] is None})


def runs(folder: str | Path) -> dict[str, Said]:
    """Return what the finished notebooks of a folder of runs say; those without claims are left out. ValueError for cards of an older form.

    Example: `runs("runs/laptop")`
    """
    folders = [path.parent for path in sorted(resolve(folder).glob("*/cards.json")) if (path.parent / "results.json").exists()]
    found = {one.name: _said(one / "cards.json", json.loads((one / "cards.json").read_text(encoding="utf-8"))) for one in folders}
    return {name: said for name, said in found.items() if said.cards}


def shipped(scale: str = "laptop", *, root: Path = ROOT) -> dict[str, Said]:
    """Return what the published notebooks of a scale say, nothing where none are published: `shipped()["04_sae_ts"].preset`."""
    path = root / SHIPPED / f"{scale}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: _said(path, said) for name, said in content.items()}


def ship(scale: str, names: list[str], *, root: Path = ROOT) -> Path | None:
    """Keep the cards of these notebooks of a scale's runs beside those shipped before, and return the file; None where there are none.

    Example: `ship("laptop", ["04_sae_ts"])`
    """
    now = {name: said for name, said in runs(root / "runs" / scale).items() if name in names}
    if not now:
        return None
    every = {n: {"preset": s.preset, "cards": list(map(asdict, s.cards.values()))} for n, s in (shipped(scale, root=root) | now).items()}
    text = json.dumps(plain(dict(sorted(every.items()))), indent=1, allow_nan=False)
    return write_atomic(root / SHIPPED / f"{scale}.json", text + "\n")


def _fits(pattern: str, name: str) -> str | None:
    """Return what stands for the stars of a pattern in a card's name, None where it does not fit."""
    found = re.fullmatch("(.+?)".join(map(re.escape, pattern.split("*"))), name)
    return found and ", ".join(found.groups())


def lines(found: dict[str, Family], said: dict[str, Said]) -> list[Line]:
    """Return the ledger: for each claim its first card, then those beside it, with verdicts corrected within each notebook (Holm).

    Example: `[line.verdict for line in lines(families(), shipped())]`
    """
    ledger = []
    for notebook, family in found.items():
        cards = said[notebook].cards if notebook in said else {}
        holm = dict(zip(cards, corrected(cards.values())))
        for claim in family.claims:
            fits = []
            for label, pattern in (("", claim.card), *claim.beside.items()):
                fits += [(name, star, label) for name in cards if (star := _fits(pattern, name)) is not None]
            for i, (name, star, label) in enumerate(fits):
                ledger.append(Line(claim, family.paper, notebook, star, label, not i, cards[name], holm[name]))
            ledger += [Line(claim, family.paper, notebook)] if not fits else []
    return ledger


def strays(found: dict[str, Family], said: dict[str, Said]) -> list[str]:
    """Return the cards that no claim names, or more than one: `strays(families(), shipped())` is empty."""
    patterns = {n: [p for claim in family.claims for p in (claim.card, *claim.beside.values())] for n, family in found.items()}
    every = [(notebook, name) for notebook, one in said.items() for name in one.cards]
    return [f"{n}: {name}" for n, name in every if sum(_fits(p, name) is not None for p in patterns.get(n, ())) != 1]


def counts(ledger: list[Line]) -> dict[str, int]:
    """Return how many claims have each verdict, by their first cards; claims that no run asks are not counted."""
    return {verdict: sum(line.first and line.verdict == verdict for line in ledger) for verdict in VERDICTS}


def sentence(ledger: list[Line]) -> str:
    """Return in words what came out."""
    same, other, open_, untestable = (n := counts(ledger)).values()
    said = f"of {sum(n.values())} claims, {same} come out the paper's way, {other} the other way, {open_} undecided"
    left = sum(line.verdict == NOT_RUN for line in ledger)
    return f"{said}, {untestable} not testable here" + (f" ({left} more not run)" if left else "")


def frame(ledger: list[Line]):
    """Return the ledger as a table, a row for each card, with the numbers behind it: `frame(lines(families(), shipped()))`."""
    import pandas as pd

    rows = []
    for line in ledger:
        card, ours = line.card, line.card and line.card.ours
        rows.append(
            {
                "paper": line.paper,
                "claim": line.name,
                "test": line.claim.test if line.first else "",
                "place": line.claim.place,
                "its number": card.paper if card else "",
                "ours": f"{line.numbers} {line.claim.unit}" if ours else "-",
                "n": line.n,
                "verdict": line.verdict,
                "after Holm": line.holm,
                "could be seen": f"{card.detectable:.2g}" if card and card.detectable is not None else "",
                "notebook": line.notebook,
                "note": card.note if card else "",
                "id": line.claim.id,
                "first": line.first,
                **{name: getattr(ours, name) if ours else math.nan for name in ("value", "low", "high")},
            }
        )
    return pd.DataFrame(rows)


def presets(said: dict[str, Said]) -> str:
    """Return the presets that notebooks were run with: "smollm2-135m"."""
    return ", ".join(sorted({one.preset for one in said.values()})) or "none"

"""Paper-beside-ours cards: a claim, the paper's number, our number, and a verdict that a stated rule gives."""

import html
import math
from dataclasses import asdict, dataclass

from steerkit.stats import Interval

VERDICTS = ("replicates", "same trend", "differs", "not testable here")


@dataclass(frozen=True)
class Row:
    """One quantity of a card, as the paper gives it and as we found it."""

    quantity: str
    paper: str
    ours: str
    verdict: str


@dataclass(frozen=True)
class Card:
    """A claim of a paper beside what we found; in a notebook a table, in a terminal text."""

    claim: str
    rows: tuple[Row, ...]
    verdict: str
    why: str = ""

    def __str__(self) -> str:
        lines = [f"{r.quantity + ': ' if r.quantity else ''}paper {r.paper} | ours {r.ours} | {r.verdict}" for r in self.rows]
        return "\n".join(
            [
                f"{self.claim}: {self.verdict}",
                *(f"  {line}" for line in lines),
                *([f"  {self.why}"] if self.why else []),
            ]
        )

    def _repr_html_(self) -> str:
        mark = dict(zip(VERDICTS, ("#009E73", "#0072B2", "#D55E00", "#7F7F7F"), strict=True))[self.verdict]
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in asdict(r).values()) + "</tr>" for r in self.rows)
        why = f"<p>{html.escape(self.why)}</p>" if self.why else ""
        return (
            f'<div style="border-left: 4px solid {mark}; padding-left: 1em"><p><b>{html.escape(self.claim)}</b> &rarr; '
            f'<b style="color: {mark}">{self.verdict}</b></p><table><thead><tr><th></th><th>paper</th><th>ours</th>'
            f"<th>verdict</th></tr></thead><tbody>{cells}</tbody></table>{why}</div>"
        )


def verdict(paper, ours, *, tolerance: float | None = None, null: float = 0.0) -> str:
    """Return the verdict on one number by rule.

    `replicates`: our interval contains the paper's value, overlaps its interval, or lies within `tolerance` of it.
    `same trend`: both lie on the same side of `null`, ours with its whole interval. `differs`: otherwise.
    `not testable here`: we have no number or no interval for it, or our interval holds both the paper's value and `null`, so it
    decides nothing.

    Example: `verdict(0.36, Interval(0.30, 0.25, 0.38, 90))` gives "replicates".
    """
    if ours is None or (isinstance(ours, Interval) and math.isnan(ours.low)):
        return "not testable here"
    theirs, mine = (x if isinstance(x, Interval) else Interval(float(x), float(x), float(x), 1) for x in (paper, ours))
    low, high = mine.low, mine.high
    if (low <= theirs.high and theirs.low <= high) or (tolerance is not None and abs(mine.value - theirs.value) <= tolerance):
        undecided = theirs.value != null and low <= null <= high and low < high
        return "not testable here" if undecided else "replicates"
    side = math.copysign(1, theirs.value - null)
    return "same trend" if theirs.value != null and side * (low - null) > 0 and side * (high - null) > 0 else "differs"


def _show(value) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def compare(
    claim: str,
    paper,
    ours=None,
    *,
    given: str | None = None,
    tolerance: float | None = None,
    null: float = 0.0,
    why: str = "",
) -> Card:
    """Return the card of a claim: `paper` and `ours` are numbers or `Interval`s, or dicts of them with the same keys.

    Verdicts follow the rule of `verdict`, and the card has the weakest of its rows; a claim in words needs a
    `given` verdict and should say `why`. Raises ValueError for keys that differ or an unknown verdict.

    Example: `compare("SAE-TS beats CAA", 0.12, paired_difference(saets, caa))`
    """
    theirs, mine = (x if isinstance(x, dict) else {"": x} for x in (paper, ours))
    if isinstance(paper, dict) and ours is None:
        mine = dict.fromkeys(theirs)
    if set(theirs) != set(mine):
        raise ValueError(f"card `{claim}`: expected the same keys for paper and ours, got {list(theirs)} and {list(mine)}")
    if given is not None and given not in VERDICTS:
        raise ValueError(f"card `{claim}`: expected a verdict out of {VERDICTS}, got {given!r}")
    if given is None and any(isinstance(x, str) for x in [*theirs.values(), *mine.values()]):
        raise ValueError(f"card `{claim}`: a claim in words has no rule: give verdict=, one of {VERDICTS}")
    said = {k: given or verdict(theirs[k], mine[k], tolerance=tolerance, null=null) for k in theirs}
    rows = tuple(Row(k, _show(theirs[k]), _show(mine[k]), said[k]) for k in theirs)
    tested = [v for v in said.values() if v != VERDICTS[-1]]
    return Card(claim, rows, max(tested, key=VERDICTS.index) if tested else VERDICTS[-1], why)

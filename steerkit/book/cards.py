"""Paper-beside-ours cards: a claim, the paper's number, ours with its interval, and a verdict by one rule.

Levels do not carry over between models and judges; directions do. So the paper's size stands beside ours, and the verdict is on the
direction alone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from steerkit.stats import Interval, holm


@dataclass(frozen=True)
class Card:
    """A claim of a paper beside what we found: the numbers, and all that the rule asks for. The verdict is worked out, never kept.

    side: 1 or -1, on which side of `null` the paper says that it lies; 0 for a claim of no effect, which holds `within` that distance.
    """

    claim: str
    paper: str
    ours: Interval | None = None
    side: int = 0
    null: float = 0.0
    within: float | None = None
    testable: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """What `verdict` says; `not testable here` where the test cannot move."""
        return verdict(self.ours, side=self.side, null=self.null, within=self.within) if self.testable else "not testable here"

    @property
    def tested(self) -> bool:
        """Tell whether a direction was tested: such claims are corrected together."""
        return self.verdict != "not testable here" and self.within is None

    @property
    def p(self) -> float | None:
        """The p value against no effect, None where no direction was tested."""
        return self.ours.p(self.null) if self.tested else None

    @property
    def detectable(self) -> float | None:
        """The smallest effect that this test finds in four of five cases, None where no direction was tested."""
        return self.ours.detectable if self.tested else None

    def __str__(self) -> str:
        said = f"{self.claim}: {self.verdict} (paper {self.paper} | ours {self.ours or '-'})"
        return said + (f"; {self.note}" if self.note else "")


def verdict(ours: Interval | None, *, side: float, null: float = 0.0, within: float | None = None) -> str:
    """Return the verdict on a claim whose direction is the sign of `side`: above or below `null`.

    `same direction`: our whole interval lies on the claim's side of `null`. `opposite`: wholly on the other. `undecided`: it holds
    `null`. With `within`, the claim is that there is no effect (side 0): same where the whole interval lies within that distance
    of `null`, opposite where it lies wholly outside. `not testable here`: we have no number, or no interval for it.

    >>> verdict(Interval(0.10, 0.05, 0.15, 90), side=0.36), verdict(Interval(0.02, -0.01, 0.05, 90), side=0, within=0.1)
    ('same direction', 'same direction')
    """
    if ours is None or math.isnan(ours.low):
        return "not testable here"
    low, high = ours.low - null, ours.high - null
    if within is not None:
        return "same direction" if max(-low, high) <= within else "opposite" if min(high, -low) < -within else "undecided"
    if low <= 0 <= high:
        return "undecided"
    return "same direction" if side * low > 0 else "opposite"


def card(
    claim: str,
    paper: float | str,
    ours: Interval | None = None,
    *,
    side: float | None = None,
    null: float = 0.0,
    within: float | None = None,
    testable: bool = True,
    note: str = "",
) -> Card:
    """Return the card of a claim, with the verdict of `verdict`.

    paper: its number, which gives the side, or what it says in words, with a `side`. testable=False: the test cannot move here (a
    ceiling, a floor, chance level); `note` says why. Raises ValueError for words without a side, or a number that claims no effect
    (it equals `null`) without `within`.

    >>> print(card("SAE-TS beats CAA", 0.12, Interval(0.10, 0.05, 0.15, 9)))
    SAE-TS beats CAA: same direction (paper 0.12 | ours 0.10 [0.05, 0.15], n = 9)
    """
    side = paper - null if side is None and not isinstance(paper, str) else side
    if testable and (side is None or (not side and within is None)):
        raise ValueError(f"card `{claim}`: expected a direction, got {paper!r}: give side (1 or -1), or within for a claim of no effect")
    shown = paper if isinstance(paper, str) else f"{paper:.3g}"
    way = 0 if not side else 1 if side > 0 else -1
    return Card(claim, shown, ours, way, null, within, testable, note)


def corrected(cards: Iterable[Card]) -> list[str]:
    """Return the verdicts of a family of claims after Holm's correction: a direction that does not survive it is undecided."""
    cards = list(cards)
    p = holm([math.nan if one.p is None else one.p for one in cards])
    return ["undecided" if q >= 0.05 and one.verdict in ("same direction", "opposite") else one.verdict for one, q in zip(cards, p)]

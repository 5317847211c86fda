"""A run told cell by cell, with the time left."""

import time
from collections.abc import Callable

from steerkit.book.provenance import digest
from steerkit.progress import about


class Cells:
    """Reports a line for each code cell that a run ends, with the time left if `before` holds seconds of an earlier run.

    Cells are known by a hash of their source, so an edited, added or injected one does not spoil the rest. `seconds`
    holds what each cell took; `number` and `source` are those of the last one started.
    """

    def __init__(self, name: str, sources: list[str], total: int, before: dict[str, float], report: Callable[[str], None]):
        self.name, self.total, self.report = name, total, report
        self.before = {key: before[key] for key in map(self.key, sources) if key in before}
        self.number, self.source, self.seconds, self._begun = 0, "", {}, 0.0

    @staticmethod
    def key(source: str) -> str:
        return digest(source)[:8]

    @property
    def hooks(self) -> dict[str, Callable]:
        """What nbclient calls."""
        return {"on_cell_execute": self._started, "on_cell_executed": self._ended}

    @property
    def left(self) -> float:
        """Seconds left, at the pace of this run so far once that says something; 0 where nothing is known."""
        known = self.before.keys() & self.seconds.keys()
        expected, took = (sum(times[key] for key in known) for times in (self.before, self.seconds))
        pace = took / expected if expected > 5 else 1.0
        return pace * sum(s for key, s in self.before.items() if key not in self.seconds)

    def _started(self, cell, cell_index) -> None:
        self.number, self.source, self._begun = self.number + 1, cell.source, time.monotonic()

    def _ended(self, cell, cell_index, execute_reply) -> None:
        took = time.monotonic() - self._begun
        self.seconds[self.key(cell.source)] = round(took, 1)
        left = f", {about(self.left)} left" if self.left >= 1 else ""
        self.report(f"[{self.name}] cell {self.number}/{self.total} {took:.1f} s{left}")

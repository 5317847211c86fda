"""Progress that reads well live and in a saved notebook: bars, silence for other libraries' bars, a run's time left."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from steerkit.provenance import digest


def bar(items: Iterable, what: str, unit: str, *, show: bool = True):
    """Return the items with a progress bar on standard output, one line in a saved notebook; none for a single item."""
    from tqdm import tqdm

    items = list(items)
    return tqdm(items, desc=what, unit=unit, disable=not show or len(items) < 2, file=sys.stdout, mininterval=5.0, ncols=80)


@contextlib.contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Keep the bars that other libraries write to standard error out of the page; errors are raised all the same."""
    with contextlib.redirect_stderr(io.StringIO()) if silent else contextlib.nullcontext():
        yield


def about(seconds: float) -> str:
    """Return a rough time in words. Example: `about(130)` is "about 2 min"."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


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

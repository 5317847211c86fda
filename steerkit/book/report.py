"""What a notebook reports: numbers, figures, paper-beside-ours cards and provenance, kept in files beside it."""

import html
import json
import math
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from steerkit.book import provenance
from steerkit.book.cards import Card, card, corrected
from steerkit.book.figures import METHOD_COLOURS, METHOD_MARKERS, Figure, band, check_figure, finding, numbers, panels, plain, png, style
from steerkit.book.parameters import check_kernel
from steerkit.files import check_writable, resolve, shipped, write_atomic
from steerkit.stats import Interval

__all__ = ["METHOD_COLOURS", "METHOD_MARKERS", "Book", "Card", "Figure", "Provenance"]
__all__ += ["band", "finding", "panels", "results_table", "style"]


@dataclass(frozen=True)
class Provenance:
    """What a run was made with; the last cell of a notebook shows it."""

    facts: dict[str, str]
    parameters: dict

    def __str__(self) -> str:
        rows = {**self.facts, "parameters": json.dumps(plain(self.parameters))}
        return "\n".join(f"{k}: {v}" for k, v in rows.items())

    def _repr_html_(self) -> str:
        rows = {**self.facts, "parameters": ", ".join(f"{k} = {v!r}" for k, v in self.parameters.items())}
        body = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
        return f"<table>{body}</table>"


def device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    threads = f", {torch.get_num_threads()} threads" if torch else ""
    return f"CPU {model[1] if model else platform.machine()}{threads}"


def _peak_memory() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return f"{peak / 1e9:.1f} GB"
    return f"{peak / 1e9:.1f} GB, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"


class Book:
    """Collects what one notebook finds: numbers, figures and cards; `close` writes them into `out_dir`.

    Opening one checks the notebook's parameters and that both folders can be written: ValueError, OSError. `full` finds the full
    runs of `preset` under the folder `results`; without them it finds none.

    Example: `book = Book("01_steering_basics", out_dir=out_dir, figures_dir=figures_dir)`
    """

    def __init__(self, notebook: str, *, out_dir: str | Path, figures_dir: str | Path, results: str | Path = "", preset: str = ""):
        check_kernel()
        self._results, self._preset = results, preset
        self.notebook, self.out_dir, self._figures = notebook, resolve(out_dir), str(figures_dir)
        self.metrics: dict[str, dict] = {}
        self.cards: dict[str, Card] = {}
        self._begun = time.monotonic()
        for folder in (self.out_dir, Path(self._figures) / notebook):
            check_writable(folder)

    def metric(
        self,
        name: str,
        value,
        *,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        unit: str = "",
    ) -> str:
        """Record a number and return it as text; `value` may be an `Interval`, which brings low, high and n.

        The first three metrics of a notebook appear in the table of `make reproduce`. Raises ValueError for a number
        that is not finite, bounds in the wrong order, or no n.
        """
        if isinstance(value, Interval):
            value, low, high, n = value.value, value.low, value.high, value.n
        value = float(value)
        low, high = (None if b is None or math.isnan(float(b)) else float(b) for b in (low, high))
        if not math.isfinite(value):
            raise ValueError(f"metric `{name}`: expected a finite number, got {value}")
        if n is None or n < 1:
            raise ValueError(f"metric `{name}`: expected the number of samples it rests on, got n={n}")
        if low is not None and high is not None and low > high:
            raise ValueError(f"metric `{name}`: expected low <= high, got {low} and {high}")
        self.metrics[name] = {"value": value, "low": low, "high": high, "n": int(n), "unit": unit}
        return f"{name}: {_brief(self.metrics[name])}"

    def figure(self, fig, name: str, data, *, alt: str = "") -> Figure:
        """Save a matplotlib figure as png (at most 200 kB) with the numbers it draws (DataFrame: csv, dict: json).

        It shows itself when it is the last line of a cell. Raises ValueError, and writes nothing, for a figure without
        title or axis labels, and for data without finite numbers.
        """
        import matplotlib.pyplot as plt

        title, (suffix, text) = check_figure(fig, name), numbers(data, name)
        picture = png(fig, name)
        folder = Path(self._figures) / self.notebook
        write_atomic(resolve(folder / f"{name}.png"), picture)
        write_atomic(resolve(folder / f"{name}.{suffix}"), text)
        plt.close(fig)
        shown = folder if not folder.is_absolute() else Path(folder.name)
        return Figure(picture, alt or title, tuple(f"{shown.as_posix()}/{name}.{kind}" for kind in ("png", suffix)))

    def full(self, name: str, live=None, *, read: Callable | None = None):
        """Return the shipped full run of this preset, or `live` itself where none is shipped; print which, and its number of rows.

        `name` is a file in this notebook's folder of `results`, or in another's as "04_sae_ts/peaks.csv"; `read` makes a table of
        its path, by default `pandas.read_csv`. `book.full("answers.csv.gz", live) is live` tells whether this run stands in.

        Example: `full = book.full("scores.csv.gz", live, read=bcs.load_scores)`
        """
        import pandas as pd

        if path := shipped(self._results, self._preset, name if "/" in name else f"{self.notebook}/{name}"):
            found = (read or pd.read_csv)(path)
            print(f"{name}: the shipped full run, {len(found):,} rows.")
            return found
        stands_in = "." if live is None else f": this run stands in, {len(live):,} rows."
        print(f"{name}: no full run is shipped for these settings{stands_in}")
        return live

    def card(self, claim: str, *, paper, ours=None, **how) -> Card:
        """Return the paper-beside-ours card of a claim (`steerkit.book.cards.card`, which takes `how`) and keep it for `claims`."""
        self.cards[claim] = card(claim, paper, ours, **how)
        return self.cards[claim]

    def claims(self):
        """Return the table of all cards: verdicts as they are, and after Holm's correction for asking them all; what could be seen."""
        import pandas as pd

        rows = [
            {
                "claim": one.claim,
                "paper": one.paper,
                "ours": str(one.ours or "-"),
                "verdict": one.verdict,
                "after Holm": after,
                "could be seen": "" if one.detectable is None else f"{one.detectable:.2g}",
                "note": one.note,
            }
            for one, after in zip(self.cards.values(), corrected(self.cards.values()))
        ]
        table = pd.DataFrame(rows).style.hide(axis="index").set_properties(**{"text-align": "left"})
        return table.set_table_styles([{"selector": "th", "props": "text-align: left"}])

    def close(self, parameters: dict | None = None) -> Provenance:
        """Write results.json and cards.json into `out_dir`, and return the provenance to show in the last cell."""
        facts = {
            "notebook": self.notebook,
            "versions": ", ".join(f"{k} {v}" for k, v in provenance.versions().items()),
            "seed": str((parameters or {}).get("seed", "none")),
            "device": device(),
            "wall time": f"{time.monotonic() - self._begun:.0f} s",
            "peak memory": _peak_memory(),
        }
        preset = (parameters or {}).get("preset", self._preset)
        cards = {"preset": preset, "cards": [plain(asdict(card)) for card in self.cards.values()]}
        write_atomic(self.out_dir / "cards.json", json.dumps(cards, indent=1, allow_nan=False) + "\n")
        write_atomic(self.out_dir / "results.json", json.dumps(self.metrics, indent=1, allow_nan=False) + "\n")
        return Provenance(facts, dict(parameters or {}))


def _brief(metric: dict) -> str:
    value, low, high, n, unit = (metric[key] for key in ("value", "low", "high", "n", "unit"))
    within = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{value:.3g}{within}{' ' + unit if unit else ''} (n = {n})"


def results_table(folder: str | Path, *, states: dict[str, str] | None = None, fmt: str = "simple") -> str:
    """Return the table of a scale's runs: notebook, status, time, and its first three numbers.

    `folder` is runs/<scale>; `states` says which notebooks to list and what each is (default: as recorded).
    `fmt` is one of tabulate's formats: "simple" for a terminal, "github" for markdown.
    """
    from tabulate import tabulate

    folder, rows = resolve(folder), []
    records = {p.parent.name: json.loads(p.read_text()) for p in sorted(folder.glob("*/status.json"))}
    for name, state in (states or {n: r["status"] for n, r in records.items()}).items():
        record = records.get(name, {})
        results = folder / name / "results.json"
        numbers = json.loads(results.read_text()) if state == "done" and results.exists() else {}
        shown = [f"{k} {_brief(m)}" for k, m in list(numbers.items())[:3]]
        if error := record.get("error") if state == "failed" else None:
            shown = [
                f"cell {error['cell']}/{error['of']}: {error['line']}"[:100],
                error["what"].strip().splitlines()[-1][:100],
            ]
        took = f"{record['seconds']:.0f} s" if "seconds" in record else ""
        first, *more = shown or [""]
        rows += [[name, state, took, first], *(["", "", "", line] for line in more)]
    return tabulate(rows, headers=["notebook", "status", "time", "numbers"], tablefmt=fmt, disable_numparse=True)

"""Figures: one style, one colour for each method, and no figure without a title, labels and the numbers it draws."""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from steerkit.stats import Interval

# Okabe and Ito's palette, told apart under the three common kinds of colour blindness.
METHOD_COLOURS = {
    "baseline": "#BBBBBB",
    "random direction": "#595959",
    "CAA": "#0072B2",
    "SAE row": "#E69F00",
    "SAE-TS": "#009E73",
    "FGAA": "#CC79A7",
    "CorrSteer": "#D55E00",
    "output score": "#56B4E9",
    "input score": "#8C7A00",
    "prompting": "#000000",
    "Pinverse": "#8C564B",
    "Rotation": "#7F3C8D",
    "-Mb": "#17A398",
}
METHOD_MARKERS = dict(zip(METHOD_COLOURS, "sxo^DvP<>*phX", strict=True))
_MAX_PNG = 200_000


def style() -> None:
    """Set the style of every figure: colour-blind safe colours, light grid, left-aligned titles, large type; whole texts in tables."""
    import pandas as pd
    import seaborn as sns

    pd.set_option("display.max_colwidth", 200)

    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(METHOD_COLOURS.values())[2:],
        rc={
            "figure.figsize": (7.0, 4.0),
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": "#E5E5E5",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "font.family": "DejaVu Sans",
        },
    )


def panels(names: Sequence[str], *, xlabel: str, ylabel: str, columns: int = 3, height: float = 2.6, sharex: bool = True):
    """Return a figure and {name: axes}: small panels, one for each name, labelled on the outside; each has its own x axis unless sharex."""
    import matplotlib.pyplot as plt

    rows, columns = -(-len(names) // columns), min(columns, len(names))
    fig, axes = plt.subplots(
        rows, columns, figsize=(max(3.0 * columns, 6.0), max(height * rows, 3.2)), sharex=sharex, sharey=True, squeeze=False
    )
    for i, ax in enumerate(axes.flat):
        if i >= len(names):
            ax.set_axis_off()
            continue
        ax.set_title(names[i].replace("_", " "), fontsize=10)
        below = not sharex or i + columns >= len(names)
        ax.set(xlabel=xlabel if below else "", ylabel=ylabel if i % columns == 0 else "")
        ax.tick_params(labelbottom=below)
    return fig, dict(zip(names, axes.flat))


def finding(fig, title: str, *, legend: bool = True) -> None:
    """Give a figure of panels its title, which states the finding, and one legend below all panels."""
    fig.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    if legend:
        handles, labels = fig.axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="upper center", ncols=len(labels), bbox_to_anchor=(0.5, 0.0))


def band(ax, table, method: str, *, x: str = "scale", label: str | None = None) -> None:
    """Draw a method's curve (columns value, low, high against `x`) with its interval, in the method's colour."""
    colour = METHOD_COLOURS[method]
    ax.plot(table[x], table["value"], color=colour, label=label or method)
    ax.fill_between(table[x], table["low"], table["high"], color=colour, alpha=0.2)


@dataclass(frozen=True)
class Figure:
    """A saved figure: it shows itself in a notebook, and its text names the files."""

    png: bytes = field(repr=False)
    alt: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.alt} ({', '.join(self.files)})"

    def _repr_mimebundle_(self, include=None, exclude=None):
        picture = {"image/png": base64.b64encode(self.png).decode(), "text/plain": str(self)}
        return picture, {"image/png": {"alt": self.alt}}


def check_figure(fig, name: str) -> str:
    """Return the title of a figure; raise ValueError where a title or an axis label is missing."""
    axes = [ax for ax in fig.axes if ax.get_visible() and ax.axison and ax.get_label() != "<colorbar>"]
    title = fig.get_suptitle() or next((ax.get_title(loc) for ax in axes for loc in ("left", "center") if ax.get_title(loc)), "")
    if not title:
        raise ValueError(f"figure `{name}`: expected a title that states the finding, got none: ax.set_title(...)")
    for which, whole in (("x", fig.get_supxlabel()), ("y", fig.get_supylabel())):
        for ax in axes:
            group = getattr(ax, f"get_shared_{which}_axes")().get_siblings(ax)
            if not whole and not any(getattr(mate, f"get_{which}label")() for mate in group):
                raise ValueError(f"figure `{name}`: expected a label with its unit on every {which} axis: ax.set_{which}label(...)")
    return title


def numbers(data, name: str) -> tuple[str, str]:
    """Return (suffix, text) of the plotted numbers; raise ValueError for none, or for a column of nan."""
    import numpy as np
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        columns = {str(c): data[c].to_numpy() for c in data.columns if pd.api.types.is_numeric_dtype(data[c])}
    elif isinstance(data, dict):
        arrays = {k: np.asarray(v.tolist() if hasattr(v, "tolist") else v) for k, v in data.items() if _even(v)}
        columns = {str(k): v for k, v in arrays.items() if v.dtype.kind in "fiub"}
    else:
        raise TypeError(f"figure `{name}`: expected a DataFrame or a dict of the plotted numbers, got {type(data).__name__}")
    empty = [k for k, v in columns.items() if v.size == 0 or not np.isfinite(v.astype(float)).any()]
    if empty or not len(data) or (isinstance(data, pd.DataFrame) and not columns):
        raise ValueError(f"figure `{name}`: expected finite numbers, got none in {', '.join(empty) or 'the data'}")
    if isinstance(data, pd.DataFrame):
        named = any(level is not None for level in data.index.names)
        return "csv", data.to_csv(index=named, float_format="%.6g")
    return "json", json.dumps(plain(data), indent=1, allow_nan=False) + "\n"


def _even(value) -> bool:
    """Tell whether lists inside lists have one length, so that numpy can take them."""
    if not isinstance(value, list | tuple) or not any(isinstance(v, list | tuple) for v in value):
        return True
    return all(isinstance(v, list | tuple) and len(v) == len(value[0]) and _even(v) for v in value)


def plain(value):
    """Return `value` for json: arrays, tensors and intervals as lists, numbers and dicts; nan and inf as None."""
    if isinstance(value, Interval):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def png(fig, name: str) -> bytes:
    from PIL import Image

    for dpi in (150, 120, 100, 80, 60):
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        if buffer.tell() > 0.7 * _MAX_PNG:  # a palette makes it a third: a notebook holds several figures
            small = Image.open(buffer).convert("RGB").quantize(256)
            buffer = io.BytesIO()
            small.save(buffer, format="png", optimize=True)
        if buffer.tell() <= _MAX_PNG:
            return buffer.getvalue()
    raise ValueError(f"figure `{name}`: expected at most {_MAX_PNG} bytes as png, got {buffer.tell()}: draw less or smaller")

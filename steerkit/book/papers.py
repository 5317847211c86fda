"""Numbers that the papers print or plot, as tidy tables to set beside one's own; data/papers/README.md describes them."""

import json
from typing import Any

import pandas as pd
import yaml

from steerkit.files import DATA

FOLDER = DATA / "papers"


def _rows(node: Any, *keys: Any) -> list[tuple]:
    """Return the leaves of nested mappings, each behind the keys that lead to it."""
    if not isinstance(node, dict):
        return [(*keys, *(node if isinstance(node, list) else [node]))]
    return [row for key, child in node.items() for row in _rows(child, *keys, key)]


def _pick(known: dict[str, Any], name: str) -> Any:
    """Return what is known under `name`, or raise ValueError naming all that is known."""
    if name not in known:
        raise ValueError(f"expected one of {sorted(known)}, got {name!r}; pick a name from the list")
    return known[name]


def table(paper: str, name: str) -> pd.DataFrame:
    """Return a table of a paper's YAML file, one row per key, with its source, note and average in `attrs`; ValueError if unknown.

    >>> table("fgaa", "table_1").columns.tolist()
    ['model', 'topic', 'method', 'bcs']
    """
    papers = {path.stem: path for path in FOLDER.glob("*.yaml")}
    entry = _pick(yaml.safe_load(_pick(papers, paper).read_text(encoding="utf-8")), name)
    frame = pd.DataFrame(_rows(entry.pop("data")), columns=entry.pop("columns"))
    frame.attrs.update(entry)
    return frame


def curves(name: str) -> pd.DataFrame:
    """Return SAE-TS's curves of behaviour x coherence, one row per scale: `curves("saets_fig3_2b")`; ValueError if unknown."""
    figures = {path.stem: path for path in FOLDER.glob("saets_fig[367]_*.json")}
    found = json.loads(_pick(figures, name).read_text(encoding="utf-8"))
    points = [(*row[:2], scale, bcs) for row in _rows(found) for scale, bcs in zip(range(0, 301, 20), row[2:], strict=True)]
    return pd.DataFrame(points, columns=["topic", "method", "scale", "bcs"])


def trade_off() -> pd.DataFrame:
    """Return the points of SAE-TS's Figure 8 (a few scales are missing): `trade_off().query("topic == 'london'")`."""
    found = json.loads((FOLDER / "saets_fig8_BC.json").read_text(encoding="utf-8"))
    points = [(*key.split("|"), *point) for key, curve in found.items() for point in curve]
    return pd.DataFrame(points, columns=["topic", "method", "scale", "behaviour", "coherence"])


def golden(preset: str) -> pd.DataFrame:
    """Return single features' published scores of the output-score paper: layer, feature, s_in, s_out, factor; no row for other models.

    >>> golden("pythia-70m").query("layer == 4 and feature == 7772").s_out.round(3).tolist()
    [0.794]
    """
    short = lambda name: "".join(filter(str.isalnum, name))  # noqa: E731
    found = json.loads((FOLDER / "output_score_golden.json").read_text(encoding="utf-8"))
    features = next((model["features"] for key, model in found.items() if short(key) == short(preset)), {})
    rows = [(*map(int, key.split("_")), s["S_in"], s.get("S_out", s.get("S_out_post")), s["best_factor"]) for key, s in features.items()]
    return pd.DataFrame(rows, columns=["layer", "feature", "s_in", "s_out", "factor"])

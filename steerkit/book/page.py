"""A table as one static page that sorts and filters by itself: no server, no network."""

import html
import json
from pathlib import Path

from steerkit.files import write_atomic

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 1rem; max-width: 72rem }}
input, select {{ font: inherit; margin: 0 .6rem .6rem 0; max-width: 100% }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .5rem; border-bottom: 1px solid #8884 }}
th button {{ font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer }}
td.n {{ text-align: right; white-space: nowrap }}
@media (max-width: 40rem) {{ th, td {{ padding: .2rem }} body {{ margin: .4rem; font-size: 13px }} }}
</style>
<h1>{title}</h1><div id="by"></div><p id="count" aria-live="polite"></p>
<table><thead><tr id="head"></tr></thead><tbody id="rows"></tbody></table>
<script id="data" type="application/json">{data}</script><script>
const {{columns, rows}} = JSON.parse(document.getElementById("data").textContent);
const by = document.getElementById("by"), wanted = {{}};
let order = null, up = true;
function add(kind, label, parent) {{
  const made = document.createElement(kind);
  if (label !== undefined) made.textContent = label;
  parent.append(made);
  return made;
}}
columns.forEach((name, c) => {{
  const values = [...new Set(rows.map(r => r[c]))];
  add("button", name, add("th", undefined, document.getElementById("head"))).onclick = () => {{
    up = order === c ? !up : true; order = c; draw();
  }};
  if (values.length > 60) return;
  const select = add("select", undefined, add("label", name + " ", by));
  add("option", "all", select);
  values.sort((a, b) => a > b ? 1 : -1).forEach(v => add("option", v, select));
  select.onchange = () => {{ wanted[c] = select.value; draw(); }};
}});
const search = add("input", undefined, by);
search.placeholder = "words in the text";
search.setAttribute("aria-label", "words in the text");
search.oninput = () => draw();
function draw() {{
  let shown = rows.filter(r => Object.entries(wanted).every(([c, v]) => v === "all" || String(r[c]) === v));
  const word = search.value.toLowerCase();
  if (word) shown = shown.filter(r => r.some(v => String(v).toLowerCase().includes(word)));
  if (order !== null) shown.sort((a, b) => (a[order] > b[order] ? 1 : a[order] < b[order] ? -1 : 0) * (up ? 1 : -1));
  const body = document.getElementById("rows");
  body.textContent = "";
  shown.slice(0, 300).forEach(r => {{
    const line = add("tr", undefined, body);
    r.forEach(v => {{ const cell = add("td", v, line); if (typeof v === "number") cell.className = "n"; }});
  }});
  const part = shown.length > 300 ? ", the first 300 shown" : "";
  document.getElementById("count").textContent = shown.length + " of " + rows.length + " rows" + part;
}}
draw();
</script></html>
"""


def table(rows, path: str | Path, *, title: str) -> Path:
    """Write a DataFrame as a page with a menu for each column of few values, a search field, and columns that sort on a click.

    Numbers are rounded to three decimals; what a cell holds is text, never markup. Raises ValueError for a table without rows.

    >>> table(pd.DataFrame({"topic": ["love"], "text": ["I love it"]}), "texts.html", title="Texts")    # doctest: +SKIP
    """
    if not len(rows):
        raise ValueError(f"{title}: expected at least one row, got none")
    values = json.loads(rows.round(3).to_json(orient="values"))
    data = json.dumps({"columns": list(map(str, rows.columns)), "rows": values}).replace("<", "\\u003c")
    return write_atomic(path, _PAGE.format(title=html.escape(title), data=data))


class Shown:
    """A page inside a notebook; where nothing is rendered, its file name."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return f"{self.path.name}: open it in a browser"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        inside = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{inside}" style="width: 100%; height: 26rem; border: 1px solid #8888" title="{self.path.stem}"></iframe>'


def show(path: str | Path) -> Shown:
    """Return a page of `table` so that a notebook shows it as the last line of a cell."""
    return Shown(Path(path))

"""A notebook's code cells, run in one process, without a kernel."""

import ast
from pathlib import Path

import nbformat


def run_cells(path: Path, values: dict) -> dict:
    """Run a notebook's code cells in order, with parameters as papermill injects them; show what a notebook would."""
    space = {"__name__": "__main__", "display": _show}
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            space |= values if cell.cell_type == "code" else {}
            continue
        body = ast.parse(cell.source).body
        last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
        where = f"{path.stem}, cell {number}"
        exec(compile(ast.Module(body, []), where, "exec"), space)
        _show(eval(compile(last, where, "eval"), space) if last else None)
    return space


def _show(value) -> None:
    """Make what Jupyter would show of a value."""
    (getattr(value, "_repr_html_", None) or value.__repr__)()

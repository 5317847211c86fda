"""Every notebook of the lab book: its form, its parameters, its stamp."""

import ast
import statistics
from pathlib import Path

import nbformat
import pytest
import yaml

from steerkit.book import run
from steerkit.methods.sae_ts import published
from steerkit.models import load

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
LIMIT_BYTES, LIMIT_LINES, MEDIAN_LINES = 1_000_000, 30, 8
LIMIT_WIDTH, LIMIT_PARAMETER = 115, 125  # in JupyterLab what is longer runs out of view

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def read(path):
    return nbformat.read(path, 4)


def code(nb, *, parameters=False):
    cells = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    return cells if parameters else [c for c in cells if "parameters" not in c.metadata.get("tags", [])]


def lines(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


def tree(cell):
    """Parse a cell, its line and cell magics left out."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))))


def names_read(cell):
    nodes = list(ast.walk(tree(cell)))
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


@each
def test_form(path):
    nb = read(path)
    nbformat.validate(nb)
    assert path.stem[:2].isdigit() and path.stem[2] == "_", "notebooks are numbered in reading order"
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    assert (nb.metadata.kernelspec.name, nb.metadata.kernelspec.language) == ("python3", "python")
    assert path.stat().st_size < LIMIT_BYTES
    assert "widgets" not in nb.metadata, "widgets are dead in a saved notebook: use plain progress bars"


@each
def test_cells_are_short_and_explained(path):
    nb = read(path)
    sizes = [len(lines(c)) for c in code(nb)]
    long = [lines(c)[0] for c in code(nb) if len(lines(c)) > LIMIT_LINES]
    assert not long, f"code cells above {LIMIT_LINES} lines"
    widths = [(line, LIMIT_WIDTH if c in code(nb) else LIMIT_PARAMETER) for c in code(nb, parameters=True) for line in lines(c)]
    assert not [line for line, limit in widths if len(line) > limit], "code lines that run out of view"
    assert statistics.median(sizes) <= MEDIAN_LINES
    prose = sum(c.cell_type == "markdown" for c in nb.cells)
    assert prose >= 0.8 * len(code(nb)), f"{prose} cells of prose for {len(code(nb))} of code"


@each
def test_parameters(path):
    nb = read(path)
    declared = run.parameters(nb)
    assert {"out_dir", "figures_dir"} <= declared.keys()
    assert declared["out_dir"].default == f"runs/laptop/{path.stem}"
    assert all(p.annotation and p.help for p in declared.values()), "each parameter has a type and a comment"
    assert not [c for c in nb.cells if "injected-parameters" in c.metadata.get("tags", [])]
    used = set().union(*(names_read(c) for c in code(nb)))
    assert not declared.keys() - used, "declared, and never used"


@each
def test_no_parameter_is_set_again(path):
    """A parameter that a later cell assigns would not change what comes after it. Only the opening cell may do so, where it
    fills in what the preset decides: `name = ...` with the parameter itself on the right."""
    declared = run.parameters(read(path)).keys()
    opening, *later = map(tree, code(read(path)))
    filled = [n for n in opening.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    filled = [n for n in filled if n.targets[0].id in {m.id for m in ast.walk(n.value) if isinstance(m, ast.Name)}]
    nodes = [n for part in (*later, *(top for top in opening.body if top not in filled)) for n in ast.walk(part)]
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert not declared & stored


def test_defaults_follow_the_preset():
    """What a preset decides has no default of the embedded model; for that one the values are the ones of the published runs."""
    own = {"layer": -1, "layers": [], "topic_layers": [], "effects_file": ""}
    for path in NOTEBOOKS:
        found = run.parameters(read(path))
        assert {name: found[name].default for name in own if name in found} == {name: own[name] for name in own if name in found}
    spec = load.preset("smollm2-135m")
    assert (spec.layer(), spec.layers, spec.layers[-2:-1]) == (13, [3, 8, 13, 18, 23, 28], [23])
    assert published.source("", spec, 13) == "data/effects/smollm2-135m/layer_13.safetensors"


@each
def test_source_and_outputs_belong_together(path):
    assert run.check_stamp(read(path)) == []
    assert read(path).metadata.steerkit.stamp.scale == "laptop"


@each
def test_no_machine_path(path):
    assert run.leaks(read(path)) == []


@each
def test_figures_have_their_numbers(path):
    """Each png beside a csv or json, and no figure that no notebook draws."""
    folder = PROJECT / "figures" / path.stem
    stems = {p.stem for p in folder.glob("*.png")}
    assert {p.stem for p in folder.iterdir()} == stems if folder.exists() else True
    for stem in stems:
        assert any((folder / f"{stem}.{kind}").exists() for kind in ("csv", "json")), stem
        assert f"{folder.name}/{stem}.png" in path.read_text()


def scales():
    return sorted((PROJECT / "notebooks" / "scales").glob("*.yaml"))


@pytest.mark.parametrize("path", scales(), ids=lambda p: p.stem)
def test_scales_fit_the_notebooks(path):
    jobs = run.jobs(path.stem)
    for job in jobs.values():
        run.check_parameters(run.parameters(read(PROJECT / job.source)), job.given)
    if path.stem in {"laptop", "smoke"}:
        assert list(jobs) == [p.stem for p in NOTEBOOKS], "every notebook has a smoke and a laptop scale"
    if path.stem == "laptop":
        given = [v for v in (yaml.safe_load(path.read_text())["notebooks"] or {}).values() if v]
        assert not given, "the laptop values are the ones in the notebooks"

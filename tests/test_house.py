"""The shape of the house: which room may import from which, so that no circle and no shortcut creeps in; and its front door."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

import steerkit
from steerkit.models.presets import presets

PROJECT = Path(__file__).resolve().parent.parent
FLOORS = [  # a room imports from its own floor or from those above it in this list
    {"", "data", "files", "inputs", "lazy", "progress", "stats", "store", "typed"},
    {"engine"},
    {"concept", "feature_cards", "features", "models", "vectors"},
    {"judges", "questions"},
    {"methods", "scores", "training"},
    {"recipes", "__main__"},
]
BOOK = {"files", "progress", "stats", "typed"}  # all that `book` may import beside itself: it knows no science


def imported(path: Path) -> set[str]:
    """Return every module of the project that a file imports, late imports too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("steerkit", "recipes") and _file(name)}


def _file(module: str) -> Path | None:
    path = PROJECT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def room(module: str) -> str:
    """Return the folder or file of the top level: steerkit.engine.decode is in `engine`, steerkit itself in no room."""
    parts = module.split(".")
    return "recipes" if parts[0] == "recipes" else parts[1] if len(parts) > 1 else ""


GRAPH = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): imported(path)
    for folder in ("steerkit", "recipes")
    for path in (PROJECT / folder).rglob("*.py")
}


def test_every_room_stands_on_a_floor():
    assert {room(module) for module in GRAPH} == {"book"}.union(*FLOORS)


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_down(module):
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    for other in GRAPH[module]:
        mine, theirs = room(module), room(other)
        if mine == theirs:
            continue
        if mine == "book":
            assert theirs in BOOK or not theirs, f"{module} imports {other}"
        else:
            assert theirs != "book" and floor[theirs] <= floor[mine], f"{module} imports {other}"


def test_there_is_no_circle():
    seen, done = [], set()

    def visit(module: str) -> None:
        if module in done:
            return
        assert module not in seen, " -> ".join([*seen[seen.index(module) :], module])
        seen.append(module)
        for other in sorted(GRAPH[module]):
            if not module.startswith(f"{other}."):  # a package's own page may name its modules
                visit(other)
        seen.pop()
        done.add(module)

    for module in GRAPH:
        visit(module)


def test_the_book_is_read_without_torch():
    modules = [module for module in GRAPH if room(module) == "book"]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", steerkit.PUBLIC)
def test_every_public_name_is_there_and_explained(name):
    found, module = getattr(steerkit, name), steerkit.PUBLIC[name]
    assert found.__doc__ and found.__doc__.strip()
    assert not isinstance(found, ModuleType) or (found.__name__ == module and module.endswith(f".{name}")), "a name that its module lacks"
    assert name in dir(steerkit) and name in steerkit.__all__


def test_the_rooms_of_a_method_are_found_on_first_use():
    code = "import steerkit as sk; print(sk.sae_ts.approximator.aim.__module__, sk.corrsteer.nulls.__name__, dir(sk.output_scores))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.split(" ", 2)[:2] == ["steerkit.methods.sae_ts.approximator", "steerkit.methods.corrsteer.nulls"], done.stderr
    assert "['inputs', 'own_concept', 'score', 'success']" in done.stdout


def test_an_unknown_name_is_refused_and_a_module_is_no_function():
    with pytest.raises(AttributeError, match=r"module 'steerkit' has no attribute 'opn'; `dir\(steerkit\)` lists"):
        _ = steerkit.opn
    with pytest.raises(ImportError, match="opn"):
        from steerkit import opn  # noqa: F401
    from steerkit import concept, concepts

    assert isinstance(concept, ModuleType) and callable(concepts), "a module of the package hides no public name"


def test_the_front_door_loads_no_torch():
    code = "import sys, steerkit as sk, steerkit.models.presets; from steerkit import stats; sk.preset; dir(sk)"
    code += "; print(sorted({'torch', 'transformers', 'sae_lens'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_python_m_steerkit_lists_what_there_is():
    code = "import runpy, sys; runpy.run_module('steerkit', run_name='__main__'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert said[-1] == "False", done.stderr
    told = {line.split("  ")[1]: line.rpartition("  ")[2] for line in said if line.startswith("  ")}
    assert told["sk.open"] == "Open a preset's model, tokenizer and SAEs." and all(told.values())
    assert {f"sk.{name}" for name in steerkit.PUBLIC} | set(presets()) <= told.keys()
    titles = {path.stem: nbformat.read(path, 4).cells[0].source.splitlines()[0] for path in (PROJECT / "notebooks").glob("*.ipynb")}
    assert titles and {name: f"# {told[name]}" for name in titles} == titles
    assert "python -m recipes.scores" in told and "python -m recipes.judge_fitting" not in told

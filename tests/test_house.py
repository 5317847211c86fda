"""The shape of the house: which room may import from which, so that no circle and no shortcut creeps in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
FLOORS = [  # a room imports from its own floor or from those above it in this list
    {"files", "inputs", "progress", "stats", "store"},
    {"engine"},
    {"concepts", "features", "models", "vectors"},
    {"judges", "questions"},
    {"methods", "scores", "training"},
    {"recipes"},
]
BOOK = {"files", "progress", "stats"}  # all that `book` may import beside itself: it knows no science


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
    assert {room(module) for module in GRAPH} == {"", "book"}.union(*FLOORS)


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_down(module):
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    for other in GRAPH[module]:
        mine, theirs = room(module), room(other)
        if mine == theirs or not theirs:
            continue
        if mine == "book":
            assert theirs in BOOK, f"{module} imports {other}"
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

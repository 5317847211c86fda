"""What a notebook's code can run: the modules that it imports, those that they import, and so on; by their code without its words."""

import ast
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from steerkit.book.provenance import digest, text

ROOMS = ("steerkit", "recipes")
_NAMED = re.compile(rf"({'|'.join(ROOMS)})(\.\w+)*")
_MAGIC = re.compile(r"^([ \t]*)[%!].*", re.MULTILINE)
_EVERYTHING = "*"


class Code(NamedTuple):
    """A source: dotted names that it imports or uses, names that it finds in other modules on first use, a digest without words."""

    used: frozenset[str]
    lazy: dict[str, str]
    digest: str


def closure(root: Path, nb: dict) -> dict[str, str]:
    """Return {module: digest of its code} of all modules under `root` that the code cells of a notebook can run.

    Late imports count, the packages above a module, and a module that a string names whole. A cell that is not Python once its
    magic lines are left out counts as one that imports everything, as does a module that cannot be read.
    """
    cells = [_plain(text(cell)) for cell in nb["cells"] if cell["cell_type"] == "code"]
    found: dict[str, Code] = {}
    left, seen = {_EVERYTHING} if None in cells else set(read("\n".join(cells), "").used), set()
    while left := left - seen:
        seen.add(dotted := left.pop())
        if dotted == _EVERYTHING:
            files = [path.relative_to(root).with_suffix("") for room in ROOMS for path in (root / room).rglob("*.py")]
            left |= {".".join(path.parts).removesuffix(".__init__") for path in files}
            continue
        module, steps = "", dotted.split(".")
        while steps:
            step = steps.pop(0)
            name = f"{module}.{step}" if module else step
            if name not in found and (path := find(root, name)):
                package = name if path.stem == "__init__" else name.rpartition(".")[0]
                found[name] = read(path.read_text(encoding="utf-8"), package)
                left |= found[name].used
            if name not in found:
                lazy = found[module].lazy if module else {}
                left |= {f"{target}.*" for target in lazy.values()} if step == "*" else set()
                left |= {".".join([lazy[step], *steps])} if step in lazy else set()
                break
            module = name
    return {name: code.digest for name, code in found.items()}


def find(root: Path, module: str) -> Path | None:
    """Return the file of a module of the project, None where there is none."""
    path = root / module.replace(".", "/")
    return next((p for p in (path / "__init__.py", path.with_name(f"{path.name}.py")) if p.is_file()), None)


@lru_cache(maxsize=1024)
def read(source: str, package: str) -> Code:
    """Return what a source, which relative imports of `package` may stand in, says of other modules."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return Code(frozenset({_EVERYTHING}), {}, digest(source))
    nodes, names = list(ast.walk(tree)), {}  # local name -> dotted names that it may stand for
    lazy, used = _lazy(tree, nodes), set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = _base(node, package)
            for alias in node.names:
                used.add(base + alias.name)
                local = alias.asname or alias.name.split(".")[0]
                names.setdefault(local, set()).add(base + (alias.name if alias.asname or base else local))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in lazy.values():
            used.add(node.value)
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            head, *rest = _dotted(node)
            used |= {".".join([name, *rest, "*"]) for name in names.get(head, ())}
    for node in nodes:  # a string that stands alone does nothing
        if isinstance(getattr(node, "body", None), list):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(getattr(s.value, "value", None), str))]
    return Code(frozenset(name for name in used if _NAMED.fullmatch(name.removesuffix(".*"))), lazy, digest(ast.dump(tree)))


def _plain(cell: str) -> str | None:
    """Return a cell as Python, magic lines left out; None for one that is not, or whose magic lines name the project's packages."""
    for source in (cell, _MAGIC.sub(r"\1pass", cell)):
        try:
            ast.parse(source)
        except SyntaxError:
            if any(room in line[0] for line in _MAGIC.finditer(cell) for room in ROOMS):
                return None
            continue
        return source
    return None


def _lazy(tree: ast.Module, nodes: list[ast.AST]) -> dict[str, str]:
    """Return the names that a module's `__getattr__` takes from other modules: the entries {name: module} of its dicts."""
    stored = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)} | {n.id for n in nodes if isinstance(n, ast.Name)}
    dicts = [node for node in nodes if isinstance(node, ast.Dict)] if "__getattr__" in stored else []
    pairs = [(getattr(k, "value", None), getattr(v, "value", None)) for node in dicts for k, v in zip(node.keys, node.values)]
    return {name: module for name, module in pairs if isinstance(name, str) and isinstance(module, str) and _NAMED.fullmatch(module)}


def _base(node: ast.Import | ast.ImportFrom, package: str) -> str:
    """Return what stands before the names of an import, its last dot included."""
    if isinstance(node, ast.Import):
        return ""
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return "".join(f"{part}." for part in [*above, *([node.module] if node.module else [])])


def _dotted(node: ast.expr) -> list[str]:
    """Return the names of a chain of attributes, the first of them empty where it does not begin with a name."""
    if isinstance(node, ast.Attribute):
        return [*_dotted(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ""]

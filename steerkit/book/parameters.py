"""A notebook's parameters cell, read as papermill reads it and checked strictly (papermill only warns)."""

import ast
import difflib
import re
import sys
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from steerkit.book.provenance import tags

MARK = "# Parameters"  # the first line of the cell that papermill injects
TYPES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict)}


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell."""

    name: str
    annotation: str
    default: object
    help: str


def parameters(nb: dict) -> dict[str, Parameter]:
    """Return the parameters a notebook declares, as papermill itself reads them.

    Raises ValueError unless exactly one cell is tagged `parameters`, every line of it is `name: type = literal`, and
    papermill's inspector sees every one of them (it skips a line with two `=` signs, even in its comment).
    """
    from nbformat.v4 import new_notebook
    from papermill.inspection import _infer_parameters

    cells = [c for c in nb.cells if "parameters" in tags(c)]
    if len(cells) != 1 or cells[0].cell_type != "code":
        raise ValueError(f"expected exactly one code cell tagged `parameters`, got {len(cells)} cells with that tag")
    alone = new_notebook(cells=cells)
    seen = {p.name: p for p in _infer_parameters(alone, name="python3", language="python")}
    found = {}
    try:
        body = ast.parse(cells[0].source).body
    except SyntaxError as exc:
        raise ValueError(f"parameters cell, line {exc.lineno}: expected plain Python, got `{(exc.text or '').strip()}`") from None
    for node in body:
        line = cells[0].source.splitlines()[node.lineno - 1].strip()
        target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
        if not isinstance(target, ast.Name) or node.value is None:
            raise ValueError(f"parameters cell: expected `name: type = value`, got `{line}`")
        annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
        names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation else set()
        if target.id not in seen or names - set(TYPES):
            raise ValueError(
                f"parameters cell: papermill cannot read `{line}`: write one `=` a line (none in the comment) and "
                f"annotate with {', '.join(TYPES)} and brackets only"
            )
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"parameters cell: the default must be a literal, got `{line}`") from None
        found[target.id] = Parameter(target.id, ast.unparse(annotation) if annotation else "", default, seen[target.id].help)
    return found


def _fits(value, annotation: str) -> bool:
    """Tell whether `value` has the type that an annotation of names and brackets describes."""
    try:
        TypeAdapter(eval(annotation, {"__builtins__": TYPES})).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def check_parameters(declared: dict[str, Parameter], given: dict) -> dict:
    """Return the value of every declared parameter, or raise ValueError for an unknown name or a wrong type.

    An int is accepted where a float is declared; without an annotation the default's type decides.

    Example: `check_parameters(parameters(nb), {"layer": 13})`
    """
    for name in given:
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "the notebook declares " + ", ".join(declared)
            raise ValueError(f"unknown parameter `{name}`: {hint}")
    values = {name: given.get(name, spec.default) for name, spec in declared.items()}
    for name, value in values.items():
        spec = declared[name]
        expected = spec.annotation or ("" if spec.default is None else type(spec.default).__name__)
        if expected and not _fits(value, expected):
            raise ValueError(f"parameter `{name}`: expected {expected}, got {value!r} ({type(value).__name__})")
    return values


def check_kernel() -> None:
    """Check the parameters of the notebook that runs in this kernel, whoever started it; outside a kernel do nothing.

    What a notebook declares are its globals with a type. Papermill only warns of a name that is none of them, and takes
    any value for any type. Raises ValueError as `check_parameters` does.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    spelled = {n: t.__name__ if isinstance(t, type) else str(t) for n, t in shell.user_ns.get("__annotations__", {}).items()}
    ours = {name: hint for name, hint in spelled.items() if name in shell.user_ns and not set(re.findall(r"\w+", hint)) - set(TYPES)}
    declared = {name: Parameter(name, hint, shell.user_ns[name], "") for name, hint in ours.items()}
    cells = [cell for cell in shell.user_ns["In"] if cell.startswith(MARK)]
    lines = ast.parse(cells[-1]).body if cells and declared else []
    injected = {line.targets[0].id for line in lines if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)}
    try:
        check_parameters(declared, {name: shell.user_ns[name] for name in [*declared, *sorted(injected)]})
    except ValueError as exc:
        how = " (papermill takes a list as -y 'name: [1, 2]', text that looks like a number as -r name text)"
        raise ValueError(f"{exc}{how if injected & set(declared) else ''}") from None

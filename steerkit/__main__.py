"""What there is, read from the code and the notebooks themselves: public names, notebooks, recipes, presets."""

import ast
import json
import re
from pathlib import Path

from steerkit import PUBLIC
from steerkit.files import ROOT


def sentence(path: Path, name: str = "") -> str:
    """Return the first sentence of the docstring of `name` in a file, of the file itself where it defines no such thing."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    paragraph = (ast.get_docstring(named.get(name, tree)) or "").split("\n\n")[0]
    return re.split(r"(?<=[.!?]) (?=\S)", " ".join(paragraph.split()))[0]


def public() -> list[tuple[str, str]]:
    """Return each name of `steerkit` with what it is for."""
    found = []
    for name, module in PUBLIC.items():
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found.append((f"sk.{name}", sentence(path, "" if module == f"steerkit.{name}" else name)))
    return found


def notebooks() -> list[tuple[str, str]]:
    """Return each notebook with its title."""
    found = []
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        found.append((path.stem, first.splitlines()[0].lstrip("# ")))
    return found


def recipes() -> list[tuple[str, str]]:
    """Return the call of each recipe with what it does."""
    runs = [path for path in sorted(ROOT.glob("recipes/*.py")) if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
    return [(f"python -m recipes.{path.stem}", sentence(path).partition(": `python")[0]) for path in runs]


def models() -> list[tuple[str, str]]:
    """Return each preset with its model and the layers that have SAEs; none without the folder data."""
    if not (ROOT / "data").is_dir():
        return []
    from steerkit.models.presets import presets

    found = []
    for name, spec in presets().items():
        few = len(spec.layers) < 8
        layers = ", ".join(map(str, spec.layers)) if few else f"{spec.layers[0]} to {spec.layers[-1]}"
        found.append((name, f"{spec.hub or 'embedded'}, SAEs of layers {layers}{', needs a licence' if spec.needs.gated else ''}"))
    return found


def main() -> None:
    """Print it all."""
    for title, rows in {
        "Names (import steerkit as sk)": public(),
        "Notebooks (make reproduce NOTEBOOK=01)": notebooks(),
        "Recipes (--help says more)": recipes(),
        "Presets (sk.open(name), papermill -p preset NAME)": models(),
    }.items():
        width = max((len(name) for name, _ in rows), default=0)
        print("\n".join([title, *(f"  {name:<{width}}  {said}" for name, said in rows), ""]))


if __name__ == "__main__":
    main()

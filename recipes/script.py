"""A notebook's code cells as a plain script, for a GPU machine without Jupyter: `python -m recipes.script 07 --set "seeds: [0]"`.

Runs every cell in order in this process, with a scale's parameters and those of `--set`; files appear as in a notebook's run, and finished
parts resume. A long run can be divided: one seed of 07 or one of 06's `own_layers` a process, each with an `out_dir` of its own;
data/results/README.md says how they are put together. `--saes` reads SAEs from a folder, without sae_lens.
"""

import argparse
import json
import time
import traceback
from functools import partial
from pathlib import Path

import matplotlib
import yaml

from steerkit.files import ROOT, resolve
from steerkit.models import load


def cells(notebook: Path) -> list[tuple[bool, str]]:
    """Return a notebook's code cells: whether it is the parameters cell, and its source."""
    found = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    return [("parameters" in c["metadata"].get("tags", []), "".join(c["source"])) for c in found]


def run(notebook: Path, given: dict, *, on_error: str = "stop") -> dict:
    """Run all cells and return what they defined; on_error "pass": a cell that fails is told and passed over, a figure say.

    Raises ValueError for a parameter that the notebook lacks, and whatever a cell raises where it is not passed over.
    """
    space = {"__name__": "__main__", "display": print}
    for number, (parameters, source) in enumerate(cells(notebook), 1):
        start = time.monotonic()
        try:
            exec(compile(source, f"{notebook.stem}, cell {number}", "exec"), space)
        except Exception:
            if on_error == "stop":
                raise
            traceback.print_exc()
        if parameters:
            if unknown := sorted(set(given) - set(space)):
                raise ValueError(f"{notebook.stem}: expected parameters of the notebook, got {', '.join(unknown)}")
            space |= given
        if (took := time.monotonic() - start) > 1:
            print(f"[{notebook.stem}] cell {number} {took:.1f} s", flush=True)
    return space


def main(argv: list[str] | None = None) -> None:
    """Run one notebook."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", help="its number or name")
    parser.add_argument("--scale", default="full")
    parser.add_argument("--set", nargs="*", default=[], metavar="'KEY: VALUE'", help="parameters in YAML, beside the scale's")
    parser.add_argument("--saes", type=Path, help="folder of SAEs (layer_N)")
    parser.add_argument("--on-error", choices=("stop", "pass"), default="stop")
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    names = sorted((ROOT / "notebooks").glob(f"{args.notebook}*.ipynb"))
    if len(names) != 1:
        parser.error(f"notebook: expected the number or name of one, got {args.notebook}, which fits {len(names)}")
    scale = yaml.safe_load((ROOT / "notebooks" / "scales" / f"{args.scale}.yaml").read_text())
    folder = f"runs/{args.scale}/{names[0].stem}"
    given = {"out_dir": folder, "figures_dir": f"{folder}/figures"} | (scale["notebooks"].get(names[0].stem) or {})
    for some in args.set:
        given |= yaml.safe_load(some)
    if args.saes:
        load.open = partial(load.open, saes=resolve(args.saes))
    run(names[0], given, on_error=args.on_error)


if __name__ == "__main__":
    main()

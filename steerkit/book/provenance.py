"""What belongs together: hashes of sources, code and data, and the stamp that ties outputs to sources."""

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets", "numpy", "papermill")
INJECTED = "injected-parameters"
_MACHINE_PATH = re.compile(
    r"(?<![\w.:/+\-])/(?:home|root|work|Users|tmp|private|var/folders)(?![\w-])[^\s'\"<>]*"
    r"|[A-Z]:\\{1,2}Users[^\s'\"<>]*|\S*site-packages\S*"
)


def digest(value) -> str:
    """Return the SHA-256 of `value` as canonical JSON; equal values give equal digests, whatever the key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache(maxsize=64)
def digest_files(root: Path, patterns: tuple[str, ...]) -> str:
    """Return one SHA-256 over the names and bytes of the files under `root` that match; .md files do not count.

    A pattern is a glob, a file or a folder; with ! before it, what it matches is left out. The answer is remembered for the life of
    the process.
    """
    found = {p for pattern in patterns if pattern[0] != "!" for p in _files(root, pattern) if p.suffix not in {".md", ".pyc"}}
    found -= {p for pattern in patterns if pattern[0] == "!" for p in _files(root, pattern[1:])}
    return digest({p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found})


def _files(root: Path, pattern: str) -> Iterable[Path]:
    for path in root.glob(pattern):
        yield from (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def versions() -> dict[str, str]:
    """Return the versions that decide numbers: Python, and the packages installed out of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def tags(cell: dict) -> list[str]:
    """Return the tags of a cell."""
    return cell["metadata"].get("tags", [])


def text(cell: dict) -> str:
    """Return the source of a cell; on disk it may be a list of lines."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def source_digest(nb: dict) -> str:
    """Return the SHA-256 of what a reader wrote: type, source and tags of every cell but the injected one."""
    cells = [c for c in nb["cells"] if INJECTED not in tags(c)]
    return digest([[c["cell_type"], text(c), sorted(tags(c))] for c in cells])


def outputs_digest(nb: dict) -> str:
    """Return the SHA-256 of the outputs and execution counts of the code cells."""
    return digest([[c.execution_count, c.outputs] for c in nb.cells if c.cell_type == "code"])


def stamp(nb: dict, *, parameters: dict, scale: str, **facts) -> dict:
    """Return the stamp of an executed notebook: digests of source and outputs, parameters, versions, and a seal.

    Put it into `nb.metadata["steerkit"]["stamp"]`; `check_stamp` then tells whether the parts still belong together.
    `facts` (for example executed_at) are recorded, and sealed too.
    """
    body = {"source": source_digest(nb), "outputs": outputs_digest(nb), "parameters": parameters, "scale": scale}
    body |= {"versions": versions()} | facts
    return body | {"sha256": digest(body)}


def check_stamp(nb: dict) -> list[str]:
    """Return what is wrong with an executed notebook, in words; an empty list means source and outputs belong together.

    Example: `assert check_stamp(nbformat.read("notebooks/01_steering_basics.ipynb", 4)) == []`
    """
    sealed = dict(nb.metadata.get("steerkit", {}).get("stamp", {}))
    if not sealed:
        return ["it has no stamp: run it with `make reproduce`, then `make publish`"]
    problems, seal = [], sealed.pop("sha256", None)
    if seal != digest(sealed):
        problems.append("the stamp was edited by hand")
    if sealed.get("source") != source_digest(nb):
        problems.append("its cells changed after it was run: run it again")
    if sealed.get("outputs") != outputs_digest(nb):
        problems.append("its outputs changed after it was run: run it again")
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        problems.append("its cells were not run once each, from first to last")
    if not any(c.outputs for c in code):
        problems.append("it has no outputs")
    problems += [f"cell {i} ends in an error" for i, c in enumerate(code, 1) if any(o.output_type == "error" for o in c.outputs)]
    return problems + [f"machine path in {where}: {path}" for where, path in leaks(nb)]


def leaks(nb: dict) -> list[tuple[str, str]]:
    """Return (place, path) for each machine path in the sources, outputs or metadata of a notebook."""
    places = [("the metadata", json.dumps(nb.metadata))]
    for number, cell in enumerate(nb.cells, 1):
        places.append((f"the source of cell {number}", cell.source))
        for output in cell.get("outputs", []):
            kept = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            texts = [output.get("text", ""), *map(str, output.get("traceback", [])), *map(str, kept.values())]
            places.append((f"the output of cell {number}", "\n".join(texts)))
    return [(where, hit) for where, text in places for hit in sorted(set(_MACHINE_PATH.findall(text)))]

"""The notebooks as jobs: what each is given at a scale, what determines its result, and whether it is up to date."""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from steerkit.book import provenance
from steerkit.book.closure import closure
from steerkit.files import ROOT

ALL = "*"  # what a notebook needs that comes after all others
DATA = ("data", "!data/claims.yaml", "!data/ledger")  # of a notebook that does not say; the ledger says that it reads these two
REASONS = {
    "notebook": "the notebook changed",
    "given": "its parameters changed",
    "code": "the modules it imports changed",
    "data": "data/ changed",
    "versions": "requirements.lock changed",
    "needs": "a notebook it needs changed",
}


@dataclass(frozen=True)
class Job:
    """One notebook at one scale: the parameters it is given, a digest of each thing that determines its result.

    Paths are relative to `root`; `needs` are names of earlier notebooks.
    """

    name: str
    scale: str
    root: Path
    given: dict
    needs: tuple[str, ...]
    parts: dict[str, str]

    @property
    def key(self) -> str:
        """Sixteen hex digits that change when anything in `parts` does."""
        return provenance.digest(self.parts)[:16]

    @property
    def source(self) -> str:
        return f"notebooks/{self.name}.ipynb"

    @property
    def folder(self) -> str:
        return f"runs/{self.scale}/{self.name}"

    @property
    def executed(self) -> str:
        return f"{self.folder}/{self.name}.ipynb"

    @property
    def outputs(self) -> list[str]:
        """The files that a finished run leaves: notebook, results, and an empty file named after the key."""
        return [self.executed, f"{self.folder}/results.json", f"{self.folder}/{self.key}.done"]

    @property
    def record(self) -> dict:
        """What the last run wrote into status.json; empty before the first."""
        path = self.root / self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each code cell took in the last run at this scale, or else when the notebook was published, if at this scale."""
        if known := self.record.get("cells"):
            return known
        nb = json.loads((self.root / self.source).read_text(encoding="utf-8"))
        stamp = nb["metadata"].get("steerkit", {}).get("stamp", {})
        return stamp.get("cells", {}) if stamp.get("scale") == self.scale else {}

    @property
    def state(self) -> str:
        """`done`, or why it has to run."""
        if all((self.root / path).exists() for path in self.outputs):
            return "done"
        record = self.record
        changed = [REASONS[k] for k, digest in self.parts.items() if record.get("parts", {}).get(k, digest) != digest]
        if changed:
            return ", ".join(changed)
        return {"failed": "it failed last time", "running": "it was interrupted"}.get(record.get("status"), "not run yet")


def jobs(scale: str, *, root: Path = ROOT) -> dict[str, Job]:
    """Return the notebooks of a scale in reading order, from notebooks/scales/<scale>.yaml.

    The file holds `figures` (a folder) and `notebooks`: name -> parameters that differ from the notebook's own. A
    notebook that the file leaves out is no part of the scale. What a notebook needs is in its own metadata, under
    `steerkit`: `needs` (earlier notebooks; "*": all of the scale) and `data` (files, folders or globs; where it says nothing, all of
    data/ but what the ledger alone reads).
    Raises ValueError for an unknown scale, an unknown notebook or a missing need.
    """
    path = root / "notebooks" / "scales" / f"{scale}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"unknown scale `{scale}`: there are {known or 'none'}")
    spec = yaml.safe_load(path.read_text()) or {}
    if unknown := set(spec) - {"figures", "notebooks"}:
        raise ValueError(f"{scale}.yaml: expected `figures` and `notebooks`, got {', '.join(sorted(unknown))}")
    found: dict[str, Job] = {}
    for name, given in sorted((spec.get("notebooks") or {}).items()):
        source = root / "notebooks" / f"{name}.ipynb"
        if not source.exists():
            raise ValueError(f"{scale}.yaml names `{name}`, but there is no notebooks/{name}.ipynb")
        nb = json.loads(source.read_text(encoding="utf-8"))
        meta = nb["metadata"].get("steerkit", {})
        needs, data = tuple(meta.get("needs", ())), tuple(meta.get("data", DATA))
        needs = tuple(found) if ALL in needs else needs
        if missing := [need for need in needs if need not in found]:
            raise ValueError(f"{name} needs `{missing[0]}`, which is not an earlier notebook of {scale}.yaml")
        given = {"out_dir": f"runs/{scale}/{name}", "figures_dir": spec.get("figures", f"runs/{scale}/figures")} | (given or {})
        parts = {
            "notebook": provenance.source_digest(nb),
            "given": provenance.digest(given),
            "code": provenance.digest(closure(root, nb)),
            "data": provenance.digest_files(root, data),
            "versions": provenance.digest_files(root, ("requirements.lock",)),
            "needs": provenance.digest([found[need].key for need in needs]),
        }
        found[name] = Job(name, scale, root, given, needs, parts)
    return found


def select(every: dict[str, Job], wanted: str = "") -> list[Job]:
    """Return the job named by its number (01) or whole name, or all jobs for an empty string; else raise ValueError."""
    found = [job for name, job in every.items() if wanted in ("", name) or wanted.zfill(2) == name.split("_")[0]]
    if wanted and len(found) != 1:
        raise ValueError(f"expected the name or number of one notebook, got `{wanted}`: there are {', '.join(every) or 'none'}")
    return found

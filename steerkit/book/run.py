"""Run notebooks through papermill, parameters checked strictly, outputs stamped: `python -m steerkit.book.run --help`."""

import argparse
import ast
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from steerkit.book import provenance
from steerkit.book.cells import Cells
from steerkit.book.jobs import Job, jobs, select
from steerkit.book.ledger import ship
from steerkit.book.parameters import check_parameters, parameters
from steerkit.book.provenance import INJECTED, check_stamp, leaks, stamp, tags
from steerkit.book.report import results_table
from steerkit.files import ROOT, check_writable, write_atomic
from steerkit.progress import about

__all__ = [
    "Job",
    "check_parameters",
    "check_stamp",
    "execute",
    "jobs",
    "leaks",
    "parameters",
    "publish",
    "select",
    "stamp",
    "status",
    "table",
]
log = logging.getLogger("steerkit.book.run")


def _this_python():
    """Return a kernel manager class whose `python3` is this very interpreter, whatever kernels a user has installed."""
    import zmq
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class ThisPython(AsyncKernelManager):
        @default("transport_encryption")
        def _encrypt_where_possible(self):
            return "auto" if zmq.has("curve") else "disabled"

        @property
        def kernel_spec(self):
            argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=CRITICAL", "-f", "{connection_file}"]
            inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
            secure = {"supported_encryption": ["curve"]}
            return KernelSpec(argv=argv, language="python", display_name="Python 3", env=inline, metadata=secure)

    return ThisPython


def _first_line(source: str) -> str:
    lines = [line.strip() for line in source.splitlines() if line.strip() and not line.lstrip().startswith(("#", "%"))]
    return lines[0] if lines else ""


def execute(job: Job, *, overrides: dict | None = None, report: Callable[[str], None] = log.info) -> dict:
    """Run `job` and return its record, which is also in <folder>/status.json.

    Only parameters that differ from the notebook's own are injected, so a run at the notebook's own values reads as it
    was written. The executed notebook appears whole, with its stamp, or not at all; after a failure what was reached
    is in <name>.failed.ipynb, and the record's `error` holds the cell, its first line and the exception. Raises, before
    anything runs, ValueError for a parameter that is unknown or of a wrong type, OSError for a folder that is read-only.
    """
    import nbformat
    from papermill import PapermillExecutionError, execute_notebook

    if overrides:
        given = job.given | overrides
        job = replace(job, given=given, parts=job.parts | {"given": provenance.digest(given)})
    folder, begun = job.root / job.folder, time.monotonic()
    check_writable(folder)
    source = nbformat.read(job.root / job.source, 4)
    record = {"notebook": job.name, "status": "running", "parts": job.parts, "cells": job.seconds}
    try:
        declared = parameters(source)
        values = check_parameters(declared, job.given)
        for place in (values["out_dir"], f"{values['figures_dir']}/{job.name}"):
            check_writable(job.root / place)
    except (ValueError, OSError) as exc:
        error = {"cell": 0, "of": 0, "line": "parameters", "what": str(exc)}
        write_atomic(folder / "status.json", json.dumps(record | {"status": "failed", "error": error}, indent=1))
        raise
    changed = {n: v for n, v in values.items() if (v, type(v)) != (declared[n].default, type(declared[n].default))}
    sources = [c.source for c in source.cells if c.cell_type == "code" and c.source.strip()]
    cells = Cells(job.name, sources, len(sources) + bool(changed), job.seconds, report)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.done"), *folder.glob("*.ipynb"), folder / "results.json", folder / "cards.json"]:
        old.unlink(missing_ok=True)
    write_atomic(folder / "status.json", json.dumps(record, indent=1))
    running, error = folder / f"{job.name}.running.ipynb", ""
    try:
        execute_notebook(
            job.root / job.source,
            running,
            parameters=changed,
            cwd=job.root,
            kernel_name="python3",
            progress_bar=False,
            record_timing=False,
            coalesce_streams=True,
            kernel_manager_class=_this_python(),
            **cells.hooks,
        )
        if not (folder / "results.json").exists():
            error = "the notebook ended without writing results.json: end it with `book.close(...)`"
    except PapermillExecutionError as exc:
        error = f"{exc.ename}: {exc.evalue}"
    except Exception as exc:  # a dead kernel, a full disk: whatever ends a run is reported in the same way
        error = f"{type(exc).__name__}: {exc}"
    record |= {"status": "failed" if error else "done", "seconds": round(time.monotonic() - begun, 1)}
    record["cells"] = cells.before | cells.seconds if cells.before or not error else {}  # never the beginning alone
    if error:
        where = {"cell": cells.number, "of": cells.total, "line": _first_line(cells.source)}
        record["error"] = where | {"what": error[:2000]}
        if running.exists():
            running.replace(folder / f"{job.name}.failed.ipynb")
    else:
        nb = _tidy(nbformat.read(running, 4))
        sealed = stamp(
            nb,
            parameters=values,
            scale=job.scale,
            seconds=record["seconds"],
            cells=cells.seconds,
            executed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        nb.metadata["steerkit"] = nb.metadata.get("steerkit", {}) | {"stamp": sealed}
        record["leaks"] = leaks(nb)
        write_atomic(job.root / job.executed, nbformat.writes(nb) + "\n")
        running.unlink()
    write_atomic(folder / "status.json", json.dumps(record, indent=1))
    if not error:
        write_atomic(job.root / job.outputs[-1], "")
    return record


def _tidy(nb: dict) -> dict:
    """Drop papermill's and nbclient's notes: they hold paths and times, and differ from run to run."""
    nb.metadata.pop("papermill", None)
    for cell in nb.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    nb.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return nb


def status(chosen: Iterable[Job]) -> list[str]:
    """Return a line for each notebook: up to date, or why it has to run and for about how long; and for how long in all."""
    lines, left = [], []
    for job in chosen:
        if job.state == "done":
            lines.append(f"[{job.name}] up to date (it took {job.record.get('seconds', 0):.0f} s)")
            continue
        left.append(sum(job.seconds.values()))
        lines.append(f"[{job.name}] to run: {job.state}" + (f" ({about(left[-1])})" if left[-1] else ""))
    return [*lines, f"{about(sum(left))} in all"] if len(left) > 1 and all(left) else lines


def table(scale: str, *, root: Path = ROOT, fmt: str = "simple") -> str:
    """Write runs/<scale>/results.json (notebook -> metric -> value, low, high, n, unit) and return the table of it."""
    every, folder = jobs(scale, root=root), root / "runs" / scale
    states = {n: "failed" if j.record.get("status") == "failed" else j.state for n, j in every.items()}
    for name, job in every.items():
        blocked = [need for need in job.needs if states[need] != "done"]
        states[name] = f"waits for {blocked[0]}" if blocked and states[name] not in {"done", "failed"} else states[name]
    found = {n: json.loads((folder / n / "results.json").read_text()) for n, state in states.items() if state == "done"}
    write_atomic(folder / "results.json", json.dumps(found, indent=1) + "\n")
    return results_table(folder, states=states, fmt=fmt)


def publish(*, root: Path = ROOT, scale: str = "laptop", max_bytes: int = 1_000_000) -> dict[str, str]:
    """Copy executed notebooks into notebooks/, and their cards into data/ledger/; return for each name "published" or why it was refused.

    Of a scale with another preset, which cannot be the notebooks' own, the cards alone are kept.
    """
    import nbformat

    said, every = {}, jobs(scale, root=root)
    cards_alone = any("preset" in job.given for job in every.values())
    for name, job in every.items():
        if job.state != "done" or cards_alone:
            said[name] = "published" if job.state == "done" else f"refused: {job.state}"
            continue
        text = (root / job.executed).read_text()
        nb = nbformat.reads(text, 4)
        problems = check_stamp(nb)
        if any(INJECTED in tags(cell) for cell in nb.cells):
            problems.append(f"the parameters cell must hold the values of {scale}.yaml; the run had others injected")
        if len(text.encode()) > max_bytes:
            problems.append(f"{len(text.encode())} bytes, more than {max_bytes}")
        if not problems:
            write_atomic(root / job.source, text)
        said[name] = "refused: " + "; ".join(problems) if problems else "published"
    ship(scale, [name for name, what in said.items() if what == "published"], root=root)
    return said


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def _check(job: Job) -> None:
    """Raise ValueError, with the names of both, if the scale file gives the notebook parameters that it does not take."""
    import nbformat

    try:
        check_parameters(parameters(nbformat.read(job.root / job.source, 4)), job.given)
    except ValueError as exc:
        raise ValueError(f"notebooks/scales/{job.scale}.yaml, {job.name}: {exc}") from None


def _notebook(job: Job, overrides: dict, key: str) -> int:
    record = execute(job, overrides=overrides)
    if error := record.get("error"):
        log.error("[%s] FAILED in cell %d/%d: %s", job.name, error["cell"], error["of"], error["line"])
        log.error("[%s] %s", job.name, error["what"])
        log.error("[%s] what was reached: %s/%s.failed.ipynb", job.name, job.folder, job.name)
        return 1
    for where, path in record["leaks"]:
        log.warning("[%s] warning: machine path in %s: %s", job.name, where, path)
    log.info("[%s] done in %.0f s", job.name, record["seconds"])
    if key and key != job.key:
        log.error("[%s] something it depends on changed after this call began: call again to go on", job.name)
        return 1
    return 0


def _command(args: argparse.Namespace) -> int:
    root = args.root.resolve()
    if args.command == "publish":
        said = publish(root=root, scale=args.scale)
        log.info("\n".join(f"[{name}] {what}" for name, what in said.items()))
        return int(any(what != "published" for what in said.values()))
    chosen = select(jobs(args.scale, root=root), args.name)
    if args.command == "notebook":
        if not args.name:
            raise ValueError("name one notebook")
        return _notebook(chosen[0], {name: _literal(value) for name, value in args.p}, args.key)
    if args.command == "status":
        for job in chosen:
            _check(job)
        log.info("\n".join(status(chosen)) or f"no notebooks in {args.scale}.yaml")
    elif args.command == "table":
        log.info("\n%s", table(args.scale, root=root))
    elif args.command == "check":
        import nbformat

        bad = {j.name: check_stamp(nbformat.read(root / j.executed, 4)) if j.state == "done" else [j.state] for j in chosen}
        log.info("\n".join(f"[{name}] {'; '.join(problems) or 'stamp valid'}" for name, problems in bad.items()))
        return int(any(bad.values()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: run one notebook; show what is up to date; make the table; check stamps; publish."""
    parser = argparse.ArgumentParser(prog="python -m steerkit.book.run", description=__doc__)
    parser.add_argument("command", choices=["notebook", "status", "table", "check", "publish"])
    parser.add_argument("name", nargs="?", default="", help="number (01) or name of a notebook; none means all")
    parser.add_argument("--scale", default="laptop", help="a file of notebooks/scales, without .yaml")
    parser.add_argument("--root", type=Path, default=ROOT, help="project folder")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="override a parameter")
    parser.add_argument("--key", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        return _command(args)
    except (ValueError, OSError) as exc:
        log.error("error: %s", exc)
        return 2
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # its word on the kernel that ended with us
        log.error("interrupted: call again to go on")
        return 130


if __name__ == "__main__":
    sys.exit(main())

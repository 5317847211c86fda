"""The runner, on small notebooks that are really run, alone and through make and Snakemake."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from steerkit.book import ledger, run
from steerkit.book.cells import Cells
from steerkit.book.closure import closure
from steerkit.files import check_writable, write_atomic
from steerkit.progress import about

PROJECT = Path(__file__).resolve().parents[2]
PARAMETERS = """layer: int = 13  # residual stream after this block
scales: list[float] = [0.0, 1.0]  # residual units
out_dir: str = "runs/laptop/{name}"  # where results go
figures_dir: str = "figures"  # where figures go"""
OPEN = 'from steerkit.book.report import Book\nbook = Book("{name}", out_dir=out_dir, figures_dir=figures_dir)'
CARD = 'from steerkit.stats import Interval\nbook.card("it rises", paper="up", ours=Interval(0.2, 0.1, 0.3, 9), side=1)'
METRIC = 'book.metric("layer", layer, n=len(scales))'


def notebook(name, *body, parameters=PARAMETERS, needs=()):
    cells = [
        new_markdown_cell(f"# {name}"),
        new_code_cell(parameters.format(name=name), metadata={"tags": ["parameters"]}),
    ]
    cells += [new_code_cell(source.format(name=name)) for source in body]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    ours = {"needs": list(needs), "data": ["data/a.txt"]}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "steerkit": ours})


@pytest.fixture
def project(tmp_path):
    """Return a function that makes a small project, with the real steerkit inside, out of notebooks."""
    shutil.copytree(PROJECT / "steerkit", tmp_path / "steerkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "requirements.lock").write_text("x==1\n")
    (tmp_path / "notebooks" / "scales").mkdir(parents=True)

    def make(notebooks, **scales):
        for name, nb in notebooks.items():
            nbformat.write(nb, tmp_path / "notebooks" / f"{name}.ipynb")
        for scale, given in ({"laptop": dict.fromkeys(notebooks)} | scales).items():
            text = yaml.safe_dump({"notebooks": given} | ({"figures": "figures"} if scale == "laptop" else {}))
            (tmp_path / "notebooks" / "scales" / f"{scale}.yaml").write_text(text)
        return tmp_path

    return make


def job(root, name="01_a", scale="laptop"):
    return run.jobs(scale, root=root)[name]


# ---------------------------------------------------------------------------------------------------- parameters
def test_papermill_skips_what_we_refuse():
    """The trap is real: papermill's own inspector does not see a line with two equal signs."""
    from papermill.inspection import _infer_parameters

    nb = notebook("01_a", parameters="layer: int = 13  # paper: layer = 12\nseed: int = 0")
    assert [p.name for p in _infer_parameters(nbformat.from_dict(_tagged(nb)))] == ["seed"]
    with pytest.raises(ValueError, match=r"papermill cannot read `layer: int = 13  # paper: layer = 12`"):
        run.parameters(nb)


def _tagged(nb):
    for cell in nb.cells:
        cell.metadata.setdefault("tags", [])
    return nb


@pytest.mark.parametrize(
    "source, words",
    [
        ("layer: int | None = 13", "papermill cannot read"),
        ("path: Path = 'x'", "brackets only"),
        ("a, b = 1, 2", "expected `name"),
        ("import os", "expected `name"),
        ("layer: int = 3 * 4", "literal"),
        ("layer: int", "expected `name"),
        ("layer: int = = 3", "plain Python"),
    ],
)
def test_parameters_cell_is_refused(source, words):
    with pytest.raises(ValueError, match=words):
        run.parameters(notebook("01_a", parameters=source))


def test_exactly_one_parameters_cell():
    nb = notebook("01_a", "x")
    nb.cells[2].metadata["tags"] = ["parameters"]
    with pytest.raises(ValueError, match="exactly one"):
        run.parameters(nb)
    with pytest.raises(ValueError, match="exactly one"):
        run.parameters(new_notebook(cells=[new_code_cell("x")]))


SOURCE = (
    "n: int = 3  # samples\nx: float = 0.5\nname: str = 'CAA'\non: bool = True\nlayers: list[int] = [3, 8]\n"
    "grid: dict[str, list[float]] = {'a': [0.5]}\nplain = 3\nfree = None"
)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 4},
        {"x": 1},
        {"x": 1.5},
        {"on": False},
        {"layers": []},
        {"grid": {"b": [1, 2.5]}},
        {"plain": 4},
        {"free": "x"},
    ],
)
def test_fitting_values_pass(given):
    values = run.check_parameters(run.parameters(notebook("01_a", parameters=SOURCE.replace("{", "{{").replace("}", "}}"))), given)
    assert len(values) == 8 and given.items() <= values.items() and values["name"] == "CAA"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"lyers": [3]}, "unknown parameter `lyers`: did you mean `layers`"),
        ({"zzz": 3}, "the notebook declares n, x"),
        ({"n": 3.0}, r"`n`: expected int, got 3.0 \(float\)"),
        ({"n": True}, "expected int, got True"),
        ({"n": "3"}, "expected int"),
        ({"x": "0.5"}, "expected float"),
        ({"on": 1}, "expected bool"),
        ({"layers": [3, "8"]}, r"expected list\[int\]"),
        ({"layers": 3}, r"expected list\[int\]"),
        ({"grid": {"a": ["x"]}}, "expected dict"),
        ({"plain": "four"}, "expected int"),
    ],
)
def test_unknown_and_mistyped_values_are_errors(given, words):
    declared = run.parameters(notebook("01_a", parameters=SOURCE.replace("{", "{{").replace("}", "}}")))
    assert declared["n"].help == "samples"
    with pytest.raises(ValueError, match=words):
        run.check_parameters(declared, given)


def test_wrong_values_stop_the_command_before_anything_runs(project, caplog):
    root = project({"01_a": notebook("01_a", OPEN)}, smoke={"01_a": {"layr": 3}})
    assert run.main(["notebook", "01", "--scale", "smoke", "--root", str(root)]) == 2
    assert "did you mean `layer`" in caplog.text
    assert run.main(["notebook", "01", "--root", str(root), "-p", "layer", "1.5"]) == 2
    assert "expected int, got 1.5" in caplog.text
    assert not list((root / "runs").rglob("*.ipynb"))
    assert "layr" in run.table("smoke", root=root)


def test_a_scale_file_is_checked_whole_before_the_first_notebook_runs(project, caplog):
    root = project({"01_a": notebook("01_a"), "02_b": notebook("02_b")}, smoke={"01_a": {}, "02_b": {"scales": 3}})
    assert run.main(["status", "--root", str(root)]) == 0
    assert run.main(["status", "--scale", "smoke", "--root", str(root)]) == 2
    assert "notebooks/scales/smoke.yaml, 02_b: parameter `scales`: expected list[float], got 3 (int)" in caplog.text


# ---------------------------------------------------------------------------------------------------- one run
def test_a_run_is_stamped_and_published_and_the_stamp_finds_every_change(project):
    where = "import os, sys\nfrom pathlib import Path\nPath(out_dir).mkdir(parents=True, exist_ok=True)\n"
    where += 'Path(out_dir, "where.txt").write_text(sys.executable + "|" + os.getcwd());'
    root = project({"01_a": notebook("01_a", where, OPEN, CARD, METRIC, "book.close({{'preset': 'tiny'}})")})
    lines = []
    record = run.execute(job(root), report=lines.append)
    assert record["status"] == "done" and job(root).state == "done" and record["leaks"] == []
    assert [line.rsplit(" ", 2)[0] for line in lines] == [f"[01_a] cell {i}/6" for i in range(1, 7)]
    assert (root / "runs/laptop/01_a/where.txt").read_text() == f"{sys.executable}|{root.resolve()}"
    executed = nbformat.read(root / "runs/laptop/01_a/01_a.ipynb", 4)
    assert run.check_stamp(executed) == []
    assert len(executed.cells) == 7, "nothing differs from the notebook's own values, so nothing is injected"
    assert "papermill" not in json.dumps(executed.metadata).replace('"papermill": "', "")
    assert executed.metadata.steerkit.stamp.parameters["scales"] == [0.0, 1.0]
    assert "layer" in json.loads((root / "runs/laptop/01_a/results.json").read_text())

    def after(change):
        nb = nbformat.from_dict(json.loads(json.dumps(executed)))
        change(nb)
        return "; ".join(run.check_stamp(nb))

    assert "cells changed" in after(lambda nb: nb.cells[0].update(source="# Another title"))
    assert "cells changed" in after(lambda nb: nb.cells[2].update(source="x = 2"))
    assert "outputs changed" in after(lambda nb: nb.cells[5].outputs[0]["data"].update({"text/plain": "layer: 99"}))
    assert "not run once each" in after(lambda nb: nb.cells[4].update(execution_count=1))
    assert "no outputs" in after(lambda nb: [c.update(outputs=[], execution_count=None) for c in nb.cells if "outputs" in c])
    assert "edited by hand" in after(lambda nb: nb.metadata.steerkit.stamp.update(scale="full"))
    assert "no stamp" in after(lambda nb: nb.metadata.pop("steerkit"))
    assert after(lambda nb: nb.metadata.update(custom="x")) == ""

    assert run.publish(root=root) == {"01_a": "published"}
    published = nbformat.read(root / "notebooks/01_a.ipynb", 4)
    assert run.check_stamp(published) == [] and published.metadata.steerkit.data == ["data/a.txt"]
    assert job(root).state == "done", "publishing changes outputs, not sources"
    (card,) = ledger.shipped(root=root)["01_a"].cards.values()
    assert str(card) == "it rises: same direction (paper up | ours 0.20 [0.10, 0.30], n = 9)", "its cards are kept beside it"
    published.cells[0].source = "# Another title"
    nbformat.write(published, root / "notebooks/01_a.ipynb")
    assert "cells changed" in run.check_stamp(published)[0]
    assert run.publish(root=root) == {"01_a": "refused: the notebook changed"}


def test_of_another_preset_the_cards_alone_are_published(project):
    lines = "preset: str = \"embedded\"  # which model\n" + PARAMETERS
    close = "book.close({{'preset': preset}})"
    root = project({"01_a": notebook("01_a", OPEN, CARD, METRIC, close, parameters=lines)}, large={"01_a": {"preset": "large-9b"}})
    assert run.main(["notebook", "01", "--scale", "large", "--root", str(root)]) == 0
    before = (root / "notebooks/01_a.ipynb").read_text()
    assert run.publish(root=root, scale="large") == {"01_a": "published"}
    assert ledger.shipped("large", root=root)["01_a"].preset == "large-9b" and ledger.shipped(root=root) == {}
    assert (root / "notebooks/01_a.ipynb").read_text() == before


def test_other_values_are_injected_and_not_published(project):
    root = project({"01_a": notebook("01_a", OPEN, METRIC, "book.close()")})
    assert run.main(["notebook", "01", "--root", str(root), "-p", "layer", "18", "-p", "scales", "[2.0]"]) == 0
    nb = nbformat.read(root / "runs/laptop/01_a/01_a.ipynb", 4)
    assert nb.cells[2].source.split("\n")[1:3] == ["layer = 18", "scales = [2.0]"] and run.check_stamp(nb) == []
    assert json.loads((root / "runs/laptop/01_a/results.json").read_text())["layer"]["value"] == 18
    assert job(root).state == "its parameters changed"
    assert "refused" in run.publish(root=root)["01_a"]


@pytest.mark.parametrize(
    "body, cell, line, what",
    [
        (["x = 1", "# a comment\ny = x / 0\nz = 2"], 3, "y = x / 0", "ZeroDivisionError: division by zero"),
        (["import os\nos._exit(1)"], 2, "import os", "DeadKernelError"),
        (["x = 1"], 2, "x = 1", "results.json"),
    ],
)
def test_a_failing_notebook_says_where_and_why(project, caplog, body, cell, line, what):
    root = project({"01_a": notebook("01_a", *body)})
    assert run.main(["notebook", "01_a", "--root", str(root)]) == 1
    error = job(root).record["error"]
    assert (error["cell"], error["line"]) == (cell, line) and what in error["what"]
    assert f"FAILED in cell {cell}/" in caplog.text and line in caplog.text and what in caplog.text
    kept = [p.name for p in sorted((root / "runs/laptop/01_a").iterdir())]
    assert kept == ["01_a.failed.ipynb", "status.json"]
    assert job(root).state == "it failed last time"
    assert "failed" in run.table("laptop", root=root)


def test_machine_paths_are_found():
    nb = notebook("01_a", "1", 'open("/home/ann/x.txt")')
    nb.cells[2].outputs = [new_output("stream", text="saved to /tmp/pytest-1/x and https://example.org/home/x and runs/work/x")]
    nb.cells[3].outputs = [new_output("display_data", data={"image/png": "AA/home/BB", "text/html": "<p>/Users/ann/.cache</p>"})]
    found = [path for _, path in run.leaks(nb)]
    assert found == ["/tmp/pytest-1/x", "/home/ann/x.txt", "/Users/ann/.cache"]


def papermill(root, *options):
    command = [sys.executable, "-m", "papermill", "notebooks/01_a.ipynb", "out.ipynb", "--no-progress-bar", *options]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_plain_papermill_runs_a_notebook_by_hand(project):
    root = project({"01_a": notebook("01_a", OPEN, METRIC, "book.close()")})
    code, said = papermill(root, "-p", "layer", "18", "-y", "scales: [20.0, 40]")
    assert code == 0, said
    assert json.loads((root / "runs/laptop/01_a/results.json").read_text())["layer"] | {"n": 2, "value": 18} == {
        "value": 18.0, "low": None, "high": None, "n": 2, "unit": ""
    }  # fmt: skip


@pytest.mark.parametrize(
    "given, words",
    [
        (("-p", "scales", "[20.0, 40.0]"), "parameter `scales`: expected list[float], got '[20.0, 40.0]' (str) (papermill takes a list as"),
        (("-p", "layer", "18", "-p", "scale", "3"), "unknown parameter `scale`: did you mean `scales`?"),
        (("-p", "out_dir", "7"), "parameter `out_dir`: expected str, got 7 (int)"),
    ],
)
def test_plain_papermill_checks_its_parameters_too(project, given, words):
    root = project({"01_a": notebook("01_a", OPEN, "open('reached', 'w').close()", "book.close()")})
    code, said = papermill(root, *given)
    assert code == 1 and f"ValueError: {words}" in said
    assert not (root / "reached").exists() and not (root / "runs").exists()


def test_a_parameter_edited_by_hand_is_checked_when_the_book_is_opened(project):
    """As in JupyterLab: nothing is injected, and the cell itself is wrong."""
    root = project({"01_a": notebook("01_a", OPEN, "book.close()", parameters=PARAMETERS.replace("[0.0, 1.0]", "'20'"))})
    code, said = papermill(root)
    assert code == 1 and "ValueError: parameter `scales`: expected list[float], got '20' (str)\n" in said
    own = notebook("01_a", "import pathlib\nwhere: pathlib.Path = pathlib.Path('x')", OPEN, "book.close()")
    nbformat.write(own, root / "notebooks/01_a.ipynb")
    assert papermill(root)[0] == 0, "a global of another type is no parameter"


def test_a_folder_that_cannot_be_written_stops_a_run_before_its_first_cell(project, caplog):
    root = project({"01_a": notebook("01_a", "open('reached', 'w').close()", OPEN, "book.close()")})
    (root / "figures").write_text("in the way")
    assert run.main(["notebook", "01", "--root", str(root)]) == 2
    assert f"expected to write into {root.resolve()}/figures/01_a, got Not a directory: {root.resolve()}/figures" in caplog.text
    assert job(root).record["status"] == "failed" and not (root / "reached").exists()
    code, said = papermill(root)
    assert code == 1 and "OSError: expected to write into" in said


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that nobody can write into")
def test_a_read_only_folder_is_named():
    with pytest.raises(OSError, match=r"expected to write into /sys/figures/01_a, got .*: /sys; free it, or choose another folder"):
        check_writable("/sys/figures/01_a")


def test_an_interrupted_run_says_so_in_one_line(project):
    root = project({"01_a": notebook("01_a", OPEN, "import time\ntime.sleep(60)", "book.close()")})
    command = [sys.executable, "-m", "steerkit.book.run", "notebook", "01", "--root", str(root)]
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a shell makes what it runs in the background ignore it)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=root, start_new_session=True, preexec_fn=heeds, **pipes)
    said = ""
    while "cell 2/4" not in said:
        said += process.stdout.readline()
    time.sleep(1)  # the kernel is asleep in its cell by then
    rest = None
    while rest is None:  # Python drops a Ctrl-C that falls into a finaliser; a user presses again
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            rest = process.communicate(timeout=20)[0]
    assert process.returncode == 130 and rest.endswith("interrupted: call again to go on\n")
    assert job(root).state == "it was interrupted"


def test_the_time_left_is_that_of_the_run_before(project, caplog):
    """Cells are known by their source: a cell that is added says nothing, and the others keep their times."""
    slow = "import time\ntime.sleep(1.6)"
    body = [OPEN, METRIC, slow, "book.close()"]
    root = project({"01_a": notebook("01_a", *body), "02_b": notebook("02_b", *body)})
    lines = []
    first = run.execute(job(root), report=lines.append)
    assert not [line for line in lines if "left" in line], "the first run has nothing to go by"
    assert len(first["cells"]) == 5 and max(first["cells"].values()) >= 1.6
    run.publish(root=root)
    assert nbformat.read(root / "notebooks/01_a.ipynb", 4).metadata.steerkit.stamp.cells == first["cells"]
    shutil.rmtree(root / "runs")
    assert run.status([job(root)]) == ["[01_a] to run: not run yet (about 10 s)"], "a fresh clone goes by what is published"
    nb = nbformat.read(root / "notebooks/01_a.ipynb", 4)
    nb.cells.insert(3, new_code_cell("layer"))
    nbformat.write(nb, root / "notebooks/01_a.ipynb")
    lines.clear()
    run.execute(job(root), report=lines.append)
    assert [line.endswith(" s, about 10 s left") for line in lines] == [True] * 4 + [False] * 2, lines
    assert "in all" not in "".join(run.status(run.jobs("laptop", root=root).values())), "nothing is known of 02_b"


def test_the_beginning_alone_says_nothing_of_the_time_left(project):
    root = project({"01_a": notebook("01_a", OPEN, "1 / 0", "book.close()")})
    assert run.execute(job(root), report=print)["cells"] == {}


def test_status_adds_up_the_time_left(project):
    root = project({"01_a": notebook("01_a"), "02_b": notebook("02_b")})
    for name in ("01_a", "02_b"):
        write_atomic(root / "runs/laptop" / name / "status.json", json.dumps({"cells": {"x": 60.0, "y": 40.0}}))
    every = run.jobs("laptop", root=root)
    assert run.status(every.values()) == [*(f"[{name}] to run: not run yet (about 2 min)" for name in every), "about 3 min in all"]


def test_the_time_left_follows_the_pace(monkeypatch):
    clock, lines = iter([0.0, 20.0, 20.0, 30.0]), []
    monkeypatch.setattr("steerkit.book.cells.time.monotonic", lambda: next(clock))
    before = {Cells.key("a"): 10.0, Cells.key("b"): 5.0, Cells.key("c"): 60.0, Cells.key("gone"): 999.0}
    cells = Cells("01_a", ["a", "b", "c"], 3, before, lines.append)
    for source in "ab":
        cells.hooks["on_cell_execute"](cell=new_code_cell(source), cell_index=0)
        cells.hooks["on_cell_executed"](cell=new_code_cell(source), cell_index=0, execute_reply=None)
    assert lines == ["[01_a] cell 1/3 20.0 s, about 2 min left", "[01_a] cell 2/3 10.0 s, about 2 min left"]
    assert cells.left == 120.0 and cells.seconds == {Cells.key("a"): 20.0, Cells.key("b"): 10.0}
    assert [about(s) for s in (3, 42, 100, 5400)] == ["about 10 s", "about 40 s", "about 2 min", "about 1.5 h"]


# ---------------------------------------------------------------------------------------------------- the graph
def stale(root, paths, change):
    """Return the notebooks whose key is another one while files under `root` that match are changed."""
    keys = lambda: {name: j.key for name, j in run.jobs("laptop", root=root).items()}  # noqa: E731
    run.provenance.digest_files.cache_clear()
    before, old = keys(), {path: path.read_text() for path in root.glob(paths)}
    assert old, paths
    for path, text in old.items():
        path.write_text(change(text))
    run.provenance.digest_files.cache_clear()
    now = keys()
    for path, text in old.items():
        path.write_text(text)
    run.provenance.digest_files.cache_clear()
    return {name for name in now if now[name] != before[name]}


def test_the_key_follows_content_not_times(project):
    root = project({"01_a": notebook("01_a", "1"), "02_b": notebook("02_b", "1", needs=["01_a"])}, smoke={"01_a": {"layer": 3}})
    before = job(root).key
    os.utime(root / "notebooks/01_a.ipynb")
    assert stale(root, "data/a.txt", lambda s: s) == set()
    assert stale(root, "notebooks/01_a.ipynb", lambda s: s.replace("# 01_a", "# title")) == {"01_a", "02_b"}
    assert stale(root, "notebooks/02_b.ipynb", lambda s: s.replace("# 02_b", "# title")) == {"02_b"}
    assert stale(root, "notebooks/scales/laptop.yaml", lambda s: s.replace("02_b: null", "02_b: {layer: 4}")) == {"02_b"}
    for path in ("data/a.txt", "requirements.lock"):
        assert stale(root, path, lambda s: s + "\n# more") == {"01_a", "02_b"}
    assert stale(root, "steerkit/stats.py", lambda s: s + "\nMORE = 1") == set(), "these notebooks import nothing"
    (root / "data" / "unused.txt").write_text("x")  # the notebooks say that they use data/a.txt
    assert job(root).key == before != job(root, scale="smoke").key
    assert job(root, scale="smoke").given["figures_dir"] == "runs/smoke/figures"


def test_the_ledger_comes_last_and_what_it_alone_reads_reruns_nothing_else(project):
    every = {"01_a": notebook("01_a", "1"), "02_b": notebook("02_b", "1"), "09_l": notebook("09_l", "1", needs=["*"])}
    del every["02_b"].metadata["steerkit"]["data"]  # all of data/
    every["09_l"].metadata["steerkit"]["data"] = ["data/claims.yaml", "data/ledger", "!data/ledger/laptop.json"]
    root = project(every, small={"02_b": None, "09_l": None})
    for path in ("claims.yaml", "ledger/laptop.json", "ledger/other.json", "b.txt"):
        write_atomic(root / "data" / path, "x")
    assert [run.jobs(scale, root=root)["09_l"].needs for scale in ("laptop", "small")] == [("01_a", "02_b"), ("02_b",)]
    more = lambda text: text + "more"  # noqa: E731
    assert stale(root, "data/ledger/laptop.json", more) == set(), "publishing makes nothing stale"
    for path in ("data/claims.yaml", "data/ledger/other.json"):
        assert stale(root, path, more) == {"09_l"}
    assert stale(root, "data/b.txt", more) == {"02_b", "09_l"} and stale(root, "data/a.txt", more) == {"01_a", "02_b", "09_l"}


def reworded(text):
    """Change words alone: the first docstring, and a comment."""
    return text.replace('"""', '"""Other words. ', 1) + "\n# more"


def test_a_notebook_runs_again_where_code_that_it_can_run_changed(project):
    """Imports are followed through modules, into functions, through the packages above and the names that those find late."""
    mixed = "%matplotlib inline\nif layer:\n    !ls\nfrom steerkit.book import report"
    front = "import steerkit as sk\nsk.caa, sk.sae_ts.approximator.aim"
    bodies = {"01_chain": "from steerkit.one import f", "02_front": front, "03_magic": mixed, "04_odd": "files = !ls\nimport numpy"}
    root = project({name: notebook(name, body) for name, body in bodies.items()})
    (root / "steerkit/deep").mkdir()
    sources = {
        "one": "from steerkit import two\n",
        "two": "class A:\n    def f(self):\n        from steerkit.deep.three import x\n        return x\n",
        "deep/__init__": '"""Empty."""\n',
        "deep/three": "from .four import x\n",
        "deep/four": 'from steerkit import files\n\n\ndef x():\n    """Do nothing."""\n    files.resolve("x")  # a comment\n',
    }
    for name, text in sources.items():
        (root / f"steerkit/{name}.py").write_text(text)
    code = lambda text: text + "\nMORE = 1\n"  # noqa: E731
    assert stale(root, "steerkit/**/*.py", reworded) == set()
    assert stale(root, "steerkit/book/cards.py", reworded) == set()
    for path in ("one", "two", "deep/__init__", "deep/three", "deep/four"):
        assert stale(root, f"steerkit/{path}.py", code) == {"01_chain", "04_odd"}, path
    for path in ("vectors", "methods/sae_ts/approximator", "methods/__init__"):
        assert stale(root, f"steerkit/{path}.py", code) == {"02_front", "04_odd"}, path
    assert stale(root, "steerkit/book/cards.py", code) == {"03_magic", "04_odd"}
    assert stale(root, "steerkit/book/run.py", code) == {"04_odd"}, "what runs notebooks is no part of them"
    assert stale(root, "steerkit/files.py", code) == set(bodies)
    assert stale(root, "steerkit/deep/four.py", lambda s: s.replace("None", "1").replace('"x"', '"y"')) == {"01_chain", "04_odd"}
    assert stale(root, "steerkit/deep/four.py", lambda s: s + "def (") == {"01_chain", "04_odd"}, "a module that is no Python yet"
    write_atomic(root / "runs/laptop/01_chain/status.json", json.dumps({"parts": job(root, "01_chain").parts}))
    (root / "steerkit/two.py").write_text(code(sources["two"]))
    assert job(root, "01_chain").state == "the modules it imports changed"


EVERYTHING = "steerkit.book.run"  # in no closure but that of a cell that cannot be understood


@pytest.mark.parametrize(
    "cell, there, not_there",
    [
        ("import steerkit.methods.fgaa", "steerkit.methods", EVERYTHING),
        ("from steerkit import caa", "steerkit.vectors", "steerkit.scores.bcs"),
        ("import steerkit\nsteerkit.stats.bootstrap", "steerkit.stats", "steerkit.vectors"),
        ("import steerkit as sk\n[getattr(sk, name) for name in ('caa', 'stats')]", "steerkit.methods.corrsteer.lora", EVERYTHING),
        ("import steerkit as sk\nts = sk.sae_ts\nts.approximator", "steerkit.methods.sae_ts.approximator", "steerkit.methods.corrsteer"),
        ("import steerkit as sk\nsk.sae_ts.approximator.aim", "steerkit.methods.sae_ts.approximator", "steerkit.methods.sae_ts.effects"),
        ("from steerkit import *", "steerkit.scores.axbench", EVERYTHING),
        ("import importlib\nimportlib.import_module('steerkit.stats')", "steerkit.stats", "steerkit.vectors"),
        ("%%time\nfrom steerkit import stats", "steerkit.stats", "steerkit.vectors"),
        ("from recipes import own_text", "recipes", EVERYTHING),
        ("!python -m steerkit.models.fetch", EVERYTHING, "numpy"),
        ("!ls\nx = (1 +", EVERYTHING, "numpy"),
        ("import numpy\ntext = 'steerkit.stats is a module'", None, "steerkit.stats"),
    ],
)
def test_what_a_cell_can_run(cell, there, not_there):
    found = closure(PROJECT, notebook("01_a", cell.replace("{", "{{").replace("}", "}}")))
    assert (there in found if there else not found) and not_there not in found


@pytest.mark.parametrize("name", ["05_fgaa", "07_corrsteer"])
def test_what_a_notebook_loads_lies_within_what_it_can_run(name):
    nb = nbformat.read(PROJECT / f"notebooks/{name}.ipynb", 4)
    lines = [line for c in nb.cells if c.cell_type == "code" for line in c.source.splitlines() if line.startswith(("import ", "from "))]
    code = "\n".join([*lines, "import sys", "print(*(m for m in sys.modules if m.split('.')[0] in ('steerkit', 'recipes')))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    loaded, can = set(done.stdout.split()), set(closure(PROJECT, nb))
    assert len(loaded) > 20 and loaded <= can, (loaded - can, done.stderr)
    assert "steerkit.models.fetch" in can and EVERYTHING not in can


@pytest.mark.parametrize(
    "scales, words",
    [
        ({"odd": {"09_z": {}}}, "no notebooks/09_z.ipynb"),
        ({"odd": {"02_b": {}}}, "02_b needs `01_a`"),
        ({}, "unknown scale `odd`: there are laptop"),
    ],
)
def test_a_wrong_scale_file_is_an_error(project, scales, words):
    root = project({"01_a": notebook("01_a"), "02_b": notebook("02_b", needs=["01_a"])}, **scales)
    with pytest.raises(ValueError, match=words):
        run.jobs("odd", root=root)


def test_select_by_number_and_name(project):
    every = run.jobs("laptop", root=project({"01_a": notebook("01_a"), "02_b": notebook("02_b")}))
    assert [j.name for j in run.select(every)] == ["01_a", "02_b"]
    assert [run.select(every, wanted)[0].name for wanted in ("2", "02", "02_b")] == ["02_b"] * 3
    with pytest.raises(ValueError, match="there are 01_a, 02_b"):
        run.select(every, "3")


def reproduce(root, *arguments):
    """Call the project's own Makefile on a small project, with this environment and without fetching the model."""
    venv = Path(sys.prefix)
    command = [
        "make",
        "-o",
        f"{venv}/.ready",
        "-o",
        "model",
        "reproduce",
        f"VENV={venv}",
        f"PROJECT={root}",
        *arguments,
    ]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_make_reproduce_goes_on_after_a_failure_and_resumes(project):
    figure = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot(scales, scales)\n"
    figure += "ax.set(title='A line', xlabel='x', ylabel='y')\nbook.figure(fig, 'line', dict(x=scales))"
    good = [OPEN, METRIC, "book.close()"]
    root = project(
        {
            "01_a": notebook("01_a", OPEN, "scales[7]"),
            "02_b": notebook("02_b", OPEN, figure, METRIC, "book.close()"),
            "03_c": notebook("03_c", *good, needs=["01_a", "02_b"]),
        }
    )
    code, text = reproduce(root)
    assert code != 0
    assert "[01_a] FAILED in cell 3/3: scales[7]\n[01_a] IndexError: list index out of range" in text
    assert "[02_b] cell 3/5" in text and "[02_b] done" in text and "[03_c] cell" not in text
    rows = {line.split()[0]: line for line in text.splitlines() if line[:1] == "0"}
    assert "failed" in rows["01_a"] and "done" in rows["02_b"] and "waits for 01_a" in rows["03_c"]
    results = json.loads((root / "runs/laptop/results.json").read_text())
    assert results == {"02_b": {"layer": {"value": 13.0, "low": None, "high": None, "n": 2, "unit": ""}}}
    assert (root / "runs/laptop/01_a/01_a.failed.ipynb").exists()
    assert sorted(p.name for p in (root / "figures/02_b").iterdir()) == ["line.json", "line.png"]

    nbformat.write(notebook("01_a", *good), root / "notebooks/01_a.ipynb")
    code, text = reproduce(root)
    assert code == 0, text
    assert "[01_a] to run: the notebook changed" in text and "[02_b] up to date" in text
    assert "[01_a] done" in text and "[03_c] done" in text and "[02_b] cell" not in text
    assert not (root / "runs/laptop/01_a/01_a.failed.ipynb").exists()
    assert run.main(["check", "--root", str(root)]) == 0

    code, text = reproduce(root, "NOTEBOOK=02")
    assert code == 0 and "[02_b] up to date" in text and "cell" not in text and "03_c" in text


@pytest.mark.parametrize("scale", ["2026_11", "007", "1e3", "true"])
def test_a_scale_may_have_any_name(project, scale):
    root = project({"01_a": notebook("01_a", OPEN, METRIC, "book.close()")}, **{scale: {"01_a": {"layer": 3}}})
    code, text = reproduce(root, f"SCALE={scale}", "NOTEBOOK=01", "SNAKEMAKE_ARGS=--dry-run")
    assert code == 0 and "[01_a] to run: not run yet" in text and f"runs/{scale}/01_a/01_a.ipynb" in text, text


def test_a_scale_that_snakemake_reads_as_a_number_is_an_error(project):
    root = project({"01_a": notebook("01_a", OPEN)}, **{"007": {"01_a": {}}})
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PROJECT / "Snakefile"), "--cores", "1", "--config", "scale=007"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode and "expected a name, and Snakemake read the value 7: write it with its ending" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "given, words",
    [
        ("SCALE=nope", "SCALE: expected one of laptop smoke, got nope"),
        ("NOTEBOOK=3", "NOTEBOOK: expected the name or number of one of 01_a 02_b, got 3"),
    ],
)
def test_a_wrong_name_is_found_before_anything_is_set_up(project, tmp_path, given, words):
    root = project({"01_a": notebook("01_a"), "02_b": notebook("02_b")}, smoke={"01_a": {}})
    command = ["make", "reproduce", f"VENV={tmp_path}/venv", f"PROJECT={root}", given]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode and words in done.stderr and not done.stdout and not (tmp_path / "venv").exists()


def test_a_name_that_the_scale_lacks_is_found_before_the_model_is_fetched(project):
    root = project({"01_a": notebook("01_a"), "02_b": notebook("02_b")}, smoke={"01_a": {}})
    code, text = reproduce(root, "SCALE=smoke", "NOTEBOOK=2")
    assert code and "got `2`: there are 01_a" in text
    plan = subprocess.run(["make", "--dry-run", "reproduce", "VENV=none-yet"], cwd=PROJECT, capture_output=True, text=True).stdout
    steps = [plan.index(step) for step in ("scales/laptop.yaml", "-m venv none-yet", "run status", "steerkit.models.fetch")]
    assert steps == sorted(steps)

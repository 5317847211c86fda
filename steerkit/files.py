"""Where things are: the project folder, its data, the user's cache; and how a file is written whole or not at all."""

import gzip
import json
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def __getattr__(name: str) -> Path:
    """Return the data folder as `DATA`; a wheel has none, and most of steerkit is nothing without it."""
    if name != "DATA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not (ROOT / "data").is_dir():
        raise ImportError(
            f"expected the folder data beside steerkit, got none in {ROOT}: a wheel, or `pip install .`, leaves out presets, SAEs "
            "and concepts. Clone the repository, and call `make reproduce` or `pip install -e .` in it"
        )
    return ROOT / "data"


def cache_dir() -> Path:
    """Return the cache folder: $STEERKIT_CACHE, else steerkit under $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("STEERKIT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "steerkit"


def resolve(path: str | Path) -> Path:
    """Return `path`, taken from the project root when it is relative, so that a notebook's working folder does not matter."""
    path = Path(path)
    return path if path.is_absolute() else ROOT / path


def shipped(folder: str | Path, preset: str, name: str, *, needed: bool = False) -> Path | None:
    """Return the file `name` of a preset under a folder of shipped files, or None where there is none or `folder` is empty.

    Raises FileNotFoundError for a file that is `needed`.
    """
    path = resolve(folder) / preset / name
    if str(folder) and path.is_file():
        return path
    if needed:
        raise FileNotFoundError(f"expected {path}, got no such file: data/README.md says how it is made for a preset")
    return None


def check_writable(folder: str | Path) -> None:
    """Raise OSError unless files can be written into `folder`, which need not exist yet."""
    wanted = here = resolve(folder)
    while not here.exists():
        here = here.parent
    try:
        tempfile.TemporaryFile(dir=here).close()
    except OSError as error:
        raise OSError(f"expected to write into {wanted}, got {error.strerror}: {here}; free it, or choose another folder") from None


def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write `content` under a temporary name and rename it, so that a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


TEXTS = ("text", "ranks")  # columns of a table that are kept as JSON unless they hold numbers: a text may hold any character


def _texts(table, change) -> dict:
    return {name: table[name].map(change) for name in TEXTS if name in table and table[name].dtype.kind not in "iuf"}


def write_table(path: str | Path, table, *, digits: str = "%.4g") -> Path:
    """Write a data frame as gzipped csv, with `TEXTS` as JSON; equal tables give equal bytes."""
    rows = table.assign(**_texts(table, json.dumps)).to_csv(index=False, float_format=digits)
    return write_atomic(path, gzip.compress(rows.encode(), 9, mtime=0))


def read_table(path: str | Path):
    """Return a data frame that `write_table` wrote."""
    import pandas as pd

    table = pd.read_csv(path)
    return table.assign(**_texts(table, json.loads))

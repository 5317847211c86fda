"""Finished rows on disk, so that what was cut off carries on: one JSON object a line."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from steerkit.fingerprint import fingerprint
from steerkit.inputs import jsonable
from steerkit.progress import bar


class Journal:
    """Finished rows in a .jsonl file: a first line with the key of the run, then one row a line; a torn last line is dropped."""

    def __init__(self, path: str | Path | None, key: str):
        self.rows: dict[int, dict] = {}
        self.path = Path(path) if path else None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        good = 0
        for n, line in enumerate(lines):
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            if n == 0 and record.get("key") != key:
                raise ValueError(
                    f"{self.path} holds another run (key {record.get('key')}, this one is {key}): delete it or choose another `out`"
                )
            if n:
                self.rows[record["row"]] = record
            good += len(line)
        with self.path.open("ab") as file:
            file.truncate(good)
            if not good:
                file.write(json.dumps({"key": key}).encode() + b"\n")

    def has(self, batch: Iterable[int]) -> bool:
        """Tell whether all rows of a batch are done."""
        return all(r in self.rows for r in batch)

    def write(self, rows: list[dict]) -> None:
        """Append the rows of a batch in one write, so that an interruption leaves whole batches."""
        self.rows.update({row["row"]: row for row in rows})
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(b"".join(json.dumps(row, default=jsonable).encode() + b"\n" for row in rows))
                file.flush()


def score_texts(
    texts: pd.DataFrame,
    score: Callable[[pd.DataFrame], dict[str, list]],
    *,
    name: str,
    by: str = "",
    out: str | Path | None = None,
    part: int = 1024,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what `score` says of each row, its columns with those of `texts`, `part` rows at a time.

    by: a fingerprint of what scores the texts: a model, fitted numbers. out: where the texts themselves are kept; if "{key}" is
    in it, finished parts stay in a file beside them.
    """
    key = fingerprint(by, list(texts), pd.util.hash_pandas_object(texts.astype(str), index=False).to_numpy())
    path = str(out).replace("{key}", f"{name}-{key}") if out and "{key}" in str(out) else None
    journal = Journal(path, key)
    parts = [range(at, min(at + part, len(texts))) for at in range(0, len(texts), part)]
    for rows in bar([rows for rows in parts if not journal.has(rows)], name, "part", show=progress):
        found = pd.DataFrame(score(texts.iloc[list(rows)])).assign(row=list(rows))
        journal.write(found.to_dict("records"))
    found = pd.DataFrame([journal.rows[r] for r in range(len(texts))], index=texts.index)
    return texts.join(found.drop(columns="row", errors="ignore"))

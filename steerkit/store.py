"""What is kept on disk: one key for all that determines a result, and finished rows and parts, so that what was cut off carries on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steerkit.files import write_atomic
from steerkit.inputs import Whole, jsonable, whole
from steerkit.progress import bar

# Where a model was found, on what it runs and who wrote it do not change what it computes.
ELSEWHERE = {"_name_or_path", "transformers_version", "device", "metadata"}


def fingerprint(*parts) -> str:
    """Return 16 hex digits that differ when any part differs: models and SAEs by their weights and settings, the rest by value.

    Every number of a weight counts, as weighted sums over blocks of a kilobyte, which is fast. A numpy number is
    the Python number; dtypes of tensors count. Raises TypeError for what has no value of its own, a function say.

    >>> fingerprint([1, 2.0], torch.ones(2)) == fingerprint([1, 2.0], torch.ones(2)) != fingerprint([1, 2.5], torch.ones(2))
    True
    """
    known: dict[int, str] = {}

    def feed(digest, value) -> None:
        if isinstance(value, Tensor):
            _tensor(digest, value)
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
        elif value is None or isinstance(value, str | bytes | bool | int | float | np.generic):
            digest.update(repr(value.item() if isinstance(value, np.generic) else value).encode() + b";")
        elif isinstance(value, Mapping):
            feed(digest, sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, list | tuple | set | frozenset):
            digest.update(f"{type(value).__name__}{len(value)}:".encode())
            for part in sorted(value) if isinstance(value, set | frozenset) else value:
                feed(digest, part)
        elif dataclasses.is_dataclass(value):
            digest.update(type(value).__qualname__.encode())
            feed(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        elif callable(value) and not isinstance(value, nn.Module):
            raise TypeError(f"fingerprint: expected values, models and SAEs, got {value!r}: give what it was made from")
        else:
            value = getattr(value, "_orig_mod", value)  # compiled: the same weights
            if id(value) not in known:  # an SAE may come with every arm
                own = hashlib.sha256(type(value).__qualname__.encode())
                feed(own, _module(value) if isinstance(value, nn.Module) else vars(value))
                known[id(value)] = own.hexdigest()
            digest.update(known[id(value)].encode())

    digest = hashlib.sha256()
    feed(digest, parts)
    return digest.hexdigest()[:16]


def _module(module: nn.Module) -> list:
    """Return what determines a model or an SAE: its settings, parameters and buffers."""
    settings = getattr(module, "cfg", None) or getattr(module, "config", None)
    settings = settings.to_dict() if hasattr(settings, "to_dict") else {}
    settings = json.dumps({k: v for k, v in settings.items() if k not in ELSEWHERE}, sort_keys=True, default=str)
    return [settings, *module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
def _tensor(digest, value: Tensor) -> None:
    digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
    octets = value.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(octets) // 1024 * 1024
    if whole and octets.data_ptr() % 8 == 0:
        weights = torch.arange(1, 256, 2, device=value.device)  # odd: a number's place in its block counts
        for part in octets[:whole].view(torch.int64).view(-1, 128).split(1 << 13):
            digest.update((part * weights).sum(1).cpu().numpy().tobytes())
        octets = octets[whole:]
    digest.update(octets.cpu().numpy().tobytes())


@dataclasses.dataclass(frozen=True)
class Work:
    """How a long piece of work is done: rows that run together (None: the function's own number), where finished parts stay, a bar.

    out: a file or folder, as the function says; "{key}" in it becomes a hash of all that determines the result. A batch that
    does not fit in memory is halved. Raises ValueError for a batch size below 1.
    """

    batch_size: Whole | None = None
    out: str | Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", whole("batch_size", self.batch_size))
            if self.batch_size < 1:
                raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")

    def rows(self, default: int) -> int:
        """Return the batch size, or the function's own."""
        return self.batch_size or default

    def below(self, name: str) -> "Work":
        """Return the same work, kept under `name` in the folder `out`; kept nowhere, still nowhere."""
        return self if self.out is None else dataclasses.replace(self, out=Path(self.out) / name)

    def path(self, key: str, name: str | None = None) -> str | None:
        """Return `out` with the key filled in, and `name` below it where it is a folder; None where nothing is kept."""
        if self.out is None:
            return None
        path = Path(str(self.out).replace("{key}", key))
        return str(path / name if name else path)


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


class Parts:
    """Finished parts of a run in a folder, one safetensors file each, with the run's key; without a folder nothing is kept."""

    def __init__(self, folder: str | Path | None, key: str):
        self.folder, self.key = Path(folder) if folder else None, key

    def get(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors of a part, None where it is not there; ValueError for a part of another run, or a damaged one."""
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                key, found = (file.metadata() or {}).get("key"), {tensor: file.get_tensor(tensor) for tensor in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a finished part of a run, got {error}: delete it") from error
        if key != self.key:
            raise ValueError(f"{path} holds another run (key {key}, this one is {self.key}): delete it or choose another `out`")
        return found

    def put(self, name: str, tensors: Mapping[str, Tensor | np.ndarray], **metadata) -> None:
        """Write a part, whole or not at all; metadata is for who opens the file."""
        if self.folder is not None:
            about = {"key": self.key} | {label: json.dumps(value, default=jsonable) for label, value in metadata.items()}
            write_atomic(self._path(name), to_bytes({label: torch.as_tensor(t).contiguous() for label, t in tensors.items()}, about))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def score_texts(
    texts: pd.DataFrame,
    score: Callable[[pd.DataFrame], dict[str, list]],
    *,
    name: str,
    by: str = "",
    part: int = 1024,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return what `score` says of each row, its columns with those of `texts`, `part` rows at a time.

    by: a fingerprint of what scores the texts: a model, fitted numbers. work.out: where the texts themselves are kept; if "{key}"
    is in it, finished parts stay in a file beside them.
    """
    key = fingerprint(by, list(texts), pd.util.hash_pandas_object(texts.astype(str), index=False).to_numpy())
    journal = Journal(work.path(f"{name}-{key}") if "{key}" in str(work.out) else None, key)
    parts = [range(at, min(at + part, len(texts))) for at in range(0, len(texts), part)]
    for rows in bar([rows for rows in parts if not journal.has(rows)], name, "part", show=work.progress):
        found = pd.DataFrame(score(texts.iloc[list(rows)])).assign(row=list(rows))
        journal.write(found.to_dict("records"))
    found = pd.DataFrame([journal.rows[r] for r in range(len(texts))], index=texts.index)
    return texts.join(found.drop(columns="row", errors="ignore"))

"""The rows of a data set, wherever it is: on the hub, in a folder, in a file."""

import zlib
from collections.abc import Iterator
from gzip import BadGzipFile
from pathlib import Path

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def kind(source: str | Path) -> str | None:
    """Return what the name of a file, compressed or not, says it holds: json, parquet or csv; None for a folder or a hub id.

    >>> kind("pairs.jsonl.gz"), kind("nyu-mll/blimp")
    ('json', None)
    """
    return FORMATS.get(Path(str(source).removesuffix(".gz")).suffix)


def rows(source: str | Path, *, split: str | None = None, name: str | None = None, streaming: bool = True) -> Iterator[dict]:
    """Yield the rows of a data set in order: a hub id, a folder, or a .jsonl, .json, .csv (with .gz, too) or .parquet file.

    split (by default train) and name, the configuration, belong to hub ids and folders; a file has neither. streaming reads as it
    goes; without it a hub data set is fetched whole, and is there the next time. A key that only some rows have is None in the others.

    Raises FileNotFoundError for what is not there, ValueError for content that is not what the name says, another ending, or a
    split or configuration that the data set lacks.

    >>> next(rows("data/own_text.jsonl.gz")).keys()    # doctest: +SKIP
    dict_keys(['text'])
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    form, is_file = kind(source), Path(source).is_file()
    if is_file != (form is not None):
        wanted = f"a file that ends in {', '.join(FORMATS)} (.gz or not), a folder, or a hub data set id"
        got = "another ending: rename it" if is_file else "no such file: check the path"
        raise (ValueError if is_file else FileNotFoundError)(f"{source}: expected {wanted}, got {got}")
    try:
        if form:
            yield from load_dataset(form, data_files=str(source), split="train", streaming=True)
        else:
            yield from load_dataset(str(source), name, split=split or "train", streaming=streaming)
    except StopIteration:  # an empty file
        return
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: expected a hub data set id or a folder with data, got {error}: check the name") from error
    except (ValueError, EOFError, BadGzipFile, zlib.error, DatasetsError) as error:
        wanted = {"json": "one JSON record a line", None: f"a data set with the split {split or 'train'}" + (f" of {name}" if name else "")}
        raise ValueError(f"{source}: expected {wanted.get(form, form)}, got {error}: check the file, or fetch it again") from error

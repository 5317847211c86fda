"""One reader for every data set, against the standard library and pandas; what cannot be read is said by name."""

import gzip
import json

import pandas as pd
import pytest

from steerkit.data import kind, rows

ROWS = [{"text": f"line {n}", "number": n, "parts": {"a": ["x", "y"], "b": n / 2}} for n in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.json.gz"])
def test_json_files_give_what_the_standard_library_reads(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES.encode()) if path.suffix == ".gz" else LINES.encode())
    assert list(rows(path)) == list(rows(str(path))) == ROWS


def test_a_list_in_a_json_file_and_keys_that_only_some_rows_have(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    assert list(rows(tmp_path / "list.json")) == ROWS
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    first, second = rows(tmp_path / "some.jsonl")
    assert first == {"text": "a", "messages": None} and second == {"text": None, "messages": [{"role": "user", "content": "b"}]}


def test_tables_give_what_pandas_reads(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "r.parquet")
    assert list(rows(tmp_path / "r.parquet")) == ROWS
    flat = pd.DataFrame(ROWS)[["text", "number"]]
    flat.to_csv(tmp_path / "r.csv", index=False)
    flat.to_csv(tmp_path / "r.csv.gz", index=False)
    assert list(rows(tmp_path / "r.csv")) == list(rows(tmp_path / "r.csv.gz")) == flat.to_dict("records")


def test_a_folder_has_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"split": split}) + "\n")
    assert list(rows(tmp_path)) == [{"split": "train"}] and list(rows(tmp_path, split="test")) == [{"split": "test"}]
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: expected a data set with the split dev, got .*dev"):
        list(rows(tmp_path, split="dev"))


def test_reading_is_lazy_and_an_empty_file_has_no_rows(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(LINES)
    assert next(rows(path)) == ROWS[0]
    path.write_text("")
    assert list(rows(path)) == []


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("none.jsonl", None, FileNotFoundError, r"a file that ends in \.jsonl.* or a hub data set id, got no such file: check the path"),
        ("r.txt", b"x", ValueError, "got another ending: rename it"),
        ("r.jsonl", b'{"a": 1}\n{"b": ', ValueError, r"r\.jsonl: expected one JSON record a line, got"),
        ("r.jsonl.gz", b"no gzip", ValueError, r"r\.jsonl\.gz: expected one JSON record a line, got"),
        ("r.jsonl.gz", gzip.compress(LINES.encode())[:-20], ValueError, "fetch it again"),
        ("r.parquet", b"no parquet", ValueError, r"r\.parquet: expected parquet, got"),
    ],
)
def test_what_cannot_be_read_is_said(name, content, error, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=said):
        list(rows(path))


def test_kinds():
    assert [kind(name) for name in ("a.jsonl.gz", "a/b.parquet", "c.csv", "cais/mmlu", "data")] == ["json", "parquet", "csv", None, None]

"""Files: written whole or not at all, equal tables give equal bytes, shipped results belong to a preset, journals carry on."""

import gzip
import json
import os

import numpy as np
import pandas as pd
import pytest

from steerkit.files import read_table, shipped, write_atomic, write_table
from steerkit.store import Journal, Work, score_texts


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "deep" / "file.txt", "first")
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "second")
    monkeypatch.setattr(os, "replace", real)
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_equal_tables_give_equal_bytes(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": [0.123456789, 1e-7]})
    one, two = (write_table(tmp_path / name, table).read_bytes() for name in ("one.csv.gz", "two.csv.gz"))
    assert one == two and gzip.decompress(one).decode() == "a,b\n1,0.1235\n2,1e-07\n"


def test_texts_come_back_from_a_table_whatever_they_hold(tmp_path):
    texts = ["", "NA", '12', 'a "b", c', "two\nlines\r\n", "\u2028 \x00 end", "007"]
    ranks = [[], [0], [3, 3], [19], [], [1], [2]]
    table = pd.DataFrame({"feature": range(7), "share": [0.5] * 6 + [np.nan], "text": texts, "ranks": ranks})
    pd.testing.assert_frame_equal(read_table(write_table(tmp_path / "t.csv.gz", table)), table)
    numbers = table[["feature"]].assign(text=table.feature)  # a column of numbers stays one
    pd.testing.assert_frame_equal(read_table(write_table(tmp_path / "n.csv.gz", numbers)), numbers)


def test_shipped_files_belong_to_a_preset(tmp_path):
    path = write_atomic(tmp_path / "a" / "05" / "x.csv", "1")
    assert shipped(tmp_path, "a", "05/x.csv") == path
    assert shipped(tmp_path, "b", "05/x.csv") is None and shipped(tmp_path, "a", "05/y.csv") is None
    assert shipped("", "data", "README.md") is None, "an empty folder means none, though the project has such a file"
    with pytest.raises(FileNotFoundError, match=r"expected .*b/05/x.csv, got no such file: data/README.md"):
        shipped(tmp_path, "b", "05/x.csv", needed=True)


def test_scores_of_texts_resume_and_keep_their_rows(tmp_path):
    texts = pd.DataFrame({"prompt": list("aabbc"), "text": list("vwxyz"), "tokens": [[1], [2, 3], [], [4], [5]]}, index=[9, 3, 5, 1, 7])
    calls = []

    def score(part):
        calls.append(part.text.tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"n": [len(t) for t in part.tokens]}

    kept = Work(out=tmp_path / "texts-{key}.jsonl", progress=False)
    with pytest.raises(KeyboardInterrupt):
        score_texts(texts, score, name="judged", part=2, work=kept)
    found = score_texts(texts, score, name="judged", part=2, work=kept)
    assert calls == [["v", "w"], ["x", "y"], ["z"], ["z"]], "only the last part is scored again"
    assert found.n.tolist() == [1, 2, 0, 1, 1] and found.index.equals(texts.index) and found.text.equals(texts.text)
    assert len(list(tmp_path.iterdir())) == 1
    score_texts(texts[:2], score, name="judged", part=2, work=kept)  # other texts, another file
    assert len(list(tmp_path.iterdir())) == 2
    turned = score_texts(texts[::-1], score, name="judged", part=2, work=kept)  # rows are kept by number: their order counts
    assert turned.n.tolist() == [1, 1, 0, 2, 1] and len(list(tmp_path.iterdir())) == 3


def test_a_journal_drops_a_torn_line_and_refuses_another_run(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", "key")
    journal.write([{"row": 0, "v": 1}, {"row": 1, "v": 2}])
    with journal.path.open("ab") as file:
        file.write(b'{"row": 2, "v"')
    again = Journal(journal.path, "key")
    assert again.has([0, 1]) and not again.has([2])
    assert [json.loads(line) for line in journal.path.read_text().splitlines()][1:] == [{"row": 0, "v": 1}, {"row": 1, "v": 2}]
    with pytest.raises(ValueError, match="holds another run"):
        Journal(journal.path, "other")


def test_scores_of_one_judge_are_not_those_of_another(tmp_path):
    texts, kept = pd.DataFrame({"text": ["a", "b"]}), Work(out=tmp_path / "texts-{key}.jsonl", progress=False)
    score = lambda value: lambda part: {"n": [np.float32(value)] * len(part)}  # noqa: E731
    for value, by in ((1.0, "one model"), (2.0, "another"), (3.0, "one model")):
        found = score_texts(texts, score(value), name="judged", by=by, work=kept)
        assert found.n.tolist() == [2.0 if by == "another" else 1.0] * 2
    assert len(list(tmp_path.iterdir())) == 2

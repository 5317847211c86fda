"""One key for what is kept: equal things have equal keys, and any difference shows; and how work is cut and kept."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from steerkit.engine.decode import Sampling
from steerkit.engine.steer import Add
from steerkit.methods.corrsteer.pooling import Raw
from steerkit.store import Work, fingerprint


def test_equal_things_have_equal_keys():
    model, vector = tiny.model("llama"), torch.arange(8.0)
    assert fingerprint(model) == fingerprint(tiny.model("llama")) == fingerprint(copy.deepcopy(model))
    assert fingerprint(model) == fingerprint(torch.compile(model, backend="eager"))
    assert fingerprint(tiny.planted_sae()) == fingerprint(tiny.planted_sae())
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) == fingerprint({"a": np.int64(1), "b": np.int32(2)})
    assert fingerprint(torch.stack([vector, vector], 1)[:, 0]) == fingerprint(vector)  # a view, and the same numbers
    assert fingerprint(Sampling(stop=(3, 1))) == fingerprint(Sampling(stop=np.array([1, 3]))) == fingerprint(Sampling(stop=[1, 3, 1]))
    model.config._name_or_path = "moved/elsewhere"
    assert fingerprint(model) == fingerprint(tiny.model("llama"))


@pytest.mark.parametrize("size", [5, 256, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_single_number_counts(size, dtype):
    plain = torch.zeros(size, dtype=dtype)
    for place in {0, size // 2, size - 1}:
        other = plain.clone()
        other[place] = 1
        assert fingerprint(other) != fingerprint(plain)
    assert fingerprint(plain.view(1, -1)) != fingerprint(plain)


def test_order_type_and_place_count():
    rows = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    pairs = [
        (rows, rows.flip(0)),
        (rows, rows[torch.cat([torch.tensor([1, 0]), torch.arange(2, 600)])].clone() * 1.0 + 0.0),
        (rows, rows.double()),
        (["ab", "c"], ["a", "bc"]),
        ([1], 1),
        (1, True),
        ("1", 1),
        ([[1], [2]], [[1, 2]]),
        (Add(1, rows[0], 2.0), Add(2, rows[0], 2.0)),
        (Add(1, rows[0], 2.0), Add(1, rows[0], 2.5)),
        (Raw(4), Raw(5)),
        (tiny.model("llama"), tiny.model("llama").bfloat16()),
    ]
    for n, (a, b) in enumerate(pairs):
        assert fingerprint(a) != fingerprint(b), n


def test_what_has_no_value_is_refused():
    with pytest.raises(TypeError, match="give what it was made from"):
        fingerprint(lambda: 1)


def test_work_has_the_functions_own_number_of_rows_unless_it_names_one():
    assert (Work().rows(64), Work(7).rows(64), Work(np.int64(7)).rows(64)) == (64, 7, 7)
    for wrong, got in ((0, "at least 1, got 0"), (-3, "at least 1, got -3"), (np.int64(0), "at least 1, got 0")):
        with pytest.raises(ValueError, match=f"batch_size: expected {got}"):
            Work(wrong)


@pytest.mark.parametrize(
    "out,name,expected",
    [
        (None, None, None),
        (None, "part", None),
        ("runs/t.jsonl", None, "runs/t.jsonl"),
        ("runs/t-{key}.jsonl", None, "runs/t-abc.jsonl"),
        (Path("runs/{key}"), "layer-3.jsonl", "runs/abc/layer-3.jsonl"),
        ("runs", "layer-3.jsonl", "runs/layer-3.jsonl"),
    ],
)
def test_work_puts_the_key_into_the_name(out, name, expected):
    found = Work(out=out).path("abc", name)
    assert found == (expected and str(Path(expected)))

"""One key for what is kept: equal things have equal keys, and any difference shows."""

import copy

import numpy as np
import pytest
import tiny
import torch

from steerkit.engine.decode import Sampling
from steerkit.engine.steer import Add
from steerkit.methods.corrsteer.pooling import Raw
from steerkit.store import fingerprint


def test_equal_things_have_equal_keys():
    model, vector = tiny.model("llama"), torch.arange(8.0)
    assert fingerprint(model) == fingerprint(tiny.model("llama")) == fingerprint(copy.deepcopy(model))
    assert fingerprint(model) == fingerprint(torch.compile(model, backend="eager"))
    assert fingerprint(tiny.planted_sae()) == fingerprint(tiny.planted_sae())
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) == fingerprint({"a": np.int64(1), "b": np.int32(2)})
    assert fingerprint(torch.stack([vector, vector], 1)[:, 0]) == fingerprint(vector)  # a view, and the same numbers
    assert fingerprint(Sampling(stop=(3, 1))) == fingerprint(Sampling(stop=(1, 3)))
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

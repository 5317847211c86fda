"""Steering vectors: algebra, files, and the recipes against short oracles."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.features import residuals
from steerkit.vectors import SteeringVector, caa, random_direction, sae_row

D = tiny.D_MODEL


def vector(values, name="v", layer=1, preset="tiny") -> SteeringVector:
    return SteeringVector(name, torch.tensor(values), layer, preset, {"method": "by hand"})


def test_sums_keep_proportions_and_negation_flips():
    a, b = vector([1.0, 0.0], "a"), vector([0.0, 1.0], "b")
    both = 3 * a + 4.0 * b
    torch.testing.assert_close(both.direction, torch.tensor([0.6, 0.8]))
    assert both.weight == pytest.approx(5.0) and (3 * a - 4 * b).direction[1] < 0
    torch.testing.assert_close(both.edit(2.0).delta(torch.zeros(1, 1, 2))[0, 0], torch.tensor([6.0, 8.0]))
    assert (-a).cosine(a) == pytest.approx(-1.0) and a.cosine(b) == 0.0
    assert (-2 * a).direction.tolist() == [-1.0, 0.0]


def test_save_and_load_give_the_same_bits(tmp_path):
    v = vector(torch.randn(D).tolist())
    again = SteeringVector.load(v.save(tmp_path / "v.safetensors"))
    assert torch.equal(v.direction, again.direction)
    assert (v.name, v.layer, v.hook, v.preset, v.made, v.weight) == (
        again.name,
        again.layer,
        again.hook,
        again.preset,
        again.made,
        again.weight,
    )


def test_a_torn_file_or_another_file_is_a_clear_error(tmp_path):
    path = vector([1.0, 2.0]).save(tmp_path / "v.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="make it again"):
        SteeringVector.load(path)


@pytest.mark.parametrize("values,message", [([float("nan"), 1.0], "NaN"), ([float("inf"), 1.0], "infinite"), ([0.0, 0.0], "zero vector")])
def test_bad_directions_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        vector(values)


def test_vectors_of_two_places_do_not_mix():
    with pytest.raises(ValueError, match="one place"):
        vector([1.0, 0.0]) + vector([1.0, 0.0], layer=2)


def test_sae_row_is_the_weighted_sum_of_decoder_rows():
    at = tiny.lab().at()
    v, sae = sae_row(at, {3: 1.0, 5: 2.0}), at.sae
    oracle = sae.W_dec[3].double() + 2 * sae.W_dec[5].double()
    torch.testing.assert_close(v.direction.double(), (oracle / oracle.norm()).detach(), rtol=1e-6, atol=1e-7)
    assert (v.layer, v.preset, v.name) == (1, "tiny", "SAE row")
    with pytest.raises(ValueError, match="expected 0 to"):
        sae_row(at, -1)


def contrast_by_loop(lab, positive, negative, *, first=1, outlier=float("inf")):
    """Mean over each prompt's tokens from `first` on, long ones left out, mean over prompts, difference, norm."""

    def mean(prompts):
        ids = [torch.tensor([[1] + lab.tokenizer(p, add_special_tokens=False)["input_ids"]]) for p in prompts]
        streams = [residuals(lab.hf, row, layers=[1])[1][0, first:].double() for row in ids]
        limit = outlier * torch.cat(streams).norm(dim=1).median()
        return torch.stack([h[h.norm(dim=1) <= limit].mean(0) for h in streams]).mean(0)

    found = mean(positive) - mean(negative)
    return found / found.norm()


@pytest.mark.parametrize("include_first", [True, False])
def test_caa_equals_a_loop_over_prompts(include_first):
    """Two different positives catch an early return."""
    at, positive, negative = tiny.lab().at(), ["abc", "hello there"], ["xyz", "q", "more words"]
    oracle = contrast_by_loop(at.lab, positive, negative, first=0 if include_first else 1)
    got = caa(at, (positive, negative), include_first=include_first)
    torch.testing.assert_close(got.direction.double(), oracle, rtol=1e-4, atol=1e-5)
    swapped = caa(at, (negative, positive), include_first=include_first)
    assert got.cosine(swapped) == pytest.approx(-1.0, abs=1e-5)
    shuffled = caa(at, (positive[::-1], negative[::-1]), include_first=include_first)
    assert got.cosine(shuffled) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="at least one positive and one negative prompt, got 2 and 0"):
        caa(at, (positive, []))


def test_caa_leaves_out_what_the_preset_calls_an_outlier():
    lab, usual = tiny.lab(outlier=1.05), tiny.lab().at()
    positive, negative = ["abcdefgh ijkl", "words"], ["xyz more words"]
    strict = caa(lab.at(), (positive, negative))
    torch.testing.assert_close(strict.direction.double(), contrast_by_loop(lab, positive, negative, outlier=1.05), rtol=1e-4, atol=1e-5)
    assert strict.cosine(caa(usual, (positive, negative))) < 0.999


def test_random_directions_are_unit_and_differ_by_seed():
    a, b = (random_direction(tiny.lab().at(0), seed=s) for s in (0, 1))
    assert float(a.direction.norm()) == pytest.approx(1.0) and abs(a.cosine(b)) < 0.5
    assert (a.layer, a.preset, len(a.direction)) == (0, "tiny", D)


def test_a_vector_owns_its_numbers_and_takes_a_strided_column(tmp_path):
    basis = torch.linalg.svd(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).U
    row, column = (SteeringVector("v", part, 1, "tiny") for part in (basis[3], basis[:, 3]))
    kept = row.direction.clone(), column.direction.clone()
    again = SteeringVector.load(column.save(tmp_path / "v.safetensors"))
    basis.zero_()
    assert torch.equal(row.direction, kept[0]) and torch.equal(column.direction, kept[1]) and torch.equal(again.direction, kept[1])
    assert float(row.direction.norm()) == pytest.approx(1.0) and row.direction.is_contiguous() and column.direction.is_contiguous()


def test_numbers_of_numpy_and_pandas_work_and_can_be_saved(tmp_path):
    lab, half = tiny.lab(), np.float32(0.5)
    at, weights = lab.at(np.int64(1)), {5: 0.5, 7: 2.0}
    expected = sae_row(lab.at(1), weights)
    for odd in ({np.int64(5): half, np.int32(7): np.float64(2)}, pd.Series(weights)):
        torch.testing.assert_close(sae_row(at, odd).direction, expected.direction)
    both = sae_row(at, {5: 1.0, 7: 1.0}).direction
    for odd in ([5, 7], np.array([5, 7]), pd.Series([5, 7]).to_numpy(), torch.tensor([5, 7])):
        torch.testing.assert_close(sae_row(at, odd).direction, both)
    for odd in (np.int64(5), np.array(5), torch.tensor(5)):
        assert torch.equal(sae_row(at, odd).direction, sae_row(at, 5).direction)
    values = np.arange(1.0, D + 1)
    made = SteeringVector("by numpy", values, np.int64(2), "t", {"seed": np.int64(3), "means": np.ones(2), "share": half})
    torch.testing.assert_close(made.direction, torch.tensor(values / np.linalg.norm(values)).float())
    for v in (made * half, half * made, np.float64(0.5) * made, made * torch.tensor(0.5), random_direction(at, seed=np.int64(3))):
        assert isinstance(v, SteeringVector) and v.weight in (0.5, 1.0)
        again = SteeringVector.load(v.save(tmp_path / "v.safetensors"))
        assert torch.equal(again.direction, v.direction) and again.weight == v.weight and again.layer == v.layer
    assert made.edit(half).scale == 0.5 and SteeringVector.load(made.save(tmp_path / "m.safetensors")).made["means"] == [1.0, 1.0]


def test_contrast_prompts_may_be_a_column_of_a_table():
    at, table = tiny.lab().at(), pd.DataFrame({"a": ["abc", "hello"], "b": ["xyz", "q"]}, index=[7, 3])
    assert torch.equal(caa(at, (table.a, table.b)).direction, caa(at, (["abc", "hello"], ["xyz", "q"])).direction)
    with pytest.raises(ValueError, match="put it in a list"):
        caa(at, ("abc", ["xyz"]))

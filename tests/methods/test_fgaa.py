"""FGAA's filters and target against the arithmetic of the paper."""

import pytest
import tiny
import torch

from steerkit.features import feature_means, residuals
from steerkit.methods import fgaa
from steerkit.methods.sae_ts.approximator import Approximator, aim

NONE = torch.zeros(6)
DIFF = torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, 0.5])


def test_top_k_keeps_values_and_signs():
    got = fgaa.target(DIFF, density=NONE, n1=2, n2=1)
    assert got.tolist() == pytest.approx([5 / 12, -4 / 12, 3 / 12, 0, 0, 0])
    swapped = fgaa.target(-DIFF, density=NONE, n1=1, n2=2)
    assert torch.equal(swapped, -got)


def test_everything_kept_is_the_difference_itself():
    got = fgaa.target(DIFF, density=NONE, n1=6, n2=6)
    torch.testing.assert_close(got, DIFF / DIFF.abs().sum())


def test_filters_come_before_top_k():
    density = torch.tensor([0.02, 0, 0, 0, 0, 0])
    start = torch.tensor([False, False, True, False, False, False])
    got = fgaa.target(DIFF, density=density, at_start=start, n1=2)
    assert got.nonzero()[:, 0].tolist() == [4, 5]  # 0 is dense, 2 is a first-token feature; two positives still stand
    assert fgaa.target(DIFF, density=density, max_density=0.02, n1=1).nonzero()[:, 0].tolist() == [0]  # at the bound: kept
    assert fgaa.target(DIFF, density=NONE, n1=6).nonzero()[:, 0].tolist() == [0, 2, 4, 5]  # fewer positives, no negatives


def test_a_missing_density_fails_loudly():
    with pytest.raises(ValueError, match="density"):
        fgaa.target(DIFF, density=None)
    with pytest.raises(ValueError, match="after the filters"):
        fgaa.target(DIFF, density=torch.ones(6))
    with pytest.raises(ValueError, match="n1, n2"):
        fgaa.target(DIFF, density=NONE, n1=0)


def test_the_l1_norm_changes_nothing_and_one_feature_is_sae_ts():
    M, at = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), tiny.lab(saes={}).at(1)
    found = Approximator(M, torch.randn(6, generator=torch.Generator().manual_seed(1)))
    three = fgaa.target(DIFF, density=NONE, n1=3)
    a, b, c = (aim(found, at, t).direction for t in (three, 1000 * three, three / three.norm()))
    assert (a - b).abs().max() < 1e-6 and (a - c).abs().max() < 1e-6
    only = aim(found, at, fgaa.target(DIFF, density=NONE, n1=1))
    assert only.cosine(aim(found, at, 0)) == pytest.approx(1, abs=1e-6)


def test_first_token_features_are_a_length_artefact():
    """A feature of the first token alone differs by a (mean 1/T of positives - mean 1/T of negatives)."""
    at = tiny.lab().at(1)
    means, without = (feature_means(at, ["ab", "cdefg"], include_first=first) for first in (True, False))
    # with the first token: (a + sum of the rest) / T; without it: sum of the rest / (T - 1)
    first = means * torch.tensor([[3.0], [6.0]]) - without * torch.tensor([[2.0], [5.0]])
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)  # the same token, whatever follows


def test_start_features_are_found_on_a_planted_model():
    at, texts = tiny.lab().at(1), ["some text", "another one that is longer", "x"]
    got = fgaa.peaks_at_start(at, texts)
    first, rest = [], []
    for text in texts:
        ids = torch.tensor([[at.tokenizer.bos_token_id, *at.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        x = residuals(at.model, ids, layers=[1])[1][0]
        acts = torch.relu(torch.cat([x, -x], 1))
        first.append(acts[0])
        rest.append(acts[1:])
    oracle = (torch.stack(first).amax(0) >= torch.cat(rest).amax(0)) & (torch.stack(first).amax(0) > 0)
    assert torch.equal(got, oracle) and oracle.any() and not oracle.all()

"""FGAA's filters and target against the arithmetic of the paper."""

import pytest
import tiny
import torch

from steerkit.features import feature_means
from steerkit.methods import fgaa
from steerkit.methods.sae_ts.approximator import Approximator, aim
from steerkit.methods.sae_ts.approximator import target as one_feature

PLACE = {"layer": 1, "preset": "none"}
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
    M = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    found = Approximator(M, torch.randn(6, generator=torch.Generator().manual_seed(1)))
    three = fgaa.target(DIFF, density=NONE, n1=3)
    a, b, c = (aim(found, t, **PLACE).direction for t in (three, 1000 * three, three / three.norm()))
    assert (a - b).abs().max() < 1e-6 and (a - c).abs().max() < 1e-6
    only = aim(found, fgaa.target(DIFF, density=NONE, n1=1), **PLACE)
    assert only.cosine(aim(found, one_feature(0, 6), **PLACE)) == pytest.approx(1, abs=1e-6)


def test_first_token_features_are_a_length_artefact():
    """A feature of the first token alone differs by a (mean 1/T of positives - mean 1/T of negatives)."""
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    means = feature_means(model, tok, sae, ["ab", "cdefg"], layer=1, include_first=True)
    without = feature_means(model, tok, sae, ["ab", "cdefg"], layer=1)
    # with the first token: (a + sum of the rest) / T; without it: sum of the rest / (T - 1)
    first = means * torch.tensor([[3.0], [6.0]]) - without * torch.tensor([[2.0], [5.0]])
    torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-4)  # the same token, whatever follows


def test_start_features_are_found_on_a_planted_model():
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    texts = ["some text", "another one that is longer", "x"]
    got = fgaa.peaks_at_start(model, tok, sae, texts, layer=1)
    first, rest = [], []
    from steerkit.features import residuals

    for text in texts:
        ids = torch.tensor([[tok.bos_token_id, *tok(text, add_special_tokens=False)["input_ids"]]])
        x = residuals(model, ids, layers=[1])[1][0]
        acts = torch.relu(torch.cat([x, -x], 1))
        first.append(acts[0])
        rest.append(acts[1:])
    oracle = (torch.stack(first).amax(0) >= torch.cat(rest).amax(0)) & (torch.stack(first).amax(0) > 0)
    assert torch.equal(got, oracle) and oracle.any() and not oracle.all()

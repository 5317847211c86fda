"""FGAA: build the target for an approximator from contrast prompts, in feature space (arXiv 2501.09929).

Step 1, the contrast, is the difference of `features.feature_means` of positive and negative prompts.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerkit.engine.lab import Place
from steerkit.features import read, token_batches


@torch.inference_mode()
def peaks_at_start(at: Place, texts: Sequence[str]) -> Bool[Tensor, " d_sae"]:
    """Mark features whose strongest activation over all texts is on the first token (FGAA section 3.2, the BOS filter)."""
    first, rest = [], []
    for ids, mask in token_batches(at.tokenizer, texts):
        resid, real = read(at, ids, mask, include_first=True)
        acts = at.sae.encode(resid.to(at.sae.dtype)) * real[..., None]
        first.append(acts[:, 0].amax(0).cpu())
        rest.append(acts[:, 1:].amax((0, 1)).cpu())
    first, rest = torch.stack(first).amax(0), torch.stack(rest).amax(0)
    return (first > 0) & (first >= rest)


def target(
    difference: Float[Tensor, " d_sae"],
    *,
    density: Float[Tensor, " d_sae"] | None,
    max_density: float = 0.01,
    at_start: Bool[Tensor, " d_sae"] | None = None,
    n1: int = 8,
    n2: int = 0,
) -> Float[Tensor, " d_sae"]:
    """Return v_target: v_diff without dense and first-token features, its n1 largest and n2 most negative kept, L1 norm 1.

    In the paper's order: density (share of tokens on which a feature is active, above max_density out), first token, top k
    with signs; fewer than n1 positives are kept as they are. The L1 norm changes nothing, as eq. 5 normalises (the paper
    says otherwise).

    Raises ValueError without densities (an absent filter must not pass for one that ran), and where nothing is left.

    >>> target(torch.tensor([3.0, 2.0, -1.0]), density=torch.tensor([0.5, 0.001, 0.001]), n1=1, n2=1).tolist()
    [0.0, 0.6666666865348816, -0.3333333432674408]
    """
    if density is None:
        raise ValueError("density: expected one number a feature, got none; give torch.zeros(d_sae) to leave the filter out on purpose")
    if density.shape != difference.shape:
        raise ValueError(f"density: expected {list(difference.shape)}, got {list(density.shape)}")
    if n1 < 0 or n2 < 0 or n1 + n2 == 0:
        raise ValueError(f"n1, n2: expected numbers from 0 up and not both 0, got {n1} and {n2}")
    left = difference.float().clone()
    left[density > max_density] = 0
    if at_start is not None:
        left[at_start] = 0
    kept = torch.zeros_like(left)
    for sign, n in ((1, n1), (-1, n2)):
        value, index = (sign * left).clamp_min(0).topk(min(n, len(left)))
        index = index[value > 0]
        kept[index] = left[index]
    if not kept.any():
        raise ValueError(f"expected at least one feature after the filters, got none: raise max_density ({max_density}) or n1 ({n1})")
    return kept / kept.abs().sum()

"""Which SAE features move the output? Output scores of thousands of features from one forward pass of a prompt.

Arad, Mueller, Belinkov (arXiv 2505.20063), sections 2.2 and 3.2. All features of a layer share the prompt, its keys and
values, and the residual stream that they are added to; so only the blocks above the layer run, on a batch of features.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.engine.lab import Place
from steerkit.engine.packed import packed_linears
from steerkit.engine.partial import starting_from
from steerkit.engine.tokens import prompt_ids
from steerkit.features import lens_logits, residuals
from steerkit.files import resolve, shipped
from steerkit.inputs import Number, number, tensor

PROMPT = "From my experience,"  # as released, and behind the published numbers; the text of the paper says "In my experience,"
LENS = 20  # lens tokens of a feature, and tokens of the token confidence


@dataclass(frozen=True)
class OutputScores:
    """Scores of n features of one layer. p, rank: the likeliest lens token's probability and rank (0 is the top) when steered.

    unsteered: P(M) without steering, one number a feature. confidence: |change of token confidence|, the rival selector.
    a_max: the strongest activation at the last prompt token; the push is factor x a_max x W_dec[i].
    """

    features: Int[Tensor, " n"]
    score: Float[Tensor, " n"]
    p: Float[Tensor, " n"]
    rank: Int[Tensor, " n"]
    unsteered: Float[Tensor, " n"]
    confidence: Float[Tensor, " n"]
    a_max: float


@torch.inference_mode()
def lens_tokens(model: nn.Module, directions: Float[Tensor, "n d_model"], *, k: int = LENS, chunk: int = 512) -> Int[Tensor, "n k"]:
    """Return the k tokens that each direction raises most, lm_head(final_norm(W_dec[i])), best first (eqs. 3-4).

    The model's final norm is applied, no soft cap, and raw logits are ranked: probabilities underflow to ties.

    >>> lens_tokens(model, sae.W_dec[:8]).shape      # doctest: +SKIP
    torch.Size([8, 20])
    """
    return torch.cat([logits.topk(k).indices.cpu() for logits in lens_logits(model, directions, chunk=chunk)])


@torch.inference_mode()
def lens_rank(
    model: nn.Module, directions: Float[Tensor, "n d_model"], tokens: Int[Tensor, " n"], *, chunk: int = 512
) -> Int[Tensor, " n"]:
    """Return the rank of one token in the lens of each direction, 0 for the token that it raises most."""
    parts = zip(lens_logits(model, directions, chunk=chunk), tokens.split(chunk))
    return torch.cat([(logits > logits.gather(1, mine[:, None].to(logits.device))).sum(1).cpu() for logits, mine in parts])


def rank_weighted(
    logits: Float[Tensor, "n vocab"], lens: Int[Tensor, "n k"], *, norm: Float[Tensor, " n"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return P(M) = (1 - r*/V) p*, p* and r*: probability and rank of the likeliest lens token (eq. 9).

    Ranks count the tokens with a larger logit, so ties do not depend on a sorting order. norm: logsumexp of the logits, if known.

    >>> score, p, rank = rank_weighted(torch.tensor([[2, 1, 0.5, 0, -1, -1.5, -2, -3]]), torch.tensor([[2, 5]]))
    >>> round(score.item(), 7), rank.item()
    (0.0913777, 2)
    """
    best = logits.gather(-1, lens).amax(-1, keepdim=True)
    p = (best[..., 0] - (logits.logsumexp(-1) if norm is None else norm)).exp()
    above = torch.gt(logits, best, out=torch.empty_like(logits, dtype=torch.float32))  # a sum of bools would copy them to int64
    rank = above.sum(-1).long()
    return (1 - rank / logits.shape[-1]) * p, p, rank


def token_confidence(logits: Float[Tensor, "n vocab"], *, k: int = LENS, norm: Float[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
    """Return C_k, minus the mean log-probability of the k likeliest next tokens (arXiv 2510.03659). norm as in `rank_weighted`."""
    return (logits.logsumexp(-1) if norm is None else norm) - logits.topk(min(k, logits.shape[-1])).values.mean(-1)


@torch.inference_mode()
def output_scores(
    at: Place,
    features: Sequence[int] | Int[Tensor, " n"] | None = None,
    *,
    factor: Number = 10.0,
    prompt: str = PROMPT,
    lens: Int[Tensor, "n k"] | None = None,
    subtract: bool = False,
    keep_error: bool = True,
    batch_size: int = 128,
) -> OutputScores:
    """Return S_out of features at a place (None: of all), the rank-weighted probability of their lens tokens (eqs. 9-10).

    lens: their lens tokens, where these are known; by default the twenty of `lens_tokens`. At the last token of the prompt
    x' = x + factor a_max W_dec[i], with a_max the strongest feature there. The released code, and all published scores, are
    the default. The paper's text differs: prompt "In my experience,", subtract=True (the unsteered P(M) is taken away),
    keep_error=False (x is replaced by its reconstruction before the push).

    Raises ValueError for features that the SAE lacks, a `lens` of another length, or logits that are not finite.

    >>> output_scores(lab.at(23), [5, 8]).score.shape      # doctest: +SKIP
    torch.Size([2])
    """
    model, sae = at.model, at.sae
    n = sae.W_dec.shape[0]
    features = torch.arange(n) if features is None else tensor("features", features).cpu()
    if len(features) and not 0 <= int(features.min()) <= int(features.max()) < n:
        raise ValueError(f"features: expected 0 to {n - 1}, got {int(features.min())} to {int(features.max())}")
    factor = number("factor", factor)
    lens = lens_tokens(model, sae.W_dec[features]) if lens is None else lens
    if len(lens) != len(features):
        raise ValueError(f"lens: expected a row for each of {len(features)} features, got {len(lens)}")
    with packed_linears(model):
        above = _Above(at, prompt)
        x = above.resid
        acts = sae.encode(x[None].to(sae.dtype))[0]
        a_max = float(acts.max())
        start = x if keep_error else sae.decode(acts[None])[0].to(x)
        plain = above.logits(x[None]).float()
        calm, sure = _unsteered(plain[0], lens.to(x.device)).cpu(), token_confidence(plain)
        found = []
        for part, tokens in zip(features.split(batch_size), lens.split(batch_size)):
            push = factor * a_max * sae.W_dec[part.to(x.device)].to(x)
            logits = above.logits(start + push).float()
            if len(lost := part[(~torch.isfinite(logits.amax(-1))).nonzero()[:, 0].cpu()]):
                raise ValueError(
                    f"features {lost.tolist()[:8]}, factor {factor:g}: expected finite logits, got NaN or infinity in {model.dtype}: "
                    "lower the factor, or open the model in float32"
                )
            norm = logits.logsumexp(-1)
            confidence = (token_confidence(logits, norm=norm) - sure).abs()
            found.append([t.cpu() for t in (*rank_weighted(logits, tokens.to(x.device), norm=norm), confidence)])
    score, p, rank, confidence = (torch.cat(column) for column in zip(*found)) if found else (torch.zeros(0),) * 4
    return OutputScores(features, score - calm if subtract else score, p, rank.long(), calm, confidence, a_max)


def _unsteered(logits: Float[Tensor, " vocab"], lens: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Return P(M) of many lens sets under one distribution, which is sorted once."""
    best = logits[lens].amax(-1)
    rank = len(logits) - torch.searchsorted(logits.sort().values, best, right=True)
    return (1 - rank / len(logits)) * (best - logits.logsumexp(0)).exp()


class _Above:
    """A prompt, ready for many versions of its last token's residual stream at a place: what comes before runs once."""

    def __init__(self, at: Place, prompt: str):
        from transformers import DynamicCache

        self.model, self.layer = at.model, at.layer
        self.ids = torch.tensor([prompt_ids(at.tokenizer, prompt)], device=self.model.device)
        self.cache = DynamicCache(config=self.model.config)
        if self.ids.shape[1] > 1:
            self.model.base_model(input_ids=self.ids[:, :-1], past_key_values=self.cache, use_cache=True)
        self.resid = residuals(self.model, self.ids, layers=[self.layer])[self.layer][0, -1]

    def logits(self, resid: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Return next-token logits for each version of the last token's residual stream."""
        n, length = len(resid), self.ids.shape[1]
        cache = deepcopy(self.cache)
        if length > 1:
            cache.batch_repeat_interleave(n)
        with starting_from(self.model, self.layer, resid[:, None]):
            return self.model(
                input_ids=self.ids[:, -1:].expand(n, 1),
                attention_mask=torch.ones(n, length, dtype=torch.long, device=resid.device),
                position_ids=torch.full((n, 1), length - 1, device=resid.device),
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]


def known(folder: str, name: str, layers: Sequence[int]) -> pd.DataFrame:
    """Return the scores of a preset's features at these layers; where some are missing the error holds the recipe."""
    path, recipe = shipped(folder, name, "scores.csv.gz"), f"python -m recipes.scores --preset {name} --text PATH_OR_HUB_ID"
    recipe += f" --layers {' '.join(map(str, layers))} --out runs/scores/{name}, then scores=runs/scores"
    if path is None:
        raise FileNotFoundError(f"expected scores of {name}'s features in {resolve(folder) / name}, got none. Make them: {recipe}")
    found = pd.read_csv(path)
    if absent := set(layers) - set(found.layer):
        raise ValueError(f"{path}: expected scores of layers {list(layers)}, got none of {sorted(absent)}. Make them: {recipe}")
    return found[found.layer.isin(layers)]

"""SAE features of text: residual streams, encoding, pooling over tokens, density, logit lens, top contexts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steerkit.concept import Concept
from steerkit.engine.lab import Lab, Place
from steerkit.engine.memory import at_once, halving
from steerkit.engine.packed import packed_linears
from steerkit.engine.steer import eager, residual_blocks
from steerkit.engine.tokens import text_ids
from steerkit.inputs import Whole, strings, tensor, whole
from steerkit.stats import auroc


class _Stop(Exception):
    """Ends a forward pass once the deepest wanted layer is known."""


@torch.inference_mode()
def residuals(
    model: nn.Module, ids: Int[Tensor, "batch pos"], mask: Tensor | None = None, *, layers: Sequence[int]
) -> dict[int, Float[Tensor, "batch pos d_model"]]:
    """Return the residual stream after each block in `layers`; blocks above the last of them do not run.

    ids may be padded on either side; mask is 1 on real tokens.

    >>> residuals(model, ids, layers=[13])[13].shape        # doctest: +SKIP
    torch.Size([8, 32, 576])
    """
    blocks, found = residual_blocks(model), {}
    deepest = max(layers)
    if not 0 <= min(layers) <= deepest < len(blocks):
        raise ValueError(f"layers: expected 0 to {len(blocks) - 1} for this model, got {sorted(layers)}")

    def keep(layer: int):
        def hook(_module, _args, output):
            found[layer] = output[0] if isinstance(output, tuple) else output
            if layer == deepest:
                raise _Stop

        return hook

    handles = [blocks[layer].register_forward_hook(keep(layer)) for layer in set(layers)]
    mask = torch.ones_like(ids) if mask is None else mask
    position = (mask.long().cumsum(1) - 1).clamp_min(0)
    try:
        with eager():
            model.base_model(input_ids=ids, attention_mask=mask.long(), position_ids=position, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {layer: found[layer] for layer in layers}


def ordinary_positions(
    ids: Int[Tensor, "batch pos"],
    mask: Tensor | None,
    resid: dict[int, Float[Tensor, "batch pos d_model"]],
    *,
    special: Sequence[int],
    outlier: float = 10.0,
) -> Bool[Tensor, "batch pos"]:
    """Mark the positions that count: real, not the first token, not a special token, no outlier norm at any layer.

    An outlier exceeds `outlier` times the median norm of the other positions of its layer. SAE training, pooling and
    density all leave out the rest: a few such positions carry norms a hundred times the others'.
    """
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    keep = real & (real.long().cumsum(1) > 1) & ~torch.isin(ids, torch.tensor(list(special), device=ids.device))
    for acts in resid.values():
        norm = acts.float().norm(dim=-1).to(keep.device)
        if keep.any():
            keep &= norm <= outlier * norm[keep].median()
    return keep


def token_batches(tokenizer, texts: Iterable[str], *, batch_size: int = 32, max_tokens: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, mask) of texts in their order, each with the beginning-of-text token first, padded on the right."""
    rows = [text_ids(tokenizer, text)[:max_tokens] for text in strings("texts", texts)]
    pad = tokenizer.pad_token_id or 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(map(len, part))
        yield (
            torch.tensor([r + [pad] * (width - len(r)) for r in part]),
            torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in part]),
        )


def read(
    at: Place, ids: Int[Tensor, "batch pos"], mask: Tensor | None = None, *, include_first: bool = False
) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]:
    """Return the residual stream at a place, and the positions that count there: the ordinary ones, or all real ones."""
    ids = ids.to(at.model.device)
    mask = torch.ones_like(ids) if mask is None else mask.to(ids)
    found = residuals(at.model, ids, mask, layers=[at.layer])
    special, resid = at.tokenizer.all_special_ids, found[at.layer]
    keep = mask.bool() if include_first else ordinary_positions(ids, mask, found, special=special, outlier=at.outlier)
    return resid, keep.to(resid.device)


@torch.inference_mode()
def feature_means(
    at: Place,
    texts: Iterable[str],
    *,
    include_first: bool = False,
    batch_size: int | None = None,
    max_tokens: int = 128,
) -> Float[Tensor, "texts d_sae"]:
    """Return each text's mean feature activations over its ordinary positions (encode first, then average); 32 together (`at_once`).

    include_first=True averages over all positions, the beginning-of-text token included, as FGAA section 3.1 does. Where
    that token's activations are many times the others', prompt length would become the main difference between texts.

    >>> feature_means(lab.at(13), ["I love you."]).shape    # doctest: +SKIP
    torch.Size([1, 4096])
    """
    sae = at.sae

    def means(part: Sequence[str]) -> Float[Tensor, "some d_sae"]:
        ((ids, mask),) = token_batches(at.tokenizer, part, batch_size=len(part), max_tokens=max_tokens)
        resid, keep = read(at, ids, mask, include_first=include_first)
        acts = sae.encode(resid.to(sae.W_dec.device, sae.dtype))
        keep = keep.to(acts.device)
        return ((acts * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp_min(1)).cpu()

    texts, size = strings("texts", texts), batch_size or at_once(32, at.model.device)
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    return torch.cat([part for batch in batches for part in halving(means, batch)])


def target_features(
    means: Sequence[Float[Tensor, "texts d_sae"]],
    density: Float[Tensor, " d_sae"],
    *,
    limits: Sequence[float] = (0.01, 0.02),
    candidates: int = 20,
) -> pd.DataFrame:
    """Return the features that tell a topic's texts from others, best first: one rule for every method and every topic.

    means: `feature_means` of the positive and the negative prompts, and of positive and negative sentences apart from these.
    Candidates are the `candidates` features of the largest AUROC on the prompts (ties: the larger gap of means) among those that fire on
    less than the first of `limits` of all tokens, or the next where none of these has an AUROC above one half. They are ordered by
    AUROC on the sentences. Columns: feature, density, prompts and sentences (AUROC).

    Raises ValueError where no feature tells the prompts apart, or for means that are not finite.

    >>> on, off = torch.tensor([[5.0, 0.0], [4.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    >>> target_features([on, off, on, off], torch.tensor([0.001, 0.001])).feature.tolist()
    [0]
    """
    on, off, held_on, held_off = (tensor("feature means", part).float().cpu().numpy() for part in means)
    seen, gap = auroc(on, off), on.mean(0) - off.mean(0)
    for limit in limits:
        able = np.flatnonzero((density.cpu().numpy() < limit) & (seen > 0.5))
        if len(able):
            break
    else:
        raise ValueError(f"expected a feature below a density of {limits[-1]:g} that tells the prompts apart, got none: raise the limits")
    best = able[np.lexsort((-gap[able], -seen[able]))[:candidates]]
    held = auroc(held_on[:, best], held_off[:, best])
    table = {"feature": best, "density": density.cpu().numpy()[best], "prompts": seen[best], "sentences": held}
    return pd.DataFrame(table).sort_values("sentences", ascending=False, kind="stable", ignore_index=True)


def topic_features(
    at: Place, topics: Mapping[str, Concept], density: Float[Tensor, " d_sae"], *, given: Mapping[str, Whole] | None = None
) -> pd.DataFrame:
    """Return a row a topic: its feature by `target_features`, or the `given` one, with density and AUROC on prompts and sentences.

    given: features by topic, such as the ids that the authors of a paper published; `by` says which of the two a feature is.
    Raises ValueError for a given feature that the SAE lacks.

    >>> topic_features(lab.at(13), {"love": concepts()["love"]}, density)    # doctest: +SKIP
    """
    rows, given = [], {name: whole(f"given, {name}", i) for name, i in (given or {}).items()}
    if lacking := {name: i for name, i in given.items() if not 0 <= i < len(density)}:
        raise ValueError(f"given: expected features 0 to {len(density) - 1}, got {lacking}: they belong to another SAE")
    for name, topic in topics.items():
        means = [feature_means(at, texts) for texts in (*topic.contrast, *topic.held_out)]
        if name in given:
            i, (on, off, held_on, held_off) = given[name], (part[:, [given[name]]].numpy() for part in means)
            found = {"feature": i, "density": float(density[i]), "prompts": auroc(on, off)[0], "sentences": auroc(held_on, held_off)[0]}
        else:
            found = target_features(means, density).iloc[0].to_dict()
        rows.append({"topic": name, **found, "feature": int(found["feature"]), "by": "given" if name in given else "rule"})
    return pd.DataFrame(rows).set_index("topic")


def lens_logits(model: nn.Module, directions: Float[Tensor, "n d_model"], *, chunk: int = 512) -> Iterator[Float[Tensor, "some vocab"]]:
    """Yield lm_head(final_norm(direction)) of all directions, `chunk` at a time (output scores, arXiv 2505.20063, eqs. 3-4).

    The model's final norm is applied and no soft cap, as in the released code.
    """
    norm = next(m for name, m in model.base_model.named_children() if name in ("norm", "ln_f", "final_layer_norm"))
    with packed_linears(model):
        for part in directions.split(chunk):
            logits = model.get_output_embeddings()(norm(part.to(model.device, model.dtype))).float()
            if not torch.isfinite(logits.amax(-1)).all():
                raise ValueError(f"directions: expected finite logits, got NaN or infinity in {model.dtype}: open the model in float32")
            yield logits


@torch.inference_mode()
def logit_lens(lab: Lab, direction: Float[Tensor, " d_model"], *, k: int = 10) -> list[tuple[str, float]]:
    """Return the k tokens that a direction raises most, with their logits (`lens_logits`)."""
    top = next(lens_logits(lab.hf, direction[None]))[0].topk(k)
    return [(lab.tokenizer.decode([i]), float(v)) for i, v in zip(top.indices.tolist(), top.values)]


@torch.inference_mode()
def top_contexts(
    acts: Float[Tensor, "tokens d_sae"], tokens: Int[Tensor, " tokens"], *, k: int = 5, before: int = 8, after: int = 2
) -> tuple[Int[Tensor, "d_sae k width"], Float[Tensor, "d_sae k"], Int[Tensor, "d_sae k"]]:
    """Return, per feature, the k contexts in which it fires hardest: token ids around the peak, the peak's value and place.

    Peaks lie at least `before + after` tokens apart in blocks of that size, so one passage is not shown twice.
    Contexts past the ends are padded with -1.
    """
    width = before + 1 + after
    n = len(tokens) // width * width
    peak, where = acts[:n].reshape(-1, width, acts.shape[1]).max(1)  # [blocks, d_sae]
    value, block = peak.topk(min(k, len(peak)), dim=0)
    centre = block * width + where.gather(0, block)
    index = centre.T[..., None] + torch.arange(-before, after + 1, device=acts.device)
    inside = (index >= 0) & (index < len(tokens))
    return torch.where(inside, tokens[index.clamp(0, len(tokens) - 1)].long(), -1), value.T.contiguous(), centre.T

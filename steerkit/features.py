"""SAE features of text: residual streams, encoding, pooling over tokens, density, logit lens, top contexts."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steerkit.hooks import residual_blocks
from steerkit.memory import halving
from steerkit.packed import packed_linears

LOGITS = 2**28  # that exist together: 1 GiB in float32


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
        model.base_model(input_ids=ids, attention_mask=mask.long(), position_ids=position, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return {layer: found[layer] for layer in layers}


def forward_losses(model: nn.Module, ids: Int[Tensor, "batch pos"], **inputs) -> Float[Tensor, "batch next"]:
    """Return `next_token_losses` of a forward call, never with more than `LOGITS` logits at a time.

    64 rows of 300 tokens have 5 billion logits where the vocabulary has 256,000 tokens: 30 GB with their float32 copy.
    """
    at_once = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])
    if ids.numel() <= at_once:
        return next_token_losses(model(input_ids=ids, use_cache=False, **inputs).logits, ids)
    hidden = model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[:, :-1].flatten(0, 1)
    parts = zip(hidden.split(at_once), ids[:, 1:].flatten().split(at_once))
    losses = [nn.functional.cross_entropy(_logits(model, some).float(), next_ids, reduction="none") for some, next_ids in parts]
    return torch.cat(losses).view(len(ids), -1)


def _logits(model: nn.Module, hidden: Float[Tensor, "some d_model"]) -> Float[Tensor, "some vocab"]:
    """Return the model's logits from behind its final norm; Gemma 2 caps them."""
    logits, cap = model.get_output_embeddings()(hidden), getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def next_token_losses(logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch next"]:
    """Return -log p(t_i | t_<i) in nats for every token but the first, in float32; pos - 1 = next numbers a row."""
    flat = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


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
        norm = acts.float().norm(dim=-1)
        if keep.any():
            keep &= norm <= outlier * norm[keep].median()
    return keep


def token_batches(tokenizer, texts: Sequence[str], *, batch_size: int = 32, max_tokens: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, mask) of texts in their order, each with the beginning-of-text token first, padded on the right."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [(bos + tokenizer(text, add_special_tokens=False)["input_ids"])[:max_tokens] for text in texts]
    pad = tokenizer.pad_token_id or 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(map(len, part))
        yield (
            torch.tensor([r + [pad] * (width - len(r)) for r in part]),
            torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in part]),
        )


@torch.inference_mode()
def feature_means(
    model: nn.Module,
    tokenizer,
    sae,
    texts: Sequence[str],
    *,
    layer: int,
    outlier: float = 10.0,
    include_first: bool = False,
    batch_size: int = 32,
    max_tokens: int = 128,
) -> Float[Tensor, "texts d_sae"]:
    """Return each text's mean feature activations over its ordinary positions (encode first, then average).

    include_first=True averages over all positions, the beginning-of-text token included, as FGAA section 3.1 does. Where
    that token's activations are many times the others', prompt length would become the main difference between texts.

    >>> feature_means(model, tokenizer, sae, ["I love you."], layer=13).shape    # doctest: +SKIP
    torch.Size([1, 4096])
    """

    def means(part: Sequence[str]) -> Float[Tensor, "some d_sae"]:
        ((ids, mask),) = token_batches(tokenizer, part, batch_size=len(part), max_tokens=max_tokens)
        ids, mask = ids.to(model.device), mask.to(model.device)
        resid = residuals(model, ids, mask, layers=[layer])
        keep = mask.bool() if include_first else ordinary_positions(ids, mask, resid, special=tokenizer.all_special_ids, outlier=outlier)
        acts = sae.encode(resid[layer].to(sae.dtype)) * keep[..., None]
        return (acts.sum(1) / keep.sum(1, keepdim=True).clamp_min(1)).cpu()

    batches = [texts[at : at + batch_size] for at in range(0, len(texts), batch_size)]
    return torch.cat([part for batch in batches for part in halving(means, batch)])


def separating(
    positive: Float[Tensor, "p d_sae"], negative: Float[Tensor, "q d_sae"], *, k: int = 8, max_share: float = 0.1
) -> Int[Tensor, " k"]:
    """Return the k features with the largest gap in mean activation between two sets of texts, best first.

    A feature that is active on more than `max_share` of the negative texts is passed over. Takes `feature_means`.

    >>> separating(torch.tensor([[5.0, 9.0], [1.0, 9.0]]), torch.tensor([[0.0, 8.0], [0.0, 8.0]]), k=1).tolist()
    [0]
    """
    gap = (positive.mean(0) - negative.mean(0)).masked_fill((negative > 0).float().mean(0) > max_share, -torch.inf)
    return gap.topk(min(k, len(gap))).indices


def lens_logits(model: nn.Module, directions: Float[Tensor, "n d_model"], *, chunk: int = 512) -> Iterator[Float[Tensor, "some vocab"]]:
    """Yield lm_head(final_norm(direction)) of all directions, `chunk` at a time (output scores, arXiv 2505.20063, eqs. 3-4).

    The model's final norm is applied and no soft cap, as in the released code.
    """
    norm = next(m for name, m in model.base_model.named_children() if name in ("norm", "ln_f", "final_layer_norm"))
    with packed_linears(model):
        for part in directions.split(chunk):
            yield model.get_output_embeddings()(norm(part.to(model.device, model.dtype))).float()


@torch.inference_mode()
def logit_lens(model: nn.Module, tokenizer, direction: Float[Tensor, " d_model"], *, k: int = 10) -> list[tuple[str, float]]:
    """Return the k tokens that a direction raises most, with their logits (`lens_logits`)."""
    top = next(lens_logits(model, direction[None]))[0].topk(k)
    return [(tokenizer.decode([i]), float(v)) for i, v in zip(top.indices.tolist(), top.values)]


@torch.inference_mode()
def top_contexts(
    acts: Float[Tensor, "tokens d_sae"], tokens: Int[Tensor, " tokens"], *, k: int = 5, before: int = 8, after: int = 2
) -> tuple[Int[Tensor, "d_sae k width"], Float[Tensor, "d_sae k"]]:
    """Return, per feature, the k contexts in which it fires hardest: token ids around the peak, and the peak's value.

    Peaks lie at least `before + after` tokens apart in blocks of that size, so one passage is not shown twice.
    Contexts past the ends are padded with -1.
    """
    width = before + 1 + after
    n = len(tokens) // width * width
    peak, where = acts[:n].reshape(-1, width, acts.shape[1]).max(1)  # [blocks, d_sae]
    value, block = peak.topk(min(k, len(peak)), dim=0)
    centre = block * width + where.gather(0, block)
    index = centre.T[..., None] + torch.arange(-before, after + 1)
    inside = (index >= 0) & (index < len(tokens))
    return torch.where(inside, tokens[index.clamp(0, len(tokens) - 1)].long(), -1), value.T.contiguous()

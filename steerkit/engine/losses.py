"""Next-token losses of plain and of steered text, in nats, with no more logits at a time than memory has room for."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.engine.memory import at_once, halving
from steerkit.engine.packed import packed_linears
from steerkit.engine.partial import starting_from

LOGITS = 2**28  # that exist together: 1 GiB in float32


def forward_losses(model: nn.Module, ids: Int[Tensor, "batch pos"], **inputs) -> Float[Tensor, "batch next"]:
    """Return `next_token_losses` of a forward call, never with more than `LOGITS` logits at a time.

    64 rows of 300 tokens have 5 billion logits where the vocabulary has 256,000 tokens: 30 GB with their float32 copy.
    """
    if ids.numel() <= LOGITS // model.get_output_embeddings().weight.shape[0]:
        return next_token_losses(model(input_ids=ids, use_cache=False, **inputs).logits, ids)
    hidden = model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden_losses(model, hidden, ids[:, 1:].flatten()).view(len(ids), -1)


def hidden_losses(model: nn.Module, hidden: Float[Tensor, "n d_model"], next_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return -log p(next token) in nats, in float32, from what the last norm puts out; never more than `LOGITS` logits at a time."""
    most = max(1, LOGITS // model.get_output_embeddings().weight.shape[0])
    parts = zip(hidden.split(most), next_ids.split(most))
    return torch.cat([nn.functional.cross_entropy(_logits(model, some).float(), ids, reduction="none") for some, ids in parts])


def _logits(model: nn.Module, hidden: Float[Tensor, "some d_model"]) -> Float[Tensor, "some vocab"]:
    """Return the model's logits from behind its final norm; Gemma 2 caps them."""
    logits, cap = model.get_output_embeddings()(hidden), getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def next_token_losses(logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch next"]:
    """Return -log p(t_i | t_<i) in nats for every token but the first, in float32; pos - 1 = next numbers a row."""
    flat = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


def token_losses(model, tokenizer, ids: Sequence[list[int]], *, batch_tokens: int | None = None) -> list[np.ndarray]:
    """Return for each row of token ids the losses -log p(t_i | bos, t_<i) in nats, of the model without steering.

    Rows are sorted by length, padded on the right and masked; a batch holds about `batch_tokens` positions, 1024 by default (`at_once`).
    Raises ValueError for a tokenizer that has no token to begin with.
    """
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    batch_tokens = batch_tokens or at_once(1024, model.device)
    if bos is None:
        raise ValueError("expected a tokenizer with a beginning-of-text token, got none; set tokenizer.bos_token")

    def read(rows: list[list[int]]) -> torch.Tensor:
        tokens = torch.full((len(rows), 1 + max(map(len, rows))), bos)
        mask = torch.zeros_like(tokens)
        for r, row in enumerate(rows):
            tokens[r, 1 : 1 + len(row)] = torch.tensor(row)
            mask[r, : 1 + len(row)] = 1
        with torch.inference_mode(), packed_linears(model):
            return forward_losses(model, tokens.to(model.device), attention_mask=mask.to(model.device)).cpu()

    out = [np.zeros(len(row)) for row in ids]
    order, start = sorted(range(len(ids)), key=lambda i: len(ids[i])), 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * (len(ids[order[stop]]) + 1) <= batch_tokens:
            stop += 1
        for loss in halving(read, [ids[i] for i in order[start:stop]]):
            for row in loss:
                i, start = order[start], start + 1
                out[i] = row[: len(ids[i])].double().numpy()
                if not np.isfinite(out[i]).all():
                    raise ValueError(
                        f"losses: expected finite numbers, got NaN or infinity for row {i} in {model.dtype}: open the model in float32"
                    )
    return out


@torch.inference_mode()
def steered_token_losses(
    model: nn.Module,
    ids: Int[Tensor, "rows pos"],
    resid: Float[Tensor, "rows pos d_model"],
    steps: Float[Tensor, "n d_model"],
    *,
    layer: int,
    batch_size: int,
) -> Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some rows next"]]]:
    """Yield (which steps, their next-token losses in nats) on all rows, each step added at every position after `layer`.

    resid: the stream after `layer`, computed once for all steps. batch_size: rows x steps that run together.
    """

    def losses(part: Int[Tensor, " some"]) -> tuple[Tensor, Tensor]:
        steered = (resid + steps[part, None, None].to(resid)).flatten(0, 1)
        many = ids.repeat(len(part), 1)
        with starting_from(model, layer, steered):
            found = forward_losses(model, many).view(len(part), len(ids), -1)
        if len(lost := (~torch.isfinite(found)).any(-1).nonzero()):
            step, row = lost[0].tolist()
            push = f"row {row} of its batch, a push of norm {float(steps[part[step]].norm()):g} after layer {layer}"
            raise ValueError(
                f"{push}: expected finite losses, got NaN or infinity in {resid.dtype}: lower the scale, or open the model in float32"
            )
        return part, found

    for part in torch.arange(len(steps)).split(max(1, batch_size // len(ids))):
        yield from halving(losses, part)

"""Run only the blocks above a layer, from a residual stream that is known: what steering there costs, and no more."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.features import forward_losses
from steerkit.hooks import eager, residual_blocks
from steerkit.memory import halving


@contextmanager
def starting_from(model: nn.Module, layer: int, resid: Float[Tensor, "batch pos d_model"]) -> Iterator[None]:
    """Calls of `model` begin with `resid` as the output of block `layer` while the context is open; the blocks below rest.

    The model's own code makes positions and masks, so the input ids must have resid's batch and length. Hooks on the
    blocks above work as ever. ValueError for a layer that the model lacks.

    >>> with starting_from(model, 13, resid):                                # doctest: +SKIP
    ...     logits = model(input_ids=ids, use_cache=False).logits
    """
    blocks = residual_blocks(model)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer: expected 0 to {len(blocks) - 1} for this model, got {layer}")

    def rest(hidden_states, *_args, **_kwargs):
        return hidden_states

    def give(hidden_states, *_args, **_kwargs):
        if hidden_states.shape != resid.shape:
            raise ValueError(f"input ids: expected batch and length of resid {list(resid.shape[:2])}, got {list(hidden_states.shape[:2])}")
        return resid

    with eager(), ExitStack() as stack:
        for block in blocks[: layer + 1]:
            stack.callback(block.__dict__.pop, "forward")
            block.forward = give if block is blocks[layer] else rest
        yield


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

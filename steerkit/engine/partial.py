"""Run only the blocks above a layer, from a residual stream that is known: what steering there costs, and no more."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from steerkit.engine.steer import eager, residual_blocks


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

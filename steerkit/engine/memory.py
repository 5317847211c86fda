"""A batch that does not fit in memory is done in halves."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def halving(do: Callable[..., Result], batch: Sequence | Tensor) -> list[Result]:
    """Return [do(batch)]; where memory does not suffice, what `do` gives for its halves, in order. What is done is not done again.

    Any other error passes, and so does a lack of memory for a single row.

    >>> halving(sum, [1, 2, 3])
    [6]
    """
    try:
        return [do(batch)]
    except (RuntimeError, MemoryError) as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
    torch.cuda.empty_cache()  # here, where the error no longer holds the tensors of the batch
    half = len(batch) // 2
    return [*halving(do, batch[:half]), *halving(do, batch[half:])]


def out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory from other errors: torch has no exception of its own for it on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)

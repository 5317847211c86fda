"""How many rows run together by default; a batch that does not fit in memory is done in halves."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
SHORT = ("can't allocate memory", "_STATUS_ALLOC_FAILED")  # of the CPU's allocator; of CUDA's libraries


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
    """Tell a lack of memory from other errors: torch has no exception of its own for it on the CPU, nor for CUDA's libraries."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in SHORT)


def at_once(rows: int, device: str | torch.device) -> int:
    """Return how many rows run together where nobody says: sixteen times as many on a GPU, which a CPU's batch leaves idle.

    >>> at_once(32, "cpu"), at_once(32, "cuda")
    (32, 512)
    """
    return 16 * rows if torch.device(device).type == "cuda" else rows

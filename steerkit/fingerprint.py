"""One key for what is kept on disk: a hash of everything that determines a result."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

# Where a model was found, on what it runs and who wrote it do not change what it computes.
ELSEWHERE = {"_name_or_path", "transformers_version", "device", "metadata"}


def fingerprint(*parts) -> str:
    """Return 16 hex digits that differ when any part differs: models and SAEs by their weights and settings, the rest by value.

    Every number of a weight counts, as weighted sums over blocks of a kilobyte, which is fast. A numpy number is
    the Python number; dtypes of tensors count. Raises TypeError for what has no value of its own, a function say.

    >>> fingerprint([1, 2.0], torch.ones(2)) == fingerprint([1, 2.0], torch.ones(2)) != fingerprint([1, 2.5], torch.ones(2))
    True
    """
    known: dict[int, str] = {}

    def feed(digest, value) -> None:
        if isinstance(value, Tensor):
            _tensor(digest, value)
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
        elif value is None or isinstance(value, str | bytes | bool | int | float | np.generic):
            digest.update(repr(value.item() if isinstance(value, np.generic) else value).encode() + b";")
        elif isinstance(value, Mapping):
            feed(digest, sorted(value.items(), key=lambda item: str(item[0])))
        elif isinstance(value, list | tuple | set | frozenset):
            digest.update(f"{type(value).__name__}{len(value)}:".encode())
            for part in sorted(value) if isinstance(value, set | frozenset) else value:
                feed(digest, part)
        elif dataclasses.is_dataclass(value):
            digest.update(type(value).__qualname__.encode())
            feed(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        elif callable(value) and not isinstance(value, nn.Module):
            raise TypeError(f"fingerprint: expected values, models and SAEs, got {value!r}: give what it was made from")
        else:
            value = getattr(value, "_orig_mod", value)  # compiled: the same weights
            if id(value) not in known:  # an SAE may come with every arm
                own = hashlib.sha256(type(value).__qualname__.encode())
                feed(own, _module(value) if isinstance(value, nn.Module) else vars(value))
                known[id(value)] = own.hexdigest()
            digest.update(known[id(value)].encode())

    digest = hashlib.sha256()
    feed(digest, parts)
    return digest.hexdigest()[:16]


def _module(module: nn.Module) -> list:
    """Return what determines a model or an SAE: its settings, parameters and buffers."""
    settings = getattr(module, "cfg", None) or getattr(module, "config", None)
    settings = settings.to_dict() if hasattr(settings, "to_dict") else {}
    settings = json.dumps({k: v for k, v in settings.items() if k not in ELSEWHERE}, sort_keys=True, default=str)
    return [settings, *module.named_parameters(), *module.named_buffers()]


@torch.no_grad()
def _tensor(digest, value: Tensor) -> None:
    digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
    octets = value.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(octets) // 1024 * 1024
    if whole and octets.data_ptr() % 8 == 0:
        weights = torch.arange(1, 256, 2, device=value.device)  # odd: a number's place in its block counts
        for part in octets[:whole].view(torch.int64).view(-1, 128).split(1 << 13):
            digest.update((part * weights).sum(1).cpu().numpy().tobytes())
        octets = octets[whole:]
    digest.update(octets.cpu().numpy().tobytes())

"""A GPU for tests, on any CPU: tensors that say "cuda", compute on the CPU, and refuse what CUDA refuses.

`OnGpu` wraps a CPU tensor; under `gpu` all that asks for "cuda" gets one. To torch's C++ a wrapper is on the CPU, so that a torch
built without CUDA serves too; where Python code asks, it says "cuda:0".
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}
INDEXES = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index"}
# A single number on the CPU may join a computation on the GPU, but not where tensors are joined, looked up or multiplied as matrices.
STRICT = {"aten::cat", "aten::stack", "aten::index_select", "aten::gather", "aten::scatter", "aten::embedding", "aten::mm", "aten::isin"}


class OnGpu(torch.Tensor):
    """A tensor on the GPU: `inner` holds its numbers on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False):
        options = {"dtype": inner.dtype, "layout": inner.layout, "requires_grad": requires_grad}
        with torch.inference_mode(False):  # a view in inference mode of a tensor from outside counts versions
            made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), inner.stride(), inner.storage_offset(), **options)
        made.inner = inner.detach() if inner.requires_grad else inner
        return made

    device, is_cuda, is_cpu = property(lambda self: CUDA), property(lambda self: True), property(lambda self: False)

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def tolist(self):
        return self.inner.tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __format__(self, spec):
        return format(self.inner, spec)

    def __repr__(self, **_):
        return f"OnGpu({self.inner!r})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGpu(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Front(TorchFunctionMode):
    """What torch decides before it dispatches: what "cuda" means, and where `to`, `cpu` and `cuda` go."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: _numbered(value) for name, value in (kwargs or {}).items()}
        args = tuple(map(_numbered, args))
        if func is torch._has_compatible_shallow_copy_type:
            return False  # a module that moves gets new parameters
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            func, args = torch.Tensor.to, (args[0], CUDA if func is torch.Tensor.cuda else CPU)
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        return func(*args, **kwargs)


def _numbered(value):
    if isinstance(value, str):
        return CUDA if value == "cuda" else value
    return CUDA if isinstance(value, torch.device) and value.type == "cuda" else value


def _to(tensor, *args, other=None, device=None, dtype=None, copy=False, **options):
    args = [a for a in args if a is not None and not isinstance(a, bool)]
    for like in [a for a in (*args, other) if isinstance(a, torch.Tensor)]:
        device, dtype = like.device, like.dtype
    for value in args:
        device = torch.device(value) if isinstance(value, str | torch.device) else device
        dtype = value if isinstance(value, torch.dtype) else dtype
    device, dtype = tensor.device if device is None else torch.device(device), dtype or tensor.dtype
    if (device.type, dtype) == (tensor.device.type, tensor.dtype) and not copy:
        return tensor
    return torch.ops.aten._to_copy(tensor, dtype=dtype, device=device)


class Gpu(TorchDispatchMode):
    """Sees what has no tensor on the GPU among its arguments: factories, and copies to the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Compute on the CPU what CUDA would compute, or raise as CUDA would."""
    tensors, wanted = [], []

    def plain(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return value.inner if isinstance(value, OnGpu) else value
        if isinstance(value, torch.device):
            wanted.append(value)
            return CPU
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    name, written = func._schema.name, func._schema.is_mutable
    new_args = [plain(a) for a in args]
    new_kwargs = {key: plain(value) for key, value in kwargs.items() if key != "pin_memory"}
    here = _device(name, args, tensors)
    like = here is CUDA and (name.startswith("aten::new_") or name.endswith("_like"))  # asked by C++, with the device that it knows
    there = here if like or not wanted else wanted[0]
    if there.type == "cuda" and kwargs.get("generator") is not None:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    out = func(*new_args, **new_kwargs)
    if written and out is not None:
        return kwargs.get("out", args[0])
    return _tagged(out) if there.type == "cuda" else out


def _tagged(out):
    if isinstance(out, torch.Tensor):
        return OnGpu(out)
    return type(out)(_tagged(v) for v in out) if isinstance(out, list | tuple) else out


def _device(name: str, args, tensors) -> torch.device:
    """Return the device that an operation runs on, or raise torch's error for one that mixes two."""
    if name in MOVES:
        return tensors[0].device
    if name in INDEXES:
        index = [t for t in args[1] if t is not None]
        if not isinstance(args[0], OnGpu) and any(isinstance(t, OnGpu) for t in index):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [t for t in tensors if not any(t is i for i in index)]
    on_gpu = [isinstance(t, OnGpu) for t in tensors]
    if any(on_gpu) and any(not gpu and (t.ndim or name in STRICT) for t, gpu in zip(tensors, on_gpu)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")
    return CUDA if any(on_gpu) else CPU


@contextlib.contextmanager
def gpu():
    """Give the machine a GPU while it is open: `torch.cuda.is_available()`, and autocast and synchronisation do nothing."""
    cast, lifted = torch.autocast, torch._C._only_lift_cpu_tensors()
    on_gpu = lambda *a, **k: "cuda" in (*a, k.get("device_type"))  # noqa: E731
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True, "get_device_name": "a test"}
    answers |= dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "manual_seed_all", "get_rng_state", "set_rng_state"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext() if on_gpu(*a, **k) else cast(*a, **k))
        for name, value in answers.items():
            patch.setattr(torch.cuda, name, lambda *_a, value=value, **_k: value)
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") copies where the mode sees it
        try:
            with Gpu(), Front():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)

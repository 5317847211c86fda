"""What this machine computes fast: the one place that decides between bfloat16 and float32."""

import platform

import torch


def native_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Return whether `device` multiplies bfloat16 matrices in hardware: most GPUs do, and CPUs with AVX-512-BF16, AMX or Arm's BF16.

    Elsewhere a product is emulated, at a few hundredths of float32's speed.

    >>> native_bfloat16("meta")
    False
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu" or not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return arm or torch.cpu._is_avx512_bf16_supported()  # oneDNN says yes to any AVX-512, where it emulates


def choose_dtype(wanted: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """Return the dtype to compute in, and print a line where that was a choice or is not what was wanted.

    "auto" is bfloat16 where `native_bfloat16(device)`, else float32. A CPU without native bfloat16 gets float32 in its place.
    Raises ValueError for a name that is no floating dtype of torch.

    >>> choose_dtype("float32", "cpu")
    torch.float32
    """
    name = str(wanted).removeprefix("torch.")
    dtype = torch.bfloat16 if name == "auto" else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected auto or a floating dtype of torch such as float32 or bfloat16, got {wanted!r}")
    device, native = torch.device(device), native_bfloat16(device)
    if dtype is torch.bfloat16 and not native and (device.type == "cpu" or name == "auto"):
        print(f"dtype float32: {name} was asked for, and this {device.type} has no native bfloat16")
        return torch.float32
    if name == "auto":
        print(f"dtype bfloat16: this {device.type} computes it natively")
    return dtype

"""The effects and approximators that SAE-TS published on the hub, as ours are kept."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from steerkit.approximator import Approximator
from steerkit.presets import Preset
from steerkit.saes import explain


def _file(spec: Preset, which: str) -> dict[str, Tensor]:
    """Download one published file and return its tensors; nothing but tensors and containers is ever built from it."""
    from huggingface_hub import hf_hub_download

    if spec.effects is None:
        raise ValueError(f"{spec.name}: expected a preset with published effects, got none; measure your own with steerkit.effects")
    name = getattr(spec.effects, which)
    try:
        path = hf_hub_download(spec.effects.repo, name, repo_type="dataset")
    except Exception as error:
        raise explain(error, f"{spec.effects.repo}/{name}", spec) from error
    found = torch.load(path, map_location="cpu", weights_only=True)  # the published format; refuses code
    wanted = {"adapter": {"W", "b"}, "effects": {"features", "effects"}}[which]
    if not isinstance(found, Mapping) or set(found) != wanted:
        raise ValueError(f"{spec.effects.repo}/{name}: expected tensors {sorted(wanted)}, got {sorted(map(str, found))[:8]}")
    return dict(found)


def adapter(spec: Preset) -> Approximator:
    """Return the published approximator of a preset: W [d_model, d_sae] and b [d_sae].

    Raises ValueError for a preset without one or a file of another shape; PermissionError or ConnectionError from the hub.
    """
    found = _file(spec, "adapter")
    if found["W"].ndim != 2 or found["W"].shape[1:] != found["b"].shape:
        raise ValueError(
            f"{spec.effects.adapter}: expected W [d_model, d_sae], b [d_sae], got {list(found['W'].shape)}, {list(found['b'].shape)}"
        )
    return Approximator(found["W"].float(), found["b"].float())


def effects(spec: Preset) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"], Float[Tensor, "n d_sae"]]:
    """Return the published unit vectors, their scales and their effects; the file holds scale x vector as `features`."""
    found = _file(spec, "effects")
    scaled = found["features"].float()
    scales = scaled.norm(dim=1)
    if not (torch.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"{spec.effects.effects}: expected vectors with a norm above 0, got {scales.min():.3g} to {scales.max():.3g}")
    return scaled / scales[:, None], scales, found["effects"].float()

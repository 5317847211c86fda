"""Measured effects, wherever they are: shipped with this project, or published by SAE-TS on the hub."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors import safe_open
from torch import Tensor

from steerkit.engine.lab import Place
from steerkit.files import resolve
from steerkit.methods.sae_ts.approximator import Approximator, fit_adam, fit_ridge
from steerkit.methods.sae_ts.effects import Effects, load, training_vectors
from steerkit.models.presets import Preset
from steerkit.models.saes import explain


def _file(spec: Preset, which: str) -> dict[str, Tensor]:
    """Download one published file and return its tensors; nothing but tensors and containers is ever built from it."""
    from huggingface_hub import hf_hub_download

    if spec.effects is None:
        raise ValueError(f"{spec.name}: expected a preset with published effects, got none; measure your own with recipes.effects")
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


def effects(spec: Preset) -> Effects:
    """Return the published vectors, their scales and effects; the file holds scale x vector as `features`."""
    found = _file(spec, "effects")
    scaled, y = found["features"].float(), found["effects"].float()
    scales = scaled.norm(dim=1)
    if not (torch.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"{spec.effects.effects}: expected vectors with a norm above 0, got {scales.min():.3g} to {scales.max():.3g}")
    return Effects(scaled / scales[:, None], scales, y[:, None], torch.zeros(y.shape[1]))


def source(given: str, spec: Preset, layer: int) -> str:
    """Return where the effects of a preset are: what is `given`, else the shipped file of this layer, else "hub".

    Raises ValueError, with the recipe, for a preset and layer without either, or an unknown file; and for a file of another
    preset or layer.
    """
    shipped = f"data/effects/{spec.name}/layer_{layer}.safetensors"
    recipe = (
        f"python -m recipes.effects --preset {spec.name} --layer {layer} --out runs/effects/{spec.name} --ship {shipped} "
        "measures them (for thousands of vectors: hours on a GPU)"
    )
    published = spec.effects is not None and layer == spec.primary_layer
    chosen = given or (shipped if resolve(shipped).exists() else "hub" if published else "")
    if chosen == "hub" and not published:
        raise ValueError(f"{spec.name}, layer {layer}: expected a preset and layer with published effects, got one without: {recipe}")
    if chosen == "hub":
        return chosen
    if not chosen or not resolve(chosen).exists():
        got = f"no file {chosen}" if chosen else "none"
        raise ValueError(f"{spec.name}, layer {layer}: expected measured effects, got {got}: {recipe}")
    with safe_open(resolve(chosen), "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
    if (got := (about.get("preset"), about.get("layer"))) != (spec.name, layer):
        raise ValueError(f"{chosen}: expected effects of {spec.name}, layer {layer}, got those of {got[0]}, layer {got[1]}: {recipe}")
    return chosen


def measured(at: Place, given: str = "", *, n_held: int = 100) -> tuple[Effects, Bool[Tensor, " n"], Effects | None, dict]:
    """Return a place's effects, which vectors are held out, a second measurement of those (or None), and how they were made.

    given: as in `source`. The last `n_held` published vectors are held out, as in the paper, and were measured once.
    """
    chosen = source(given, at.lab.preset, at.layer)
    if chosen == "hub":
        found = effects(at.lab.preset)
        held = torch.arange(len(found.scales)) >= len(found.scales) - n_held
        return found, held, None, {"preset": at.preset, "source": at.lab.preset.effects.repo}
    vectors, held = training_vectors(at.sae.W_dec)
    found, about = load(resolve(chosen), vectors)
    again = resolve(chosen).with_suffix(".repeat1.safetensors")
    return found, held[: len(found.scales)], load(again, vectors[held])[0] if Path(again).exists() else None, about


def approximator(at: Place, fit: str, found: Effects, held: Bool[Tensor, " n"], *, seed: int = 0) -> Approximator:
    """Return a place's effect approximator: "ridge" or "adam", fitted on effects not held out, or "hub", as published."""
    if fit == "hub":
        return adapter(at.lab.preset)
    if fit not in ("ridge", "adam"):
        raise ValueError(f"fit: expected ridge, adam or hub, got {fit!r}")
    x, y = found.vectors[~held], found.effects[~held]
    return fit_ridge(x, y, seed=seed)[0] if fit == "ridge" else fit_adam(x, y, seed=seed)

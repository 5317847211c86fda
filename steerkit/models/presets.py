"""Presets: which model, which SAEs belong to it, and what both need; read strictly from data/models.yaml."""

import difflib
import re
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from steerkit.files import DATA
from steerkit.typed import STRICT, read_yaml


def _span(layers):
    """Return the layers of a range such as 0-25; what is no text stays as it is."""
    if not isinstance(layers, str):
        return layers
    if not (ends := re.fullmatch(r"(\d+)-(\d+)", layers)):
        raise ValueError(f"expected a list or a range such as 0-25, got {layers!r}")
    return list(range(int(ends[1]), int(ends[2]) + 1))


@dataclass(frozen=True, config=STRICT)
class Package:
    """A model file inside a wheel: package name, exact version, sha256 of the wheel, the file's path in the wheel."""

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, config=STRICT)
class SaeSet:
    """SAEs by layer: a sae_lens `release` or a `folder`, and the id of each layer's SAE (see data/models.yaml)."""

    id: str
    layers: Annotated[list[int], BeforeValidator(_span)]
    release: str | None = None
    folder: str | None = None
    ids: dict[int, str] = field(default_factory=dict)
    expect: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self):
        if (self.release is None) == (self.folder is None):
            raise ValueError("expected either `release` or `folder`, got both or neither")
        if bad := [found for found in self.expect.values() if set(found) != {"fvu", "l0"}]:
            raise ValueError(f"expect: expected fvu and l0 for each layer, got {bad[0]}")

    def sae_id(self, layer: int) -> str:
        """Return the id of one layer's SAE."""
        return self.ids.get(layer) or self.id.format(layer=layer, next=layer + 1)

    def published_l0(self, layer: int) -> float | None:
        """Return the L0 that sae_lens's registry or the SAE's path states, None where neither does."""
        if self.release is None:
            return None
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        entry, name = get_pretrained_saes_directory()[self.release], self.sae_id(layer)
        in_path = re.search(r"l0_(\d+)", entry.saes_map[name])
        return entry.expected_l0[name] or (float(in_path[1]) if in_path else None)


@dataclass(frozen=True, config=STRICT)
class Needs:
    """What a preset needs: GPU memory, disk, and whether a licence must be accepted on the hub."""

    vram_gb: float
    disk_gb: float
    gated: bool


@dataclass(frozen=True, config=STRICT)
class EffectFiles:
    """Published effects of steering vectors (SAE-TS): a hub data set and its two files."""

    repo: str
    adapter: str
    effects: str


@dataclass(frozen=True, config=STRICT)
class Preset:
    """One entry of data/models.yaml; the first of `saes` is the default set."""

    primary_layer: int
    dtype: str
    bos: str
    saes: Annotated[dict[str, SaeSet], Field(min_length=1)]
    needs: Needs
    outlier: float
    hub: str | None = None
    package: Package | None = None
    effects: EffectFiles | None = None
    name: str = ""  # the entry's key

    def __post_init__(self):
        if (self.hub is None) == (self.package is None):
            raise ValueError("expected either `hub` or `package`, got both or neither")
        if self.primary_layer not in self.layers:
            raise ValueError(f"primary_layer: expected one of {self.layers}, got {self.primary_layer}")

    @property
    def layers(self) -> list[int]:
        """Layers that have an SAE in the default set."""
        return self.sae_set().layers

    def layer(self, asked: int = -1) -> int:
        """Return the layer asked for, or the primary one for -1; ValueError for a layer without an SAE."""
        if asked != -1 and asked not in self.layers:
            raise ValueError(f"{self.name}: expected a layer with an SAE, {self.layers}, or -1 for the preset's own, got {asked}")
        return self.primary_layer if asked == -1 else asked

    def sae_set(self, name: str | Path | None = None) -> SaeSet:
        """Return a named SAE set, the default one for None; a path is a folder of one's own SAEs, layer_N."""
        if isinstance(name, Path):
            layers = sorted(int(p.name.removeprefix("layer_")) for p in name.glob("layer_*") if p.name[6:].isdigit())
            if not layers:
                raise ValueError(f"{name}: expected a folder of SAEs named layer_<number>, got none: check the path, or train some first")
            return SaeSet(id="layer_{layer}", layers=layers, folder=str(name))
        if name is not None and name not in self.saes:
            raise ValueError(f"{self.name}: expected an SAE set of {', '.join(self.saes)}, got {name!r}")
        return self.saes[name or next(iter(self.saes))]


def presets(path: str | Path = DATA / "models.yaml") -> dict[str, Preset]:
    """Return all presets by name; ValueError for an unknown key, a missing key or a wrong type in the file."""
    return {name: replace(found, name=name) for name, found in read_yaml(path, dict[str, Preset]).items()}


def preset(name: str) -> Preset:
    """Return one preset; ValueError names the nearest one and all. Example: `preset("gpt2-small").primary_layer`."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown preset {name!r}.{hint} Presets: {', '.join(known)}")
    return known[name]

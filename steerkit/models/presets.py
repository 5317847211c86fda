"""Presets: which model, which SAEs belong to it, and what both need; read strictly from data/models.yaml."""

import difflib
import re
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from steerkit.files import DATA


@dataclass(frozen=True)
class Package:
    """A model file inside a wheel: package name, exact version, sha256 of the wheel, the file's path in the wheel."""

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class SaeSet:
    """SAEs by layer: a sae_lens `release` or a `folder`, and the id of each layer's SAE (see data/models.yaml)."""

    id: str
    layers: list[int]
    release: str | None = None
    folder: str | None = None
    ids: dict[int, str] = field(default_factory=dict)
    expect: dict[int, dict[str, float]] = field(default_factory=dict)

    def sae_id(self, layer: int) -> str:
        """Return the id of one layer's SAE."""
        return self.ids.get(layer) or self.id.format(layer=layer, next=layer + 1)

    def published_l0(self, layer: int) -> float | None:
        """Return the L0 that sae_lens's registry or the SAE's path states, None where neither does."""
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        if self.release is None:
            return None
        entry, name = get_pretrained_saes_directory()[self.release], self.sae_id(layer)
        in_path = re.search(r"l0_(\d+)", entry.saes_map[name])
        return entry.expected_l0[name] or (float(in_path[1]) if in_path else None)


@dataclass(frozen=True)
class Needs:
    """What a preset needs: GPU memory, disk, and whether a licence must be accepted on the hub."""

    vram_gb: float
    disk_gb: float
    gated: bool


@dataclass(frozen=True)
class EffectFiles:
    """Published effects of steering vectors (SAE-TS): a hub data set and its two files."""

    repo: str
    adapter: str
    effects: str


@dataclass(frozen=True)
class Preset:
    """One entry of data/models.yaml; the first of `saes` is the default set."""

    name: str
    primary_layer: int
    dtype: str
    bos: str
    saes: dict[str, SaeSet]
    needs: Needs
    outlier: float
    hub: str | None = None
    package: Package | None = None
    effects: EffectFiles | None = None

    @property
    def layers(self) -> list[int]:
        """Layers that have an SAE in the default set."""
        return self.sae_set().layers

    def layer(self, asked: int = -1) -> int:
        """Return the layer asked for, or the primary one for -1; ValueError for a layer without an SAE."""
        if asked != -1 and asked not in self.layers:
            raise ValueError(f"{self.name}: expected a layer with an SAE, {self.layers}, or -1 for the preset's own, got {asked}")
        return self.primary_layer if asked == -1 else asked

    def sae_set(self, name: str | None = None) -> SaeSet:
        """Return a named SAE set, the default one for None."""
        if name is not None and name not in self.saes:
            raise ValueError(f"{self.name}: expected an SAE set of {', '.join(self.saes)}, got {name!r}")
        return self.saes[name or next(iter(self.saes))]


def _fits(value, hint) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    return type(value) in ((int, float) if hint is float else (hint,))


def _build(cls, raw, where: str):
    """Make dataclass `cls` from a yaml mapping; unknown or missing key or wrong type is a ValueError that names it."""
    known, hints = {f.name: f for f in fields(cls)}, typing.get_type_hints(cls)
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: expected keys {sorted(required)}, got {raw!r}")
    if wrong := set(raw) - set(known) or required - set(raw):
        kind = "unknown" if wrong - set(known) else "missing"
        raise ValueError(f"{where}: {kind} key {', '.join(sorted(map(str, wrong)))}; known keys: {', '.join(known)}")
    for key, value in raw.items():
        if not _fits(value, hints[key]):
            raise ValueError(f"{where}.{key}: expected {hints[key]}, got {value!r}")
    return cls(**raw)


def _build_set(raw, where: str) -> SaeSet:
    if isinstance(raw, dict) and isinstance(span := raw.get("layers"), str):
        if not (ends := re.fullmatch(r"(\d+)-(\d+)", span)):
            raise ValueError(f"{where}.layers: expected a list or a range such as 0-25, got {span!r}")
        raw = raw | {"layers": list(range(int(ends[1]), int(ends[2]) + 1))}
    made = _build(SaeSet, raw, where)
    if (made.release is None) == (made.folder is None):
        raise ValueError(f"{where}: expected either `release` or `folder`, got both or neither")
    if bad := [x for x in made.expect.values() if set(x) != {"fvu", "l0"}]:
        raise ValueError(f"{where}.expect: expected fvu and l0 for each layer, got {bad[0]}")
    return made


def presets(path: str | Path = DATA / "models.yaml") -> dict[str, Preset]:
    """Return all presets by name; ValueError for an unknown key, a missing key or a wrong type in the file."""
    found = {}
    for name, raw in yaml.safe_load(Path(path).read_text()).items():
        if not (isinstance(raw, dict) and isinstance(raw.get("saes"), dict) and raw["saes"]):
            raise ValueError(f"{name}: expected a mapping with at least one SAE set under `saes`, got {raw!r}")
        nested = {"name": name, "saes": {str(k): _build_set(v, f"{name}.saes.{k}") for k, v in raw["saes"].items()}}
        for key, cls in (("needs", Needs), ("package", Package), ("effects", EffectFiles)):
            if key in raw:
                nested[key] = _build(cls, raw[key], f"{name}.{key}")
        found[name] = _build(Preset, raw | nested, name)
        if (found[name].hub is None) == (found[name].package is None):
            raise ValueError(f"{name}: expected either `hub` or `package`, got both or neither")
        if (primary := found[name].primary_layer) not in found[name].layers:
            raise ValueError(f"{name}.primary_layer: expected one of {found[name].layers}, got {primary}")
    return found


def preset(name: str) -> Preset:
    """Return one preset; ValueError names the nearest one and all. Example: `preset("gpt2-small").primary_layer`."""
    known = presets()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown preset {name!r}.{hint} Presets: {', '.join(known)}")
    return known[name]

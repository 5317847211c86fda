"""What is done to a residual stream: Add, Boost and Ablate, for one vector or one a row."""

import copy
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.inputs import Array, Number, Whole, per_row, tensor, whole


def _direction(name: str, vector) -> Tensor:
    vector = tensor(name, vector)
    vector = vector if vector.is_floating_point() else vector.float()
    if vector.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [d_model] or [rows, d_model], got {list(vector.shape)}")
    return vector


def _set(edit: "Edit", **values) -> None:
    for name, value in values.items():
        object.__setattr__(edit, name, value)


def _with(edit: "Edit", **values) -> "Edit":
    """Return a copy with other values that need no check: they come from checked ones, and a decode step makes such copies."""
    new = copy.copy(edit)
    _set(new, **values)
    return new


@dataclass(frozen=True)
class Add:
    """Add scale x vector: h'[t] = h[t] + scale * v (SAE-TS section 3, CAA; CorrSteer with v = W_dec[i], scale = coefficient).

    vector: [d_model], or [rows, d_model] for one vector a row; taken as it is, so pass a unit vector for `scale` to be
    the norm of what is added. scale: a number, or [rows]. Zero scale leaves a row bitwise unchanged.
    Raises ValueError for NaN or infinity in either.

    >>> Add(layer=13, vector=torch.ones(4) / 2, scale=3.0).delta(torch.zeros(1, 2, 4)).norm(dim=-1).tolist()
    [[3.0, 3.0]]
    """

    layer: Whole
    vector: Float[Tensor, "*rows d_model"] | Array
    scale: Number | Float[Tensor, " rows"] | Array = 1.0

    def __post_init__(self) -> None:
        vector = _direction("Add.vector", self.vector)
        _set(self, layer=whole("Add.layer", self.layer), vector=vector, scale=per_row("Add.scale", self.scale))

    @property
    def pushes(self) -> bool:
        """Whether it can change anything: not at scale 0."""
        return bool(torch.as_tensor(self.scale).any() and self.vector.any())

    def rows(self, index: Int[Tensor, " n"]) -> "Add":
        """Return the edit for a selection of rows."""
        return _with(self, vector=_take(self.vector, index, 1), scale=_take(self.scale, index, 0))

    def delta(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what is to be added, [batch, pos, d_model]."""
        _same_rows("Add", len(resid), self.vector if self.vector.ndim == 2 else None, self.scale)
        step = self.vector.to(resid) * _column(self.scale, resid)
        return (step if step.ndim == 1 else step[:, None]).expand_as(resid)


@dataclass(frozen=True)
class Boost:
    """Add s x a_max x W_dec[i], a_max read live at each position (output scores, eqs. 5-6, as released).

    a_max is the strongest feature of `sae` at the position that is pushed, so a text gets the same push with a KV cache
    and without. Use it with window="last": the last prompt token and every generated one, which are the positions that
    the released code touches. feature and factor: a number, or [rows].
    Equal to encode, add s * a_max to feature i, decode, add the reconstruction error back.
    """

    layer: Whole
    sae: nn.Module
    feature: Whole | Int[Tensor, " rows"] | Array
    factor: Number | Float[Tensor, " rows"] | Array = 10.0

    def __post_init__(self) -> None:
        feature = per_row("Boost.feature", self.feature)
        ids = torch.as_tensor(feature)
        if ids.is_floating_point() or ((ids < 0) | (ids >= self.sae.W_dec.shape[0])).any():
            raise ValueError(f"Boost.feature: expected whole numbers from 0 to {self.sae.W_dec.shape[0] - 1}, got {ids.tolist()}")
        _set(self, layer=whole("Boost.layer", self.layer), feature=feature, factor=per_row("Boost.factor", self.factor))

    @property
    def pushes(self) -> bool:
        """Whether it can change anything: not with factor 0."""
        return bool(torch.as_tensor(self.factor).any())

    def rows(self, index: Int[Tensor, " n"]) -> "Boost":
        """Return the edit for a selection of rows."""
        return _with(self, feature=_take(self.feature, index, 0), factor=_take(self.factor, index, 0))

    def delta(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what is to be added, [batch, pos, d_model]."""
        _same_rows("Boost", len(resid), self.feature, self.factor)
        rows = self.sae.W_dec.detach()
        read = resid.to(rows.device, self.sae.dtype)
        # column by column: the activations of a long prompt do not fit in memory at once
        a_max = torch.stack([self.sae.encode(read[:, t]).amax(-1) for t in range(read.shape[1])], 1).to(resid)  # [batch, pos]
        feature = self.feature.to(rows.device) if isinstance(self.feature, Tensor) else self.feature
        step, factor = rows[feature].to(resid), _column(self.factor, resid)
        return (step if step.ndim == 1 else step[:, None]) * a_max[..., None] * (factor[:, None] if factor.ndim else factor)


@dataclass(frozen=True)
class Ablate:
    """Remove a direction: h' = h - (h . u) u, with u the unit vector along `vector`, [d_model] or [rows, d_model]."""

    layer: Whole
    vector: Float[Tensor, "*rows d_model"] | Array
    strict: bool = True  # False lets a zero row stand for "this row is left alone"

    def __post_init__(self) -> None:
        _set(self, layer=whole("Ablate.layer", self.layer), vector=_direction("Ablate.vector", self.vector))
        if (self.vector.norm(dim=-1) == 0).any() and self.strict:
            raise ValueError("Ablate.vector: expected a direction, got a zero vector")

    @property
    def pushes(self) -> bool:
        """Whether it can change anything: not where every row is left alone."""
        return bool(self.vector.any())

    def rows(self, index: Int[Tensor, " n"]) -> "Ablate":
        """Return the edit for a selection of rows."""
        return _with(self, vector=_take(self.vector, index, 1))

    def delta(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what is to be added, [batch, pos, d_model]."""
        unit = nn.functional.normalize(self.vector.to(resid), dim=-1)
        unit = unit if unit.ndim == 1 else unit[:, None]
        return -(resid * unit).sum(-1, keepdim=True) * unit


Edit = Add | Boost | Ablate


def on(edit: Edit, device: torch.device) -> Edit:
    """Return the edit with its own tensors on a device, so that they do not travel at every call."""
    held = {f.name: getattr(edit, f.name) for f in fields(edit)}
    return _with(edit, **{name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)})


def _same_rows(name: str, batch: int, *values) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.ndim and len(value) != batch:
            raise ValueError(f"{name}: expected one entry a row, {batch} rows in this call, got {len(value)}")


def _take(value, index: Tensor, vector_dims: int):
    """Select rows of a per-row value; a shared value is returned as it is."""
    return value[index.to(value.device)] if isinstance(value, Tensor) and value.ndim > vector_dims else value


def _column(value, like: Tensor):
    value = torch.as_tensor(value).to(like)
    return value[:, None] if value.ndim else value

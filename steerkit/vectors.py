"""A `SteeringVector`, and the recipes that make one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from steerkit.engine.edits import Add
from steerkit.engine.lab import Place
from steerkit.features import read, token_batches
from steerkit.files import write_atomic
from steerkit.inputs import Array, Number, Whole, jsonable, number, strings, tensor, whole


@dataclass(frozen=True)
class SteeringVector:
    """A unit direction in the residual stream after block `layer`, with where it fits and how it was made.

    `weight` multiplies the scale (1.0 for a recipe's result), so that sums keep their proportions:
    `0.5 * love + wedding`. Whatever is given as `direction` [d_model] (a tensor, an array, a row or column of a matrix) is
    copied and normalised.

    Raises ValueError for a zero vector, NaN or infinity, or a sum over two layers or presets.

    >>> v = SteeringVector("demo", torch.tensor([3.0, 4.0]), layer=0, preset="none")
    >>> v.direction.tolist(), (-v).cosine(v)
    ([0.6000000238418579, 0.800000011920929], -1.0)
    """

    name: str
    direction: Float[Tensor, " d_model"] | Array
    layer: Whole
    preset: str
    made: dict = field(default_factory=dict)
    weight: Number = 1.0

    def __post_init__(self) -> None:
        given = self.direction if isinstance(self.direction, Tensor) else tensor(self.name, self.direction)
        vector = given.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)  # its own, whoever writes to the rest
        for name, plain in {"layer": whole, "weight": number}.items():
            object.__setattr__(self, name, plain(f"{self.name}.{name}", getattr(self, name)))
        if vector.ndim != 1:
            raise ValueError(f"{self.name}: expected a direction of shape [d_model], got {list(vector.shape)}")
        if not torch.isfinite(vector).all():
            raise ValueError(f"{self.name}: expected finite numbers, got {int((~torch.isfinite(vector)).sum())} NaN or infinite entries")
        if (norm := vector.norm()) == 0:
            raise ValueError(f"{self.name}: expected a direction, got a zero vector")
        if abs(float(norm) - 1) > 1e-6:  # a unit vector keeps its bits through save and load
            vector = vector / norm
        object.__setattr__(self, "direction", vector)

    @property
    def hook(self) -> str:
        """The TransformerLens name of the place."""
        return f"blocks.{self.layer}.hook_resid_post"

    __array_ufunc__ = None  # a numpy number times a vector asks the vector

    def edit(self, scale: Number | Tensor) -> Add:
        """Return the edit that adds this vector with norm `scale` x `weight`, in residual units."""
        return Add(self.layer, self.direction, number(f"{self.name}: scale", scale) * self.weight)

    def __mul__(self, factor: Number | Tensor) -> "SteeringVector":
        factor = number(f"{self.name}: factor", factor)
        sign = 1 if factor >= 0 else -1
        return replace(self, direction=sign * self.direction, weight=abs(factor) * self.weight, name=f"{factor:g} {self.name}")

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return replace(self, direction=-self.direction, name=f"-{self.name}")

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        self._same_place(other)
        total = self.weight * self.direction + other.weight * other.direction
        return replace(
            self,
            name=f"{self.name} + {other.name}",
            direction=total,
            weight=float(total.norm()),
            made={"sum of": [self.made | {"name": self.name}, other.made | {"name": other.name}]},
        )

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + (-other)

    def cosine(self, other: "SteeringVector") -> float:
        """Return the cosine between two directions."""
        self._same_place(other)
        return float(self.direction.double() @ other.direction.double())

    def _same_place(self, other: "SteeringVector") -> None:
        mine, theirs = (self.preset, self.layer, len(self.direction)), (other.preset, other.layer, len(other.direction))
        if mine != theirs:
            raise ValueError(f"expected vectors of one place (preset, layer, width), got {mine} and {theirs}")

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: the direction, and the rest as metadata."""
        about = {
            "name": self.name,
            "layer": self.layer,
            "preset": self.preset,
            "made": self.made,
            "weight": self.weight,
        }
        return write_atomic(path, to_bytes({"direction": self.direction}, {"steering_vector": json.dumps(about, default=jsonable)}))

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a vector written by `save`."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["steering_vector"])
                return cls(direction=file.get_tensor("direction"), **about)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected a steering vector written by SteeringVector.save, got {error}: make it again") from error


def sae_row(at: Place, features: Whole | Tensor | Iterable | Mapping, *, name: str = "SAE row") -> SteeringVector:
    """Return the SAE decoder row of a feature, or the weighted sum of several, normalised (SAE-TS section 5, baseline "SAE").

    v = norm(sum_i w_i W_dec[i]). features: one, several of weight 1, or weights by feature (a dict or a pandas Series).
    """
    if hasattr(features, "items"):
        weights = {whole("features", i): number("features", w) for i, w in features.items()}
    else:
        weights = {whole("features", i): 1.0 for i in (features if np.ndim(features) else [features])}
    W_dec = at.sae.W_dec.detach()
    d_sae = len(W_dec)
    if bad := [i for i in weights if not 0 <= i < d_sae]:
        raise ValueError(f"features: expected 0 to {d_sae - 1}, got {bad}")
    direction = sum(w * W_dec[i] for i, w in weights.items())
    made = {"method": "sae_row", "features": {str(k): v for k, v in weights.items()}}
    return SteeringVector(name, direction, at.layer, at.preset, made)


def caa(
    at: Place, contrast: tuple[Iterable[str], Iterable[str]], *, name: str = "CAA", include_first: bool = False
) -> SteeringVector:
    """Return the contrastive activation vector: mean over positive prompts minus mean over negative prompts, normalised.

    v = norm(mean_p mean_t h[t] - mean_n mean_t h[t]), as SAE-TS computes it, over each prompt's ordinary positions.
    SAE-TS averages over the beginning-of-text token too (include_first=True). Where that token's norm is a hundred
    times the others', as in the embedded model, it would turn prompt length into the main difference; hence the default.
    contrast: the positive and the negative prompts, such as a concept's `contrast`.
    """
    positive, negative = (strings(side, prompts) for side, prompts in zip(("positive", "negative"), contrast, strict=True))
    if not positive or not negative:
        raise ValueError(f"expected at least one positive and one negative prompt, got {len(positive)} and {len(negative)}")

    def mean(prompts: list[str]) -> Float[Tensor, " d_model"]:
        total = []
        for ids, mask in token_batches(at.tokenizer, prompts):
            resid, keep = read(at, ids, mask, include_first=include_first)
            total.append((resid.float() * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp_min(1))
        return torch.cat(total).mean(0)

    made = {"method": "caa", "positive": len(positive), "negative": len(negative), "include_first": include_first}
    return SteeringVector(name, mean(positive) - mean(negative), at.layer, at.preset, made)


def random_direction(at: Place, *, seed: Whole = 0) -> SteeringVector:
    """Return a direction drawn uniformly from the sphere: the control of equal norm."""
    seed = whole("seed", seed)
    draw = torch.randn(at.d_model, generator=torch.Generator().manual_seed(seed))
    return SteeringVector("random direction", draw, at.layer, at.preset, {"method": "random", "seed": seed})

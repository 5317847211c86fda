"""Where and how much a residual stream is changed, and the receipt that proves it.

One torch forward hook per steered block. Positions are absolute: the first real token of a row is position 0, whatever
its padding, and a token fed through a KV cache keeps its place.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from steerkit.receipt import Receipt

WINDOWS = ("all", "prompt", "last", "generated")
BLOCK_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "transformer.h",
    "gpt_neox.layers",
)


def _direction(name: str, vector: Tensor) -> Tensor:
    if not torch.isfinite(vector).all():
        raise ValueError(f"{name}: expected finite numbers, got {int((~torch.isfinite(vector)).sum())} NaN or infinite entries")
    if vector.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape [d_model] or [rows, d_model], got {list(vector.shape)}")
    return vector


@dataclass(frozen=True)
class Add:
    """Add scale x vector: h'[t] = h[t] + scale * v (SAE-TS section 3, CAA; CorrSteer with v = W_dec[i], scale = coefficient).

    vector: [d_model], or [rows, d_model] for one vector a row; taken as it is, so pass a unit vector for `scale` to be
    the norm of what is added. scale: a number, or [rows]. Zero scale leaves a row bitwise unchanged.

    >>> Add(layer=13, vector=torch.ones(4) / 2, scale=3.0).delta(torch.zeros(1, 2, 4)).norm(dim=-1).tolist()
    [[3.0, 3.0]]
    """

    layer: int
    vector: Float[Tensor, "*rows d_model"]
    scale: float | Float[Tensor, " rows"] = 1.0

    def __post_init__(self) -> None:
        _direction("Add.vector", self.vector)

    def rows(self, index: Int[Tensor, " n"]) -> "Add":
        """Return the edit for a selection of rows."""
        return Add(self.layer, _take(self.vector, index, 1), _take(self.scale, index, 0))

    def delta(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what is to be added, [batch, pos, d_model]."""
        _same_rows("Add", len(resid), self.vector if self.vector.ndim == 2 else None, self.scale)
        step = self.vector.to(resid) * _column(self.scale, resid)
        return (step if step.ndim == 1 else step[:, None]).expand_as(resid)


@dataclass(frozen=True)
class Boost:
    """Add s x a_max x W_dec[i], a_max read live at the last position (output scores, eqs. 5-6, as released).

    a_max is the strongest feature of `sae` at the last position of this call, one number a row. Use it with
    window="last": the last prompt token and every generated one. feature and factor: a number, or [rows].
    Equal to encode, add s * a_max to feature i, decode, add the reconstruction error back.
    """

    layer: int
    sae: nn.Module
    feature: int | Int[Tensor, " rows"]
    factor: float | Float[Tensor, " rows"] = 10.0

    def __post_init__(self) -> None:
        ids = torch.as_tensor(self.feature)
        if ((ids < 0) | (ids >= self.sae.W_dec.shape[0])).any():
            raise ValueError(f"Boost.feature: expected 0 to {self.sae.W_dec.shape[0] - 1}, got {ids.tolist()}")

    def rows(self, index: Int[Tensor, " n"]) -> "Boost":
        """Return the edit for a selection of rows."""
        return Boost(self.layer, self.sae, _take(self.feature, index, 0), _take(self.factor, index, 0))

    def delta(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what is to be added, [batch, pos, d_model]."""
        _same_rows("Boost", len(resid), self.feature, self.factor)
        a_max = self.sae.encode(resid[:, -1].to(self.sae.dtype)).amax(-1, keepdim=True).to(resid)  # [batch, 1]
        step = self.sae.W_dec[self.feature].detach().to(resid) * a_max * _column(self.factor, resid)
        return step[:, None].expand_as(resid)


@dataclass(frozen=True)
class Ablate:
    """Remove a direction: h' = h - (h . u) u, with u the unit vector along `vector`, [d_model] or [rows, d_model]."""

    layer: int
    vector: Float[Tensor, "*rows d_model"]
    strict: bool = True  # False lets a zero row stand for "this row is left alone"

    def __post_init__(self) -> None:
        if (_direction("Ablate.vector", self.vector).norm(dim=-1) == 0).any() and self.strict:
            raise ValueError("Ablate.vector: expected a direction, got a zero vector")

    def rows(self, index: Int[Tensor, " n"]) -> "Ablate":
        """Return the edit for a selection of rows."""
        return Ablate(self.layer, _take(self.vector, index, 1), self.strict)

    def delta(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return what is to be added, [batch, pos, d_model]."""
        unit = nn.functional.normalize(self.vector.to(resid), dim=-1)
        unit = unit if unit.ndim == 1 else unit[:, None]
        return -(resid * unit).sum(-1, keepdim=True) * unit


Edit = Add | Boost | Ablate


def _same_rows(name: str, batch: int, *values) -> None:
    for value in values:
        if isinstance(value, Tensor) and value.ndim and len(value) != batch:
            raise ValueError(f"{name}: expected one entry a row, {batch} rows in this call, got {len(value)}")


def _take(value, index: Tensor, vector_dims: int):
    """Select rows of a per-row value; a shared value is returned as it is."""
    return value[index.to(value.device)] if isinstance(value, Tensor) and value.ndim > vector_dims else value


def _on(edit: Edit, device: torch.device) -> Edit:
    tensors = {f.name: getattr(edit, f.name) for f in fields(edit) if isinstance(getattr(edit, f.name), Tensor)}
    return replace(edit, **{name: tensor.to(device) for name, tensor in tensors.items()})


def _column(value, like: Tensor):
    value = torch.as_tensor(value).to(like)
    return value[:, None] if value.ndim else value


def residual_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks of a Hugging Face causal LM; the output of block L is `blocks.L.hook_resid_post`."""
    for path in BLOCK_PATHS:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise ValueError(f"no decoder blocks found in {type(model).__name__}: expected one of {', '.join(BLOCK_PATHS)}")


def selected_positions(
    real: Bool[Tensor, "batch pos"], start: Int[Tensor, " batch"], prompt_length: Int[Tensor, " batch"], window: str
) -> Bool[Tensor, "batch pos"]:
    """Mark the positions of this call that lie in the window.

    real: False on pads. start: absolute position of the first real token in this call. prompt_length: real prompt
    tokens a row. "last" is the last prompt token and everything after it.
    """
    position = start[:, None] + real.long().cumsum(1) - 1
    last = prompt_length[:, None] - 1
    inside = {"all": position >= 0, "prompt": position <= last, "last": position >= last, "generated": position > last}
    return inside[window] & real


@contextmanager
def steering(
    model: nn.Module,
    edits: Edit | Iterable[Edit],
    *,
    window: str = "all",
    skip_first: bool = False,
    prompt_length: Int[Tensor, " batch"] | int | None = None,
    record: bool = True,
    tokenizer=None,
) -> Iterator[Receipt]:
    """Steer `model` (a Hugging Face causal LM) while the context is open; yield the receipt.

    window: "all", "prompt", "last" (last prompt token and after) or "generated". skip_first leaves position 0 (the
    beginning-of-text token) alone. prompt_length: real tokens of each prompt; by default what the first call feeds.
    The hook reads the attention mask and the cache length of each call, so left pads are never touched and positions
    are right with and without a KV cache. Nothing is written in place, and the hooks go when the context ends, also
    by an exception. record=False skips the receipt's norms. tokenizer lets the receipt show text.

    Raises ValueError for an unknown window, a layer the model lacks, or a vector whose width is not d_model.

    >>> with steering(model, Add(13, unit, 60.0), window="generated") as receipt:   # doctest: +SKIP
    ...     model.generate(**inputs)
    >>> receipt                                                                     # doctest: +SKIP
    """
    receipt = Receipt(tokenizer)
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    with attached(
        model,
        Steering(
            edits,
            window=window,
            skip_first=skip_first,
            prompt_length=prompt_length,
            receipt=receipt if record else None,
        ),
    ):
        yield receipt


@contextmanager
def attached(model: nn.Module, steering: "Steering") -> Iterator[None]:
    """Hang the hooks of `steering` on `model` while the context is open."""
    check_edits(model, steering.edits)
    blocks, device = residual_blocks(model), next(model.parameters()).device
    steering.edits = [_on(edit, device) for edit in steering.edits]  # once, not at every call
    with ExitStack() as stack:
        stack.callback(model.base_model.register_forward_pre_hook(steering.enter, with_kwargs=True).remove)
        for layer in sorted({edit.layer for edit in steering.edits}):
            stack.callback(blocks[layer].register_forward_hook(steering.hook(layer)).remove)
        yield


def check_edits(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Raise ValueError when an edit names a layer that the model lacks or has the wrong width."""
    n_layers, d_model = len(residual_blocks(model)), model.get_input_embeddings().weight.shape[1]
    for edit in edits:
        if not 0 <= edit.layer < n_layers:
            raise ValueError(f"layer: expected 0 to {n_layers - 1} for this model, got {edit.layer}")
        width = (edit.sae.W_dec if isinstance(edit, Boost) else edit.vector).shape[-1]
        if width != d_model:
            raise ValueError(f"{type(edit).__name__}: expected width {d_model} (d_model), got {width}: made for another model?")


class Steering:
    """The edits of a batch, and what the hooks know of the forward call in progress: which positions it feeds."""

    def __init__(self, edits: list[Edit], *, window: str = "all", skip_first: bool = False, prompt_length=None, receipt=None):
        if window not in WINDOWS:
            raise ValueError(f"window: expected one of {', '.join(WINDOWS)}, got {window!r}")
        if window in ("all", "prompt") and any(isinstance(edit, Boost) for edit in edits):
            raise ValueError(f'window: Boost reads a_max at the last position of a call; expected "last" or "generated", got "{window}"')
        self.edits, self.window, self.skip_first = edits, window, skip_first
        self.prompt_length, self.receipt, self.selected = prompt_length, receipt, None

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep, drop or repeat rows, as the decode does when it spreads prompts over samples and drops finished rows."""
        self.edits = [edit.rows(index) for edit in self.edits]
        if isinstance(self.prompt_length, Tensor):
            self.prompt_length = self.prompt_length[index]
        if self.receipt is not None:
            self.receipt.select(index)

    def enter(self, _module, args, kwargs) -> None:
        """Read the cache length and the attention mask of this call."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"][..., 0] if ids is None else ids
        batch, length = ids.shape[:2]
        cache = kwargs.get("past_key_values")
        before = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        mask = torch.ones(batch, before + length, device=ids.device) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.shape != (batch, before + length):
            raise ValueError(
                f"attention_mask: expected {[batch, before + length]} (cache and call), got {list(getattr(mask, 'shape', [type(mask)]))}"
            )
        real = mask.bool()
        start = real[:, :before].sum(1)
        self.real = real[:, before:]
        if self.prompt_length is None:
            self.prompt_length = start + self.real.sum(1)
        prompt = torch.as_tensor(self.prompt_length, device=ids.device).expand(batch)
        self.selected = selected_positions(self.real, start, prompt, self.window)
        if self.skip_first:
            self.selected &= (start[:, None] + self.real.long().cumsum(1) - 1) > 0
        if self.receipt is not None:
            self.receipt.open_call(ids if ids.dtype == torch.long else None, self.real, start)

    def hook(self, layer: int):
        """Return the forward hook for one block."""

        def forward_hook(_module, _args, output):
            if self.selected is None:
                raise RuntimeError("the block ran outside its model, so its positions are unknown: call the model, not the block")
            resid = output[0] if isinstance(output, tuple) else output
            if not self.selected.any():
                return None
            steered = resid
            for edit in self.edits:
                if edit.layer == layer:
                    steered = torch.where(self.selected[..., None], steered + edit.delta(steered), steered)
            if self.receipt is not None:
                self.receipt.add(layer, resid, steered)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return forward_hook


def bridge_hooks(edits: Iterable[Edit], selected: Bool[Tensor, "batch pos"]) -> list[tuple[str, object]]:
    """Return (hook name, function) pairs that steer the same way through TransformerBridge's `run_with_hooks`.

    selected: the positions to change, [batch, pos], for example from `selected_positions`. For reading along;
    `steering` is the fast path, and the two are tested equal.
    """

    def at(edit: Edit):
        def hook(resid, hook=None):  # TransformerLens passes `hook` by name
            return torch.where(selected[..., None], resid + edit.delta(resid), resid)

        return hook

    return [(f"blocks.{edit.layer}.hook_resid_post", at(edit)) for edit in edits]

"""Where and how much a residual stream is changed, and the receipt that proves it.

One torch forward hook per steered block. Positions are absolute: the first real token of a row is position 0, whatever
its padding, and a token fed through a KV cache keeps its place.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from steerkit.engine.edits import Ablate, Add, Boost, Edit, on
from steerkit.engine.receipt import Receipt
from steerkit.inputs import Array, Whole, per_row

__all__ = ["Ablate", "Add", "Boost", "Edit", "residual_blocks", "steering"]

WINDOWS = ("all", "prompt", "last", "generated")
BLOCK_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "transformer.h",
    "gpt_neox.layers",
)


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


def real_tokens(mask, ids: Tensor, before: int, config=None) -> Bool[Tensor, "batch seen"]:
    """Mark the real tokens among those in the cache and in this call, from any mask that transformers passes.

    That is [batch, seen], or with a static cache [batch or 1, 1, pos, size] (True or 0 where a query may look), alone or by
    kind of layer: the last query sees all real tokens. ValueError for masks that do not tell, as those of sliding windows.
    """
    shape = (len(ids), before + ids.shape[1])
    mend = "pass the attention mask of shape [batch, tokens], or let the cache grow (no cache_implementation)"
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise ValueError(f"attention_mask: expected one of full attention among {sorted(mask)}, which tells pads from text: {mend}")
        mask, config = mask["full_attention"], None
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=ids.device)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[0] in (1, shape[0]) and mask.shape[-1] >= shape[1]:
        if getattr(config, "sliding_window", None):
            raise ValueError(f"attention_mask: expected one of full attention, got a sliding window's, which hides old text: {mend}")
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = sees[:, 0, -1, : shape[1]].expand(shape)
    if not isinstance(mask, Tensor) or mask.shape != shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected {list(shape)} (cache and call), got {got}: {mend}")
    return mask.bool().to(ids.device)


@contextmanager
def steering(
    lab,
    edits: Edit | Iterable[Edit],
    *,
    window: str = "all",
    skip_first: bool = False,
    prompt_length: Whole | Int[Tensor, " batch"] | Array | None = None,
    record: bool = True,
    tokenizer=None,
) -> Iterator[Receipt]:
    """Steer an open model, a `Lab` or any Hugging Face causal LM, while the context is open; yield the receipt.

    window: "all", "prompt", "last" (last prompt token and after) or "generated". skip_first leaves position 0 (the
    beginning-of-text token) alone. prompt_length: real tokens of each prompt; by default what a call with an empty cache
    feeds, so that one context may serve prompt after prompt (the receipt is the last one's). A call without a cache that
    repeats the one before and adds a single token goes on with that prompt.
    The hook reads the attention mask and the cache length of each call, so left pads are never touched and positions
    are right with and without a KV cache. Nothing is written in place, and the hooks go when the context ends, also
    by an exception. record=False skips the receipt's norms. tokenizer lets the receipt show text; a lab brings its own. A
    compiled model runs uncompiled meanwhile. A warning says so when the context ends and nothing was changed.

    Raises ValueError for an unknown window, a layer the model lacks, a vector whose width is not d_model, lengths that
    are another batch's, or a push that leaves the range of the model's dtype.

    >>> with steering(lab, Add(13, unit, 60.0), window="generated") as receipt:     # doctest: +SKIP
    ...     lab.hf.generate(**inputs)
    >>> receipt                                                                     # doctest: +SKIP
    """
    model, tokenizer = getattr(lab, "hf", lab), tokenizer or getattr(lab, "tokenizer", None)
    receipt = Receipt(tokenizer)
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    settings = {"window": window, "skip_first": skip_first, "prompt_length": prompt_length}
    with attached(model, Steering(edits, receipt=receipt if record else None, **settings)) as run:
        yield receipt
    if any(edit.pushes for edit in edits) and (run.selected is None or (record and not receipt.acted)):
        why = "the model was not called" if run.selected is None else f"no position lay in the window {window!r}, or every push was zero"
        warnings.warn(f"steering changed nothing: {why}", stacklevel=3)


def eager() -> AbstractContextManager:
    """Run compiled models as they are written while the context is open: compiled code leaves out hooks that are hung on later."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def attached(model: nn.Module, steering: "Steering") -> Iterator["Steering"]:
    """Hang the hooks of `steering` on `model` while the context is open."""
    check_edits(model, steering.edits)
    blocks, embedding = residual_blocks(model), model.get_input_embeddings().weight
    where = [next(blocks[edit.layer].parameters(), embedding).device for edit in steering.edits]
    steering.edits = [on(edit, device) for edit, device in zip(steering.edits, where)]  # once, not at every call
    with ExitStack() as stack:
        stack.enter_context(eager())
        stack.callback(model.base_model.register_forward_pre_hook(steering.enter, with_kwargs=True).remove)
        for layer in sorted({edit.layer for edit in steering.edits}):
            stack.callback(blocks[layer].register_forward_hook(steering.hook(layer)).remove)
        yield steering


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
            raise ValueError(f'window: Boost pushes the last prompt token and new ones; expected "last" or "generated", got "{window}"')
        self.edits, self.window, self.skip_first = edits, window, skip_first
        self.given = None if prompt_length is None else per_row("prompt_length", prompt_length)
        self.prompt_length, self.receipt, self.selected = self.given, receipt, None
        self.first, self.before = None, None  # the prompts that lengths were given for; ids of the last call without a cache

    def select(self, index: Int[Tensor, " n"]) -> None:
        """Keep, drop or repeat rows, as the decode does when it spreads prompts over samples and drops finished rows."""
        self.edits = [edit.rows(index) for edit in self.edits]
        if isinstance(self.prompt_length, Tensor):
            self.prompt_length = self.prompt_length[index]
        if self.receipt is not None:
            self.receipt.select(index)

    def enter(self, module, args, kwargs) -> None:
        """Read the cache length and the attention mask of this call."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs["inputs_embeds"][..., 0] if ids is None else ids
        cache = kwargs.get("past_key_values")
        before = int(cache.get_seq_length()) if cache is not None else 0
        real = real_tokens(kwargs.get("attention_mask"), ids, before, getattr(module, "config", None))
        start = real[:, :before].sum(1)
        self.real = real[:, before:]
        if fresh := before == 0 and not self._goes_on(ids, cache):
            self._begin(ids)
        prompt = torch.as_tensor(self.prompt_length, device=ids.device).expand(len(ids))
        self.selected = selected_positions(self.real, start, prompt, self.window)
        if self.skip_first:
            self.selected &= (start[:, None] + self.real.long().cumsum(1) - 1) > 0
        if self.receipt is not None:
            self.receipt.open_call(ids if ids.dtype == torch.long else None, self.real, start, fresh=fresh)

    def _goes_on(self, ids: Tensor, cache) -> bool:
        """Tell a decode without a cache, which feeds the last call's text and one token more, from a new prompt."""
        old, self.before = self.before, ids if cache is None else None
        return old is not None and cache is None and ids.shape[1] == old.shape[1] + 1 and torch.equal(ids[:, :-1], old)

    def _begin(self, ids: Tensor) -> None:
        """Take the lengths of new prompts, or hold those that were given against them."""
        if self.given is None:
            self.prompt_length = self.real.sum(1)
        elif isinstance(self.given, Tensor):
            if len(self.given) != len(ids):
                raise ValueError(f"prompt_length: expected one entry a row, {len(ids)} rows in this call, got {len(self.given)}")
            rows = zip(ids.cpu(), self.real.cpu(), self.given.tolist())  # moved once: a GPU is waited for at every row
            prompts = [row[keep][:n].tolist() for row, keep, n in rows]
            if self.first not in (None, prompts):
                raise ValueError("prompt_length: expected the prompts that it was given for, got others: open one context a batch")
            self.first = prompts

    def hook(self, layer: int):
        """Return the forward hook for one block."""

        def forward_hook(_module, _args, output):
            if self.selected is None:
                raise RuntimeError("the block ran outside its model, so its positions are unknown: call the model, not the block")
            resid = output[0] if isinstance(output, tuple) else output
            selected = self.selected.to(resid.device)
            columns = selected.any(0).tolist()
            if True not in columns:
                return None
            at = columns.index(True)  # what comes before is not even read: a long prompt in front of a window costs nothing
            inside, steered = selected[:, at:, None], resid[:, at:]
            for edit in self.edits:
                if edit.layer == layer:
                    steered = torch.where(inside, steered + edit.delta(steered), steered)
            steered = torch.cat([resid[:, :at], steered], 1) if at else steered
            if self.receipt is not None:
                self.receipt.add(layer, resid, steered)
            return (steered, *output[1:]) if isinstance(output, tuple) else steered

        return forward_hook

"""One batch through the steered decode: what rows share is computed once, noise is keyed, finished rows are dropped."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from steerkit.engine.attention import grouped_attention
from steerkit.engine.packed import packed_linears
from steerkit.engine.receipt import Tally
from steerkit.engine.steer import Edit, Steering, attached, residual_blocks
from steerkit.inputs import Number, Whole, number, whole


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn; temperature 0 is greedy, top_k 0 and top_p 1 are off.

    keep_stop: a stop token is part of the text. allowed: the only tokens that may be drawn (constrained decoding); () is all.
    stop and allowed are sets: they are kept in the order of their ids, so that equal settings have equal keys.
    """

    temperature: Number = 1.0
    top_k: Whole = 0
    top_p: Number = 1.0
    max_new_tokens: Whole = 32
    stop: Iterable[Whole | None] = ()
    seed: Whole = 0
    keep_stop: bool = False
    allowed: Iterable[Whole] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "allowed"):
            object.__setattr__(self, name, tuple(sorted({whole(f"{name} (token ids)", i) for i in getattr(self, name)})))
        for name, plain in {"temperature": number, "top_p": number, "top_k": whole, "max_new_tokens": whole, "seed": whole}.items():
            object.__setattr__(self, name, plain(name, getattr(self, name)))
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(
                "expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and max_new_tokens >= 1, got "
                f"{self.temperature}, {self.top_k}, {self.top_p}, {self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Completion:
    """New tokens of a row (a stop token ends it and is left out, unless kept), positions changed, mean |delta| / |resid|."""

    tokens: list[int]
    changed: int
    ratio: float


class NotFinite(ValueError):
    """Logits that no token may be drawn from. rows: which rows of the batch they belong to."""

    def __init__(self, rows: list[int], step: int, dtype: torch.dtype):
        self.rows, self.what = rows, f"new token {step + 1}: expected finite logits, got NaN or infinity in {dtype}"
        super().__init__(f"rows {rows}, {self.what}: lower the scale, or open the model in float32")


@dataclass(frozen=True)
class Watch:
    """Who is shown the residual stream of the last position after some blocks, at every step of a decode.

    `each(step, rows, stopped, resid)`: the rows still open (numbers within the batch), whether the token just drawn ends
    each of them, and {layer: [rows, d_model]}, with what is added there, or as the blocks put it out where not `steered`.
    Step 0 is the last prompt token's position.
    """

    layers: tuple[int, ...]
    each: Callable[[int, Tensor, Tensor, dict[int, Tensor]], None]
    steered: bool = True


def uniforms(seed: int, rows: Sequence[int], steps: int) -> Float[np.ndarray, "rows steps"]:
    """Return the sampling noise: one uniform a row and step, from a counter generator keyed by (seed, row)."""
    return np.stack([np.random.Generator(np.random.Philox(key=[seed, row])).random(steps) for row in rows])


def draw(
    logits: Float[Tensor, "states vocab"],
    u: Float[Tensor, " rows"],
    sampling: Sampling,
    of: Int[Tensor, " rows"] | slice = slice(None),
) -> Int[Tensor, " rows"]:
    """Draw a token a row by inverting the distribution function at u, after temperature, top-k and top-p.

    of: which row of `logits` each drawn row reads; by default its own. Top-p keeps the smallest set of likeliest tokens
    whose mass reaches p, as Hugging Face does.

    >>> draw(torch.tensor([[0.0, 9.0]]), torch.tensor([0.5]), Sampling()).tolist()
    [1]
    """
    if sampling.allowed:
        some = torch.tensor(sampling.allowed, device=logits.device)
        return some[draw(logits[:, some], u, replace(sampling, allowed=()), of)]
    if sampling.temperature == 0:
        return logits.argmax(-1)[of]
    if sampling.top_k:
        top, ids = logits.float().topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
        probs = _nucleus((top / sampling.temperature).softmax(-1), sampling.top_p)
        return ids[of].gather(-1, _invert(probs, u, of))[:, 0]
    scaled = logits.float() / sampling.temperature
    if sampling.top_p == 1:
        return _invert(scaled.softmax(-1), u, of)[:, 0]
    top, ids = scaled.topk(min(256, scaled.shape[-1]), dim=-1)
    probs = (top - scaled.logsumexp(-1, keepdim=True)).exp()
    chosen = ids[of].gather(-1, _invert(_nucleus(probs, sampling.top_p), u, of))[:, 0]
    flat = (probs.sum(-1) < sampling.top_p)[of].nonzero()[:, 0]
    if len(flat):  # few rows, and only they need the whole vocabulary sorted
        probs, ids = scaled[of][flat].softmax(-1).sort(-1, descending=True)
        chosen[flat] = ids.gather(-1, _invert(_nucleus(probs, sampling.top_p), u[flat]))[:, 0]
    return chosen


def _nucleus(probs: Float[Tensor, "rows n"], top_p: float) -> Float[Tensor, "rows n"]:
    """Zero what comes after the smallest set of likeliest tokens whose mass reaches top_p; probs fall along a row."""
    return probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)


def _invert(
    probs: Float[Tensor, "states n"], u: Float[Tensor, " rows"], of: Int[Tensor, " rows"] | slice = slice(None)
) -> Int[Tensor, "rows 1"]:
    cumulative = probs.double().cumsum(-1)[of]
    target = u.to(cumulative)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    last = (probs > 0).long().cumsum(-1).argmax(-1, keepdim=True)[of]  # u rounds to 1: stay on the last possible token
    return torch.minimum(index, last)


@torch.inference_mode()
def decode(
    model: nn.Module,
    prompts: Sequence[list[int]],
    edits: list[Edit],
    *,
    rows: Sequence[int],
    arm: Sequence[Hashable],
    sampling: Sampling,
    window: str = "all",
    watch: Watch | None = None,
) -> list[Completion]:
    """Complete a batch of token lists; entry r of every edit steers row r.

    Rows with equal `arm` have the same prompt and the same edits: as long as their tokens agree, one state of the model
    serves them all, and it branches where they part. Where the window begins with the last prompt token or behind it, all
    before that token goes through the model once for rows with equal prompts. In float32 a row's tokens do not depend on
    what else is in the batch (packed weights on a CPU round each row alike); in bfloat16 and float16 near ties may fall otherwise.
    rows: numbers that key each row's noise. watch: is shown the residual stream, step by step.
    Raises NotFinite for logits with NaN or infinity: no token is drawn from them.
    """
    from transformers import DynamicCache

    width, device = max(map(len, prompts)), next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # pads are masked: any token does
    mask = torch.arange(width, device=device)[None] >= width - lengths[:, None]
    noise = torch.from_numpy(uniforms(sampling.seed, rows, sampling.max_new_tokens)).to(device)
    same = [tuple(p) for p in prompts] if window in ("last", "generated") else arm  # rows alike up to the last token
    (first, state), (unique, prefix) = groups(arm, device), groups(same, device)
    cache, tally = DynamicCache(config=model.config), Tally(len(first))
    with packed_linears(model), grouped_attention(model):
        if width > 1:  # all but the last prompt token
            tally = Tally(len(unique))
            prefill = Steering([edit.rows(unique) for edit in edits], prompt_length=lengths[unique], receipt=tally, window=window)
            with attached(model, prefill):
                forward(model.base_model, ids[unique, :-1], mask[unique, :-1], cache)
            spread = prefix[first]
            tally.select(spread)
            if not torch.equal(spread, torch.arange(len(unique), device=device)):
                select_rows(cache, spread)
        steering = Steering([edit.rows(first) for edit in edits], prompt_length=lengths[first], receipt=tally, window=window)
        with attached(model, steering), _watching(model, watch) as show:
            return _decode_steps(model, ids[first, -1:], mask[first], cache, steering, tally, noise, sampling, state, show)


@contextmanager
def _watching(model: nn.Module, watch: Watch | None) -> Iterator[Callable]:
    """Keep what the watched blocks put out, and yield the function that shows it: show(step, rows, stopped, state)."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int):
        def hook(_module, _args, output):
            seen[layer] = (output[0] if isinstance(output, tuple) else output)[:, -1]

        return hook

    def show(step: int, rows: Tensor, stopped: Tensor, state: Tensor) -> None:
        if watch is not None:
            watch.each(step, rows, stopped, {layer: resid[state.to(resid.device)] for layer, resid in seen.items()})

    with ExitStack() as stack:
        for layer in watch.layers if watch else ():
            stack.callback(residual_blocks(model)[layer].register_forward_hook(keep(layer), prepend=not watch.steered).remove)
        yield show


def groups(keys: Sequence[Hashable], device) -> tuple[Int[Tensor, " groups"], Int[Tensor, " rows"]]:
    """Return the first row of each group of equal keys, and the group of each row."""
    number: dict[Hashable, int] = {}
    group = [number.setdefault(key, len(number)) for key in keys]
    first = {g: row for row, g in reversed(list(enumerate(group)))}
    return torch.tensor([first[g] for g in range(len(number))], device=device), torch.tensor(group, device=device)


def _decode_steps(model, token, mask, cache, steering: Steering, tally: Tally, noise, sampling: Sampling, state, show) -> list[Completion]:
    """Feed the last prompt token, then one new token a step. Row r reads state `state[r]`; rows that stopped leave."""
    stop = torch.tensor(sampling.stop, device=token.device, dtype=torch.long)
    tokens: list[list[int]] = [[] for _ in state]
    found: dict[int, Completion] = {}
    alive = torch.arange(len(state), device=token.device)  # -> row asked for
    for step in range(sampling.max_new_tokens):
        logits = forward(model, token, mask, cache, logits_to_keep=1).logits[:, -1].to(token.device)
        if len(lost := (~torch.isfinite(logits.amax(-1))[state]).nonzero()):  # one pass: a NaN is the largest, -inf may be a mask's
            raise NotFinite(alive[lost[:, 0]].tolist(), step, logits.dtype)
        new = draw(logits, noise[alive, step], sampling, state)
        stopped = torch.isin(new, stop)
        show(step, alive, stopped, state)
        ends, last = stopped.tolist(), step == sampling.max_new_tokens - 1
        if last or True in ends:
            count, total = tally.count.tolist(), tally.total.tolist()  # at once: a GPU is waited for at every number
        for row, t, end, i in zip(alive.tolist(), new.tolist(), ends, state.tolist()):
            tokens[row] += [] if end and not sampling.keep_stop else [t]
            if end or last:
                n = int(count[i])
                found[row] = Completion(tokens[row], n, total[i] / max(n, 1))
        if len(found) == len(tokens):
            break
        alive, new, state = alive[~stopped], new[~stopped], state[~stopped]
        parent, token, state = _branch(state, new, len(mask), logits.shape[-1])
        if parent is not None:
            mask = mask[parent]
            steering.select(parent)
            select_rows(cache, parent)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return [found[row] for row in range(len(tokens))]


def select_rows(cache, index: Int[Tensor, " n"]) -> None:
    """Keep, drop or repeat the rows of a cache whose layers may lie on several devices."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        layer.batch_select_indices(index if keys is None else index.to(keys.device))


def _branch(state: Int[Tensor, " rows"], new: Int[Tensor, " rows"], n: int, vocab: int):
    """Return (parent of each new state or None where the states stay, their tokens, the new state of each row).

    A state that no row reads any more stays while few do: to drop states copies the cache.
    """
    pairs, row_state = (state * vocab + new).unique(return_inverse=True)
    parent, token = pairs // vocab, pairs % vocab
    if len(parent.unique()) == len(parent) and (n - len(parent)) * 8 < n:
        whole = token.new_zeros(n)
        whole[parent] = token
        return None, whole[:, None], parent[row_state]
    return parent, token[:, None], row_state


def forward(module, ids: Int[Tensor, "rows pos"], mask: Tensor, cache, **settings):
    """Feed tokens behind a cache; mask marks the real tokens of both, and pads may stand on either side."""
    position = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return module(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        **settings,
    )

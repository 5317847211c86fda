"""Many prompts x steering arms x samples in one batched, cached decode that streams to disk and resumes."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from steerkit.engine.decode import NotFinite, Sampling, decode
from steerkit.engine.memory import halving
from steerkit.engine.steer import Ablate, Add, Boost, Edit, check_edits
from steerkit.engine.tokens import prompt_ids, stop_tokens
from steerkit.inputs import Number, Whole, number, strings, whole
from steerkit.progress import bar
from steerkit.store import Journal, fingerprint

__all__ = ["BASELINE", "Arm", "generate", "grid", "prompt_ids", "stack", "stop_tokens"]


@dataclass(frozen=True)
class Arm:
    """One way to steer: a name, the edits applied together (none for the baseline), and a scale to tabulate by."""

    name: str
    edits: tuple[Edit, ...] | list[Edit] | Edit = ()
    scale: Number = 0.0

    def __post_init__(self) -> None:
        edits = (self.edits,) if isinstance(self.edits, Edit) else tuple(self.edits)
        for name, value in {"name": str(self.name), "edits": edits, "scale": number(f"{self.name}.scale", self.scale)}.items():
            object.__setattr__(self, name, value)


BASELINE = Arm("baseline")


def grid(vectors: Iterable, scales: Iterable[Number]) -> list[Arm]:
    """Return one arm for each steering vector and scale (scale = norm of what is added, in residual units)."""
    scales = [number("scales", scale) for scale in scales]
    return [Arm(v.name, (v.edit(scale),), scale) for v in vectors for scale in scales]


def stack(arms: Sequence[Arm]) -> list[Edit]:
    """Return edits with one entry a row: row r gets the edits of arms[r].

    An arm without an edit in some slot (kind, layer, order) gets a zero there, which leaves its rows bitwise unchanged.
    """
    slots: dict[tuple, list[Edit | None]] = {}
    for r, arm in enumerate(arms):
        seen: dict[tuple, int] = {}
        for edit in arm.edits:
            kind = (type(edit), edit.layer, id(edit.sae) if isinstance(edit, Boost) else 0)
            slot = (*kind, seen.setdefault(kind, 0))
            seen[kind] += 1
            slots.setdefault(slot, [None] * len(arms))[r] = edit
    return [_stack_slot(edits) for edits in slots.values()]


def _stack_slot(edits: list[Edit | None]) -> Edit:
    first = next(e for e in edits if e is not None)
    if isinstance(first, Boost):
        features = torch.tensor([0 if e is None else int(e.feature) for e in edits])
        return replace(first, feature=features, factor=torch.tensor([0.0 if e is None else float(e.factor) for e in edits]))
    zero = torch.zeros_like(first.vector)
    vectors = torch.stack([zero if e is None else e.vector for e in edits])
    if isinstance(first, Ablate):
        return Ablate(first.layer, vectors, strict=False)
    return Add(first.layer, vectors, torch.tensor([0.0 if e is None else float(e.scale) for e in edits]))


def generate(
    model: nn.Module,
    tokenizer,
    prompts: Iterable[str],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    samples: Whole = 1,
    max_new_tokens: Whole = 32,
    temperature: Number = 1.0,
    top_k: Whole = 0,
    top_p: Number = 1.0,
    stop: Iterable = (),
    keep_stop: bool = False,
    allowed: Iterable[Whole] = (),
    window: str = "all",
    skip_first: bool = False,
    seed: Whole = 0,
    batch_size: Whole = 64,
    chat: bool = False,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Complete every prompt under every arm, `samples` times, and return one row a completion.

    Columns: row, prompt (text), arm, scale, sample, text, tokens, changed (positions steered), ratio (mean |delta| / |resid|).
    temperature 0 is greedy; top_k 0 and top_p 1 are off. A token in `stop` ends a text, and belongs to it with keep_stop.
    allowed: the only tokens that may be drawn, for constrained decoding; all where none is named.
    The noise of a row is keyed by (seed, row, step). In float32 a text therefore does not depend on batch size or order. In
    bfloat16 and float16 a product's rounding changes with the number of rows: in bfloat16 on a CPU, 6 of 24 greedy texts (12
    tokens) of the embedded model differed between batches of 24 and of 1. There the batch size is part of a kept run's key.
    A batch that does not fit in memory is halved. With `out` (a .jsonl file) finished batches are on disk, and the same call
    after an interruption carries on with the next one. "{key}" in the name becomes a hash of all that determines the texts
    (weights, SAEs, prompts, edits, settings), so that another call gets another file.

    Warns by name of arms that changed no position in any row. Raises ValueError for settings out of range, edits that do not
    fit the model, an `out` that holds another run, or logits that are not finite (with row, arm, scale and dtype).

    >>> generate(model, tokenizer, ["I think"], grid([vector], [0, 40, 80]), samples=4, out="runs/texts.jsonl")  # doctest: +SKIP
    """
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens, tuple(stop), seed, keep_stop, tuple(allowed))
    prompts, arms = strings("prompts", prompts), list(arms)
    samples, batch_size = whole("samples", samples), whole("batch_size", batch_size)
    if samples < 1 or batch_size < 1 or not prompts or not arms:
        raise ValueError(
            f"expected at least one prompt, arm, sample and batch row, got {len(prompts)}, {len(arms)}, {samples}, {batch_size}"
        )
    check_edits(model, [edit for arm in arms for edit in arm.edits])
    ids = [prompt_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
    plan = [(p, a, s) for p in range(len(prompts)) for a in range(len(arms)) for s in range(samples)]
    order = sorted(range(len(plan)), key=lambda r: (len(ids[plan[r][0]]), r))  # rows of like length share a batch
    settings = (samples, sampling, window, skip_first, batch_sensitive(model) and batch_size, _decoder(tokenizer))
    key = fingerprint(model, prompts, ids, arms, *settings) if out else ""
    journal = Journal(str(out).replace("{key}", key) if out else None, key)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in bar([b for b in batches if not journal.has(b)], "generate", "batch", show=progress):
        do = partial(_decoded, model, tokenizer, plan, ids, arms, sampling, window, skip_first)
        rows = [row for part in halving(do, batch) for row in part]
        journal.write(
            [
                {
                    "row": r,
                    "prompt": prompts[plan[r][0]],
                    "arm": arms[plan[r][1]].name,
                    "scale": arms[plan[r][1]].scale,
                    "sample": plan[r][2],
                }
                | found
                for r, found in rows
            ]
        )
    found = pd.DataFrame([journal.rows[r] for r in range(len(plan))])
    _warn_idle(found, arms, [a for _, a, _ in plan])
    return found


def _decoded(model, tokenizer, plan, ids, arms, sampling, window, skip_first, batch) -> list[tuple[int, dict]]:
    """Decode a batch of rows of the plan, and return each with its number. Name the arms of what is not finite."""
    try:
        found = decode(
            model,
            [ids[plan[r][0]] for r in batch],
            stack([arms[plan[r][1]] for r in batch]),
            rows=batch,
            arm=[plan[r][:2] for r in batch],
            shared=[plan[r][0] if window in ("last", "generated") else plan[r][:2] for r in batch],
            sampling=sampling,
            window=window,
            skip_first=skip_first,
            pad=tokenizer.pad_token_id or 0,
        )
    except NotFinite as error:
        lost = [(batch[i], arms[plan[batch[i]][1]]) for i in error.rows]
        named = "; ".join(f"row {r}, arm {arm.name!r}, scale {arm.scale:g}" for r, arm in lost[:4])
        raise ValueError(f"{named}: {error.what}: lower the scale, or open the model in float32") from error
    return [
        (r, {"text": tokenizer.decode(f.tokens), "tokens": f.tokens, "changed": f.changed, "ratio": f.ratio}) for r, f in zip(batch, found)
    ]


def batch_sensitive(model: nn.Module) -> bool:
    """Tell whether a row's rounding, and so now and then its text, depends on the batch: in every dtype but float32 and float64."""
    return model.dtype not in (torch.float32, torch.float64)


def _decoder(tokenizer) -> tuple:
    """Return what tells tokenizers apart that give a prompt the same tokens."""
    return type(tokenizer).__name__, len(tokenizer), tokenizer.all_special_ids


def _warn_idle(rows: pd.DataFrame, arms: Sequence[Arm], of: Sequence[int]) -> None:
    """Name the arms that should push and changed no position in any row: their texts are not steered ones."""
    changed = rows.changed.groupby(np.asarray(of)).sum()
    idle = [f"{arm.name!r} (scale {arm.scale:g})" for a, arm in enumerate(arms) if not changed[a] and any(e.pushes for e in arm.edits)]
    if idle:
        warnings.warn(
            f"{len(idle)} of {len(arms)} arms changed no position in any row: {', '.join(idle[:8])}{', ...' if len(idle) > 8 else ''}. "
            "Their texts are those of no steering: check the window, and that a boosted SAE fires here",
            stacklevel=3,
        )

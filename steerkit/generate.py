"""Many prompts x steering arms x samples in one batched, cached decode that streams to disk and resumes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from steerkit.decode import Sampling, decode
from steerkit.hooks import Ablate, Add, Boost, Edit, check_edits
from steerkit.journal import Journal
from steerkit.memory import halving
from steerkit.progress import bar


@dataclass(frozen=True)
class Arm:
    """One way to steer: a name, the edits applied together (none for the baseline), and a scale to tabulate by."""

    name: str
    edits: tuple[Edit, ...] = ()
    scale: float = 0.0


BASELINE = Arm("baseline")


def grid(vectors: Sequence, scales: Sequence[float]) -> list[Arm]:
    """Return one arm for each steering vector and scale (scale = norm of what is added, in residual units)."""
    return [Arm(v.name, (v.edit(scale),), float(scale)) for v in vectors for scale in scales]


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
    prompts: Sequence[str],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    samples: int = 1,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    keep_stop: bool = False,
    allowed: Sequence[int] = (),
    window: str = "all",
    skip_first: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    chat: bool = False,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Complete every prompt under every arm, `samples` times, and return one row a completion.

    Columns: row, prompt (text), arm, scale, sample, text, tokens, changed (positions steered), ratio (mean |delta| / |resid|).
    temperature 0 is greedy; top_k 0 and top_p 1 are off. A token in `stop` ends a text, and belongs to it with keep_stop.
    allowed: the only tokens that may be drawn, for constrained decoding; all where none is named.
    The noise of a row is keyed by (seed, row, step), so its text does not depend on batch size or order. A batch that does
    not fit in memory is halved. With `out` (a .jsonl file) finished batches are on disk, and the same call after an
    interruption carries on with the next one. "{key}" in the name becomes a hash of what determines the texts, so that
    another call gets another file.

    Raises ValueError for settings out of range, edits that do not fit the model, or an `out` that holds another run.

    >>> generate(model, tokenizer, ["I think"], grid([vector], [0, 40, 80]), samples=4, out="runs/texts.jsonl")  # doctest: +SKIP
    """
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens, tuple(stop), seed, keep_stop, tuple(allowed))
    if samples < 1 or batch_size < 1 or not prompts or not arms:
        raise ValueError(
            f"expected at least one prompt, arm, sample and batch row, got {len(prompts)}, {len(arms)}, {samples}, {batch_size}"
        )
    check_edits(model, [edit for arm in arms for edit in arm.edits])
    ids = [prompt_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
    plan = [(p, a, s) for p in range(len(prompts)) for a in range(len(arms)) for s in range(samples)]
    order = sorted(range(len(plan)), key=lambda r: (len(ids[plan[r][0]]), r))  # rows of like length share a batch
    key = run_key(model, ids, arms, samples, sampling, window, skip_first)
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
    return pd.DataFrame([journal.rows[r] for r in range(len(plan))])


def stop_tokens(tokenizer) -> list[int]:
    """Return the tokens that end a text: the tokenizer's end and pad tokens, where it has them."""
    return sorted({i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None})


def prompt_ids(tokenizer, prompt: str, *, chat: bool = False) -> list[int]:
    """Return a prompt's token ids: beginning-of-text token first, or the chat template with the assistant's turn opened."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def _decoded(model, tokenizer, plan, ids, arms, sampling, window, skip_first, batch) -> list[tuple[int, dict]]:
    """Decode a batch of rows of the plan, and return each with its number."""
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
    return [
        (r, {"text": tokenizer.decode(f.tokens), "tokens": f.tokens, "changed": f.changed, "ratio": f.ratio}) for r, f in zip(batch, found)
    ]


def run_key(model: nn.Module, ids, arms: Sequence[Arm], samples: int, sampling: Sampling, window: str, skip_first: bool) -> str:
    """Hash what determines the texts: weights' fingerprint, prompts, edits and settings."""
    digest = hashlib.sha256(json.dumps([ids, samples, repr(sampling), window, skip_first]).encode())
    hash_weights(digest, model)
    for arm in arms:
        for edit in arm.edits:
            digest.update(f"{arm.name}{type(edit).__name__}{edit.layer}".encode())
            values = (edit.feature, edit.factor) if isinstance(edit, Boost) else (edit.vector, getattr(edit, "scale", 1.0))
            for value in values:
                digest.update(np.ascontiguousarray(torch.as_tensor(value).detach().double().cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def hash_weights(digest, model: nn.Module) -> None:
    """Add to a digest what tells a model's weights from others': shape, dtype and the first numbers of each, which is cheap."""
    for parameter in model.parameters():
        digest.update(f"{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())

"""Many prompts x steering arms x samples in one batched, cached decode that streams to disk and resumes."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn

from steerkit.engine.decode import NotFinite, Sampling, decode
from steerkit.engine.lab import Lab
from steerkit.engine.memory import halving
from steerkit.engine.steer import Ablate, Add, Boost, Edit, check_edits
from steerkit.engine.tokens import prompt_ids
from steerkit.inputs import Number, Whole, number, strings, whole
from steerkit.progress import bar
from steerkit.store import Journal, Work, fingerprint

__all__ = ["BASELINE", "Arm", "Sampling", "Work", "generate", "grid", "stack"]
COLUMNS = {"row", "prompt", "arm", "scale", "sample", "text", "tokens", "changed", "ratio"}


@dataclass(frozen=True)
class Arm:
    """One way to steer: a name, the edits applied together (none for the baseline), and a scale to tabulate by.

    labels: whatever else tells arms apart (topic, feature, ...); each comes back as a column of the table. ValueError for a
    label that is the name of a column.
    """

    name: str
    edits: tuple[Edit, ...] | list[Edit] | Edit = ()
    scale: Number = 0.0
    labels: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := COLUMNS & set(self.labels):
            raise ValueError(f"{self.name}: expected labels that are no columns of the table, got {sorted(taken)}: rename them")
        edits = (self.edits,) if isinstance(self.edits, Edit) else tuple(self.edits)
        for name, value in {"name": str(self.name), "edits": edits, "scale": number(f"{self.name}.scale", self.scale)}.items():
            object.__setattr__(self, name, value)


BASELINE = Arm("baseline")


def grid(vectors: Iterable, scales: Iterable[Number], **labels) -> list[Arm]:
    """Return one arm for each steering vector and scale (norm of what is added, in residual units), all with these labels."""
    scales = [number("scales", scale) for scale in scales]
    return [Arm(v.name, (v.edit(scale),), scale, labels) for v in vectors for scale in scales]


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
    lab: Lab,
    prompts: Iterable[str],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    samples: Whole = 1,
    sampling: Sampling = Sampling(),
    window: str = "all",
    chat: bool = False,
    work: Work = Work(),
) -> pd.DataFrame:
    """Complete every prompt under every arm, `samples` times, and return one row a completion.

    Columns: row, prompt (text), arm, the arms' labels, scale, sample, text, tokens, changed (positions steered), ratio (mean
    |delta| / |resid|). sampling: temperature, nucleus, length, stop tokens and seed (`decode.Sampling`). window: "all", "prompt",
    "last" or "generated", as in `steering`. chat: prompts go through the model's chat template.
    The noise of a row is keyed by (seed, row, step). In float32 a text therefore does not depend on batch size or order. In
    bfloat16 and float16 a product's rounding changes with the number of rows: in bfloat16 on a CPU, 6 of 24 greedy texts (12
    tokens) of the embedded model differed between batches of 24 and of 1. There the batch size is part of a kept run's key.
    work.out is a .jsonl file: finished batches are on disk, and the same call after an interruption carries on with the next one.
    Its key holds all that determines the texts (weights, SAEs, prompts, edits, settings). Batches of 64 rows unless work says so.

    Warns by name of arms that changed no position in any row. Raises ValueError for settings out of range, edits that do not
    fit the model, an `out` that holds another run, or logits that are not finite (with row, arm, scale and dtype).

    >>> generate(lab, ["I think"], grid([vector], [40, 80]), samples=4, work=Work(out="runs/texts.jsonl"))  # doctest: +SKIP
    """
    model, tokenizer = lab.hf, lab.tokenizer
    prompts, arms, samples, size = strings("prompts", prompts), list(arms), whole("samples", samples), work.rows(64)
    if samples < 1 or not prompts or not arms:
        raise ValueError(f"expected at least one prompt, arm and sample, got {len(prompts)}, {len(arms)}, {samples}")
    check_edits(model, [edit for arm in arms for edit in arm.edits])
    ids = [prompt_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
    plan = [(p, a, s) for p in range(len(prompts)) for a in range(len(arms)) for s in range(samples)]
    order = sorted(range(len(plan)), key=lambda r: (len(ids[plan[r][0]]), r))  # rows of like length share a batch
    settings = (samples, sampling, window, batch_sensitive(model) and size, _decoder(tokenizer))
    key = fingerprint(model, prompts, ids, [(arm.name, arm.edits, arm.scale) for arm in arms], *settings) if work.out else ""
    journal = Journal(work.path(key), key)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for batch in bar([b for b in batches if not journal.has(b)], "generate", "batch", show=work.progress):
        do = partial(_decoded, lab, plan, ids, arms, sampling, window)
        rows = [row for part in halving(do, batch) for row in part]
        journal.write([{"row": r, **_columns(prompts, arms, *plan[r]), **found} for r, found in rows])
    labels = list(dict.fromkeys(label for arm in arms for label in arm.labels))
    found = pd.DataFrame([journal.rows[r] for r in range(len(plan))])
    for at, label in enumerate(labels, list(found).index("arm") + 1):
        found.insert(at, label, [arms[a].labels.get(label) for _, a, _ in plan])
    _warn_idle(found, arms, [a for _, a, _ in plan])
    return found


def _columns(prompts: list[str], arms: list[Arm], p: int, a: int, s: int) -> dict:
    return {"prompt": prompts[p], "arm": arms[a].name, "scale": arms[a].scale, "sample": s}


def _decoded(lab, plan, ids, arms, sampling, window, batch) -> list[tuple[int, dict]]:
    """Decode a batch of rows of the plan, and return each with its number. Name the arms of what is not finite."""
    try:
        found = decode(
            lab.hf,
            [ids[plan[r][0]] for r in batch],
            stack([arms[plan[r][1]] for r in batch]),
            rows=batch,
            arm=[plan[r][:2] for r in batch],
            sampling=sampling,
            window=window,
        )
    except NotFinite as error:
        lost = [(batch[i], arms[plan[batch[i]][1]]) for i in error.rows]
        named = "; ".join(f"row {r}, arm {arm.name!r}, scale {arm.scale:g}" for r, arm in lost[:4])
        raise ValueError(f"{named}: {error.what}: lower the scale, or open the model in float32") from error
    text = lab.tokenizer.decode
    return [(r, {"text": text(f.tokens), "tokens": f.tokens, "changed": f.changed, "ratio": f.ratio}) for r, f in zip(batch, found)]


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

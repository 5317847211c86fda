"""How likely the model finds given continuations of a prompt: options are scored, not written, so that form plays no part."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from steerkit.engine.decode import forward, groups, select_rows
from steerkit.engine.generate import BASELINE, Arm, batch_sensitive, stack
from steerkit.engine.lab import Lab
from steerkit.engine.losses import hidden_losses
from steerkit.engine.memory import halving
from steerkit.engine.packed import packed_linears
from steerkit.engine.steer import Edit, Steering, attached, check_edits
from steerkit.engine.tokens import bare_ids, prompt_ids
from steerkit.inputs import strings
from steerkit.progress import bar
from steerkit.store import Journal, Work, fingerprint


@torch.inference_mode()
def continuation_logliks(
    model: nn.Module, prompts: Sequence[list[int]], continuations: Sequence[list[int]], edits: list[Edit]
) -> Float[np.ndarray, " rows"]:
    """Return sum_t log p(c_t | prompt, c_<t) of each row in nats; entry r of every edit steers row r from its last prompt token on.

    What stands before the last prompt token goes through the model once for rows with equal prompts; nothing there is steered.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    width, length = max(map(len, prompts)) - 1, max(map(len, continuations))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    head = torch.tensor([[0] * (width + 1 - len(p)) + p[:-1] for p in prompts], device=device).long()
    tail = torch.tensor([[p[-1], *c[:-1], *[0] * (length - len(c))] for p, c in zip(prompts, continuations)], device=device)
    before = torch.arange(width, device=device)[None] >= width + 1 - lengths[:, None]  # pads stand on the left of prompts
    fed = torch.arange(length, device=device)[None] < torch.tensor([len(c) for c in continuations], device=device)[:, None]
    unique, prefix = groups([tuple(p) for p in prompts], device)
    cache, steering = DynamicCache(config=model.config), Steering(edits, prompt_length=lengths, window="last")
    with packed_linears(model):
        if width:
            forward(model.base_model, head[unique], before[unique], cache)
            select_rows(cache, prefix)
        with attached(model, steering):
            hidden = forward(model.base_model, tail, torch.cat([before, fed], 1), cache).last_hidden_state
        losses = hidden_losses(model, hidden[fed], torch.tensor([t for c in continuations for t in c], device=device))
    return -np.add.reduceat(losses.double().cpu().numpy(), np.cumsum([0, *(len(c) for c in continuations[:-1])]))


def option_logliks(
    lab: Lab,
    prompts: Iterable[str],
    options: Sequence[Sequence[str]],
    arms: Sequence[Arm] = (BASELINE,),
    *,
    chat: bool = False,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return a row for each prompt and arm: arm, the arm's labels, scale, and loglik, a number for each of the prompt's options.

    loglik_o = sum_t log p(o_t | prompt, o_<t; h + edits) in nats, steered at the last prompt token and behind it, as if the option
    were written (window "last"). An option is taken as it is: give it the space that it begins with. work.out is a .jsonl file, which
    resumes; 128 options run together unless work says so.

    Raises ValueError for numbers of prompts and options that differ, an option without a token, or losses that are not finite.

    >>> option_logliks(lab, ["The sky is"], [[" blue", " green"]]).loglik[0]    # doctest: +SKIP
    [-3.1, -6.4]
    """
    model, prompts, arms = lab.hf, strings("prompts", prompts), list(arms)
    asked = [prompt_ids(lab.tokenizer, prompt, chat=chat) for prompt in prompts]
    told = [[bare_ids(lab.tokenizer, option) for option in strings("options", some)] for some in options]
    if not prompts or len(told) != len(prompts) or not all(told) or not all(o for some in told for o in some):
        raise ValueError(f"expected options of at least one token for each of {len(prompts)} prompts, got {len(told)}: leave others out")
    check_edits(model, [edit for arm in arms for edit in arm.edits])
    plan = [(p, a) for p in range(len(prompts)) for a in range(len(arms))]
    order = sorted(range(len(plan)), key=lambda r: (len(asked[plan[r][0]]), r))  # prompts of like length share a batch
    size = max(1, work.rows(128) // max(map(len, told)))
    given = (asked, told, [(arm.name, arm.edits, arm.scale) for arm in arms], batch_sensitive(model) and size)
    journal = Journal(work.path(key := fingerprint(model, *given) if work.out else ""), key)

    def score(batch: list[int]) -> list[dict]:
        rows = [(r, *plan[r], o) for r in batch for o in range(len(told[plan[r][0]]))]
        edits = stack([arms[a] for _, _, a, _ in rows])
        found = continuation_logliks(model, [asked[p] for _, p, _, _ in rows], [told[p][o] for _, p, _, o in rows], edits)
        if len(lost := np.flatnonzero(~np.isfinite(found))):
            r, _, a, _ = rows[lost[0]]
            at = f"row {r}, arm {arms[a].name!r}, scale {arms[a].scale:g}"
            raise ValueError(f"{at}: expected finite losses, got NaN or infinity in {model.dtype}: lower the scale, or use float32")
        logliks = iter(found.tolist())  # in the order of `rows`
        return [{"row": r, "loglik": [next(logliks) for _ in told[plan[r][0]]]} for r in batch]

    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for batch in bar([b for b in batches if not journal.has(b)], "score options", "batch", show=work.progress):
        journal.write([row for part in halving(score, batch) for row in part])
    labels = list(dict.fromkeys(label for arm in arms for label in arm.labels))
    rows = [{"arm": arms[a].name, **{name: arms[a].labels.get(name) for name in labels}, "scale": arms[a].scale} for _, a in plan]
    return pd.DataFrame(rows).assign(loglik=[journal.rows[r]["loglik"] for r in range(len(plan))])

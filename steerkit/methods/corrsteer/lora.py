"""The supervised baseline: LoRA on the same questions that features are selected on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from steerkit.engine.lab import Lab
from steerkit.engine.tokens import closing_tokens, prompt_ids
from steerkit.methods.corrsteer.trial import Choice, Trial, answer
from steerkit.progress import bar
from steerkit.questions import Question
from steerkit.store import Journal, Work, fingerprint


def target(question: Question) -> str:
    """Return the text to learn: the first of the answers that count, behind a space where the prompt ends without one."""
    first = question.gold.split(" | ")[0]
    return first if question.prompt[-1:].isspace() else f" {first}"


@contextmanager
def lora(
    lab: Lab,
    questions: Sequence[Question],
    *,
    chat: bool = False,
    rank: int = 8,
    lr: float = 2e-4,
    epochs: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[Lab]:
    """Fine-tune the lab's model with LoRA on (prompt, answer, end of text) while the context is open; the loss is on answer and end alone.

    AdamW with 3 % warm-up, cosine decay, weight decay 0.01 and gradients clipped at 1, as the released fine-tuning, which
    trains all weights (lr 1e-5). Adapters sit on all linear layers of the blocks, in the model itself: no copy of it is made, its
    weights are never written, and it is what it was when the context ends.
    Raises ValueError for no questions. Source: Hu et al., arXiv 2106.09685, through peft.

    >>> with lora(lab, questions, epochs=1) as tuned:      # doctest: +SKIP
    ...     answers = generate(tuned, prompts)
    """
    from peft import LoraConfig, get_peft_model

    if not questions:
        raise ValueError("expected at least one question to learn from, got none")
    model, tokenizer = lab.hf, lab.tokenizer
    end = closing_tokens(tokenizer, model, chat=chat)
    rows = [_row(tokenizer, question, chat, end) for question in questions]
    rng, steps = np.random.default_rng(seed), max(1, round(epochs * len(rows) / batch_size))
    order = [i for _ in range(int(np.ceil(epochs)) + 1) for i in _epoch(rows, rng, 16 * batch_size)]
    batches = [[rows[i] for i in order[step * batch_size : (step + 1) * batch_size]] for step in range(steps)]
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    try:
        _learn(adapted.train(), batches, lr, tokenizer.pad_token_id or 0)
        model.eval()
        yield lab
    finally:
        adapted.unload().eval()
        for name, p in model.named_parameters():
            p.requires_grad_(learns[name])


def _learn(model: nn.Module, batches: Sequence[Sequence[tuple[list[int], int]]], lr: float, pad: int) -> None:
    """Train the parameters that want gradients, a step a batch."""
    from transformers import get_cosine_schedule_with_warmup

    weights, steps = [p for p in model.parameters() if p.requires_grad], len(batches)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * steps)), steps)
    for batch in bar(batches, "fine-tune", "step"):
        ids, mask, labels = (part.to(model.device) for part in _padded(batch, pad))
        told = (labels[:, 1:] != -100).any(0).nonzero()[:, 0]  # positions that predict an answer: no logits of the others
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=told).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, told + 1].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _row(tokenizer, question: Question, chat: bool, end: list[int]) -> tuple[list[int], int]:
    """Return the ids of prompt, answer and end of text, and where the answer starts."""
    asked = prompt_ids(tokenizer, question.prompt, chat=chat)
    answer = tokenizer(target(question).strip() if chat else target(question), add_special_tokens=False)["input_ids"]
    return [*asked, *answer, *end], len(asked)


def _epoch(rows: Sequence[tuple[list[int], int]], rng: np.random.Generator, block: int) -> list[int]:
    """Return all rows in random order, but by length within each block: rows of like length share a batch, with less padding."""
    drawn = rng.permutation(len(rows)).tolist()
    return [i for at in range(0, len(rows), block) for i in sorted(drawn[at : at + block], key=lambda i: len(rows[i][0]))]


def _padded(rows: Sequence[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([[-100] * start + row[start:] + [-100] * (width - len(row)) for row, start in rows])
    return ids, mask, labels


def after(
    lab: Lab, questions: Sequence[Question], ask: Callable[[Lab], pd.DataFrame], *, about: object = (), work: Work = Work(), **how
) -> pd.DataFrame:
    """Return what `ask` returns of the model after LoRA on the questions (`lora`, which takes `how`).

    work.out is a folder: the rows are kept there, and what was learned is not learned again; the tuned model is not kept. about: all
    else that determines the rows, such as what is asked and how many rows run together.

    >>> after(lab, questions, lambda tuned: generate(tuned, prompts), about=prompts, work=Work(out="runs/lora"))    # doctest: +SKIP
    """
    key = fingerprint(lab.hf, list(questions), about, how, str(signature(lora))) if work.out else ""
    journal = Journal(work.path(key, f"lora-{key}.jsonl"), key)
    if not journal.rows:  # all rows are written at once
        with lora(lab, questions, **how) as model:
            rows = ask(model)
        journal.write(rows.assign(row=range(len(rows))).to_dict("records"))
    return pd.DataFrame([journal.rows[row] for row in range(len(journal.rows))]).drop(columns="row")


def tuned(lab: Lab, found: Trial, *, epochs: float = 1.0, work: Work = Work()) -> pd.DataFrame:
    """Return the test answers of the model after LoRA on the trial's selection questions, graded as the trial's own; kept as in `after`."""
    task, alike = replace(found.task, parts={}), replace(work, out=None)
    learned = [replace(q, gold=task.said(q)) for q in found.asked]
    ask = lambda model: answer(model, task, found.test, [Choice("LoRA, same questions")], found.readings, work=alike)  # noqa: E731
    about = (task, found.test, work.rows(64))
    return after(lab, learned, ask, about=about, work=work, chat=task.chat, epochs=epochs, seed=found.plan.seed)

"""What else can be learned from a trial's selection answers: residual coordinates, the other site, fine-tuning."""

from dataclasses import replace
from inspect import signature

import pandas as pd

from steerkit.engine.lab import Lab
from steerkit.methods.corrsteer.lora import lora
from steerkit.methods.corrsteer.pooling import Raw
from steerkit.methods.corrsteer.trial import Choice, Trial, answer, methods, select_on
from steerkit.store import Journal, Work, fingerprint


def rivals(lab: Lab, found: Trial, *, epochs: float = 1.0, work: Work = Work()) -> pd.DataFrame:
    """Return the test answers of what learns from the same selection answers in other ways.

    Residual coordinates in place of features; CorrSteer-A read, chosen and steered at the other site; LoRA (epochs 0: none).
    work.out is a folder: passes resume, and what is learned and answered is not learned again.
    """
    raw = {layer: Raw(lab.at(layer).d_model) for layer in found.pooled.features}
    own = {layer: lab.saes[layer] for layer in found.pooled.features}
    other, answers = "post" if found.plan.site == "pre" else "pre", []
    for method, saes, site in (("residual coordinates", raw, found.plan.site), (f"CorrSteer-A, {other}", own, other)):
        if site == "pre" and 0 in saes:
            continue
        first, pooled = select_on(lab, found.task, found.asked, saes=saes, site=site, work=work)
        plan = replace(found.plan, site=site, rules=("CorrSteer-A",), controls=(), scales=(), sizes=())
        (choice,) = methods(lab, found.task, (), pooled, first, plan, saes=saes)
        kept = work.below(f"{found.task.name}-{{key}}.jsonl")
        answers.append(answer(lab, found.task, found.test, [replace(choice, method=method)], saes=saes, site=site, work=kept))
    answers += [_tuned(lab, found, epochs, work)] if epochs else []
    return pd.concat(answers, ignore_index=True).assign(task=found.task.name, seed=found.plan.seed)


def _tuned(lab: Lab, found: Trial, epochs: float, work: Work) -> pd.DataFrame:
    """Return the test answers of the model fine-tuned on the selection questions; they are kept, the tuned model is not."""
    task, seed = replace(found.task, parts={}), found.plan.seed
    parts = (lab.hf, task, found.asked, found.test, seed, epochs, str(signature(lora)), work.rows(64))
    key = fingerprint(*parts) if work.out else ""
    journal = Journal(work.path(key, f"lora-{key}.jsonl"), key)
    if not journal.has(range(len(found.test))):
        learned = [replace(q, gold=task.said(q)) for q in found.asked]
        with lora(lab, learned, chat=task.chat, epochs=epochs, seed=seed) as tuned:
            answers = answer(tuned, task, found.test, [Choice("LoRA, same questions")], work=replace(work, out=None))
        journal.write(answers.assign(row=range(len(answers))).to_dict("records"))
    return pd.DataFrame([journal.rows[row] for row in range(len(found.test))]).drop(columns="row")

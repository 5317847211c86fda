"""Fine-tuning, the supervised rival: what it learns, the loss, and a model that is as before."""

from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch

from steerkit.engine.tokens import prompt_ids
from steerkit.methods.corrsteer import lora as finetune
from steerkit.methods.corrsteer import trial
from steerkit.methods.corrsteer.lora import lora, target, tuned
from steerkit.questions import Question, Task
from steerkit.store import Work

QUIET = Work(progress=False)
PLAN = trial.Plan(draws=1, rules=("CorrSteer-A",), controls=(), others=False)


def task(n=12):
    rows = tuple(Question("toy", str(i), f"g:{i // 2}", f"Question {i}?", "k") for i in range(n))
    return Task("toy", "contains", 3, False, {"all": rows}), rows


def options(n=20):
    """Two options of one letter, of which "k" is right on every other question and "w" on the others."""
    rows = tuple(Question("pairs", str(i), f"g:{i}", f"Question {i}:", "AB"[i % 2], ("k", "w")) for i in range(n))
    return Task("pairs", "options", 1, False, {"all": rows}, units=True)


def test_fine_tuning_answers_the_same_test_and_is_not_done_twice(tmp_path, monkeypatch):
    lab = tiny.lab()
    rows = tuple(Question("toy", str(i), f"g:{i}", f"Question {i}?", "k" if i % 2 else "zzz") for i in range(60))
    toy = Task("toy", "contains", 1, False, {"all": rows}, units=True)
    found = trial.run(lab, toy, replace(PLAN, n_test=6), work=QUIET)
    assert {q.id for q in found.asked} & {q.id for q in found.test} == set() and len(found.asked) == len(found.selection)
    answers = tuned(lab, found, work=Work(out=tmp_path, progress=False))
    monkeypatch.setattr("peft.get_peft_model", lambda *_a, **_k: pytest.fail("learned twice"))
    pd.testing.assert_frame_equal(tuned(lab, found, work=Work(out=tmp_path, progress=False)), answers, check_dtype=False)
    assert set(answers.method) == {"LoRA, same questions"} and answers.question.tolist() == list(range(6))
    assert not hasattr(lab.hf, "peft_config")


def test_fine_tuning_learns_the_option_not_its_letter(monkeypatch):
    lab, pairs, seen = tiny.lab(), options(), []
    found = trial.run(lab, pairs, replace(PLAN, n_test=4), work=QUIET)
    real = finetune.lora
    monkeypatch.setattr(finetune, "lora", lambda lab_, questions, **how: seen.extend(questions) or real(lab_, questions, **how))
    tuned(lab, found, epochs=0.5, work=QUIET)
    assert {target(q) for q in seen} <= {" k", " w"} and [q.id for q in seen] == [q.id for q in found.asked]


def test_lora_learns_the_answers_and_leaves_the_model_alone():
    lab = tiny.lab()
    model = lab.hf
    before = {name: p.clone() for name, p in model.named_parameters()}
    toy, rows = task()
    whole = {name: (type(m), len(vars(m))) for name, m in model.named_modules()}
    ids = torch.tensor([[1, 5, 9, 7]])
    plain = model(input_ids=ids).logits
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}

    def untouched():
        return {name: (type(m), len(vars(m))) for name, m in model.named_modules()} == whole and all(
            torch.equal(p, before[name]) and p.data_ptr() == storage[name] and p.requires_grad for name, p in model.named_parameters()
        )

    with lora(lab, rows, lr=2e-2, epochs=20, batch_size=4) as tuned:
        assert trial.ask(tuned, toy, rows, work=QUIET).correct.mean() > 0.9
    assert untouched() and torch.equal(model(input_ids=ids).logits, plain)  # bit by bit, no copy and no adapter is left
    assert trial.ask(lab, toy, rows, work=QUIET).correct.mean() < 0.9
    learnt = []
    for _ in range(2):
        with lora(lab, rows, lr=2e-2, batch_size=4) as tuned:
            learnt.append([p.clone() for p in tuned.hf.parameters()])
    assert len(learnt[0]) > len(before) and all(torch.equal(a, b) for a, b in zip(*learnt))
    with pytest.raises(KeyboardInterrupt), lora(lab, rows, batch_size=4):
        raise KeyboardInterrupt
    assert untouched()
    with pytest.raises(ValueError, match="at least one question"), lora(lab, []):
        pass


def test_an_epoch_of_fine_tuning_sees_every_row_once():
    lab, seen, rows = tiny.lab(), [], task()[1][:5]
    watch = lambda _m, _a, kwargs: seen.append(kwargs["input_ids"][0].tolist())  # noqa: E731
    handle = lab.hf.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    with lora(lab, rows, batch_size=1):
        handle.remove()
    expected = [[*prompt_ids(lab.tokenizer, q.prompt), *lab.tokenizer(" k", add_special_tokens=False)["input_ids"], 2] for q in rows]
    assert sorted(seen) == sorted(expected)


def test_fine_tuning_follows_the_loss_that_transformers_defines(monkeypatch):
    """One batch, padded by hand on the right; the loss is on answer and end alone."""
    lab, rows, seen = tiny.lab(), (*task()[1][:4], Question("toy", "x", "g", "A longer question, is it?", "k")), []
    asked = [prompt_ids(lab.tokenizer, q.prompt) for q in rows]
    answer = [*lab.tokenizer(" k", add_special_tokens=False)["input_ids"], 2]
    width = max(map(len, asked)) + len(answer)
    padded = lambda value, fill: torch.tensor([(row := value(ids)) + [fill] * (width - len(row)) for ids in asked])  # noqa: E731
    batch = {"input_ids": padded(lambda ids: ids + answer, 0), "attention_mask": padded(lambda ids: [1] * len(ids + answer), 0)}
    oracle = lab.hf(**batch, labels=padded(lambda ids: [-100] * len(ids) + answer, -100)).loss.item()
    monkeypatch.setattr(finetune, "cross_entropy", lambda *a: seen.append(torch.nn.functional.cross_entropy(*a)) or seen[-1])
    with lora(lab, rows, batch_size=5):
        pass
    assert len(seen) == 1 and seen[0].item() == pytest.approx(oracle, rel=1e-5)


def test_what_is_learned():
    assert target(Question("t", "1", "g", "Answer:", "B")) == " B" and target(Question("t", "1", "g", "Q\n", "Paris | Lutetia")) == "Paris"

"""A CorrSteer trial on a planted model whose right feature is known; fine-tuning; constrained decoding."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import tiny
import torch
from scipy.sparse import csr_array

from steerkit.engine.decode import Sampling, draw
from steerkit.engine.generate import BASELINE, generate
from steerkit.engine.tokens import prompt_ids
from steerkit.methods.corrsteer import answers as tables
from steerkit.methods.corrsteer import lora as finetune
from steerkit.methods.corrsteer import select, trial
from steerkit.methods.corrsteer.lora import lora, target
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.questions import Question, Task
from steerkit.store import Work

QUIET = Work(progress=False)


def lab_with_letters():
    """Feature 0 of the SAE after the last block writes "k"."""
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    row = model.get_output_embeddings().weight.detach()[tok("k", add_special_tokens=False)["input_ids"][0]]
    with torch.no_grad():
        sae.W_dec[0] = row / row.norm()
    return tiny.lab(hf=model, tok=tok, saes={2: sae})


def task(n=12, new=3):
    rows = tuple(Question("toy", str(i), f"g:{i // 2}", f"Question {i}?", "k", kind="even" if i % 2 == 0 else "odd") for i in range(n))
    return Task("toy", "contains", new, False, {"all": rows}), rows


def planted_pooled(n=40, seed=0):
    """Feature 0 fires exactly on successes, feature 5 on failures, feature 7 nearly at random."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3 == 0
    z = np.zeros((n, 128), dtype=np.float32)
    z[:, 0], z[:, 5], z[:, 7] = 200.0 * y, 3.0 * ~y, rng.random(n) + 0.3 * y
    return Pooled([[1]] * n, np.ones(n, dtype=int), {2: {"max": csr_array(z), "mean": csr_array(z)}}), y.astype(float)


def test_the_planted_feature_is_picked_and_its_steering_makes_every_answer_right():
    lab = lab_with_letters()
    toy, rows = task(new=1)
    pooled, y = planted_pooled()
    picks = trial.methods(lab, toy, rows[:4], pooled, y, work=Work(batch_size=4))
    for name in ("CorrSteer-A", "CorrSteer-S", "CorrSteer-P", "mutual information", "CAA score"):
        assert [(p.layer, p.feature, p.coefficient) for p in picks[name]] == [(2, 0, pytest.approx(200.0))], name
    assert picks["negative, all layers"][0].feature == 5 and picks["negative, all layers"][0].coefficient <= 0
    assert picks["random features, same push"][0].feature != 0 and picks["random features, same push"][0].coefficient == pytest.approx(200)
    answers = trial.ask(lab, toy, rows, trial.arms(picks, lab.saes), work=QUIET)
    assert len(answers) == len(rows) * (1 + sum(bool(p) for p in picks.values()))
    right = answers.groupby("arm").correct.mean()
    assert right["CorrSteer-A"] == 1.0 and right["baseline"] < 1.0 and right["random features, same push"] < 1.0
    table = tables.compare(answers, n_boot=200)
    assert table.loc["baseline", "gain"].value == 0 and table.loc["baseline", "changed"] == 0
    assert table.loc["CorrSteer-A", "gain"].value == pytest.approx(1 - right["baseline"])
    assert table.loc["CorrSteer-A", "worse"] == 0 and table.loc["CorrSteer-A", "SER"] == 0.0
    assert table.loc["CorrSteer-A", "accuracy"].groups == 6  # questions of one group are drawn together


def test_one_outcome_only_picks_nothing_and_wrong_names_are_refused():
    lab = lab_with_letters()
    toy, rows = task()
    pooled, _ = planted_pooled()
    plan = trial.Plan(rules=("CorrSteer-A",), controls=("shuffled labels",))
    found = trial.methods(lab, toy, rows, pooled, np.zeros(40), plan)
    assert found == {"CorrSteer-A": [], "shuffled labels": []} and trial.arms(found, lab.saes) == [BASELINE]
    for wrong in ({"rules": ("CorrSteer-Z",)}, {"controls": ("none",)}, {"site": "mid"}, {"pool": "sum"}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: expected some of .*, got (CorrSteer-Z|none|mid|sum)$"):
            trial.Plan(**wrong)


def test_the_selection_pass_equals_plain_generation():
    lab = lab_with_letters()
    toy, rows = task()
    answers, pooled = trial.select_on(lab, toy, rows, work=QUIET)
    plain = trial.ask(lab, toy, rows, work=QUIET)
    assert answers.text.tolist() == plain.text.tolist() and answers.correct.tolist() == plain.correct.tolist()
    assert len(pooled) == len(rows) and answers.kind.tolist() == [q.kind for q in rows]


def test_a_run_keeps_parts_apart_leaves_out_kinds_and_resumes(tmp_path):
    lab = lab_with_letters()
    plain = trial.ask(lab, task(60, new=1)[0], task(60, new=1)[1], work=QUIET).text
    gold = [plain[i] if i % 4 == 0 and plain[i].isalpha() else "zzz" for i in range(60)]
    kind = ["known" if i % 2 == 0 else "never" for i in range(60)]  # known: the model's own letter is right every other time
    rows = tuple(Question("toy", str(i), f"g:{i}", f"Question {i}?", gold[i], kind=kind[i]) for i in range(60))
    toy = Task("toy", "contains", 1, False, {"all": rows}, units=True)
    plan, work = trial.Plan(seed=3, n_test=10, within=(0.05, 0.95)), Work(8, tmp_path, progress=False)
    found = trial.run(lab, toy, plan, work=work)
    assert found.kinds == ("known",) and {q.kind for q in found.test} == {"known"}
    assert not {q.group for q in found.test} & set(found.selection.group)
    assert len(found.pooled) == len(found.selection) == len(found.y) and set(found.answers.seed) == {3}
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = trial.run(lab, toy, plan, work=work)
    pd.testing.assert_frame_equal(found.answers, again.answers)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    calm = trial.run(lab, toy, replace(plan, min_fired=10**6), work=QUIET)  # nothing fires so often
    assert not any(calm.picks.values()) and set(calm.answers.arm) == {"baseline", *calm.picks}
    assert {g.value for g in tables.compare(calm.answers, n_boot=100).gain} == {0.0}


def test_shipped_names_of_arms_read_as_the_labels_that_live_rows_have():
    """A method, the same at other scales, and features of another task: labels against what is told from the name alone."""
    lab = lab_with_letters()
    toy, rows = task(2, new=1)
    pick = select.Pick(2, 0, 1.0, 0.5, 0.5, 1, 1)
    arm = lambda name, scale=1.0, **labels: select.arm(name, [pick], lab.saes, scale=scale, **labels)  # noqa: E731
    moved = {"method": "CorrSteer-A", "source": "bbq_ambig"}
    arms = [BASELINE, arm("CorrSteer-A"), arm("CAA score, own coefficients"), arm("CorrSteer-A, other site")]
    arms += [arm("CorrSteer-A x 0.5", 0.5, method="CorrSteer-A", sweep=True), arm("features of bbq_ambig", **moved)]
    arms += [arm(f"features of bbq_ambig x {x:g}", x, **moved, sweep=True) for x in (1.0, 2.0)]
    live = trial.ask(lab, toy, rows, arms, work=QUIET).assign(task="toy")
    told = tables.labelled(live[["task", "arm"]])
    labels = ["method", "source", "scale", "sweep"]
    pd.testing.assert_frame_equal(told[labels], live[labels], check_dtype=False)
    assert told.iloc[7].tolist() == ["toy", "features of bbq_ambig x 2", "CorrSteer-A", "bbq_ambig", 2.0, True]
    free = tables.labelled(pd.DataFrame({"task": ["mmlu"], "arm": ["constrained, no steering"]})).iloc[0]
    assert (free.method, free.source, free.scale) == ("constrained, no steering", "mmlu", 0.0)


def test_the_best_feature_of_a_layer_has_a_floor_over_the_run_and_one_within_kinds():
    """Feature 0 knows the answer; feature 3 only knows the kind, and is the best once feature 0 is gone."""
    toy, rows = task(40)
    y = np.random.default_rng(0).random(40) < np.where(np.arange(40) % 2 == 0, 0.9, 0.1)
    selection = pd.DataFrame({"correct": y.astype(int), "kind": [q.kind for q in rows]})

    def best(columns):
        z = np.zeros((40, 6), dtype=np.float32)
        for i, values in columns.items():
            z[:, i] = values
        pooled = Pooled([[1]] * 40, np.ones(40, dtype=int), {2: {"max": csr_array(z), "mean": csr_array(z)}})
        plan = trial.Plan(seed=5)
        return trial.best_picks(trial.Trial(toy, plan, ("even", "odd"), rows, selection, pooled, {}, (), pd.DataFrame()))

    kind = (np.arange(40) % 2 == 0) * 2.0
    knows, only_kind = best({0: 3.0 * y, 3: kind}).iloc[0], best({3: kind}).iloc[0]
    assert (knows.feature, knows.r, knows.fired_neg) == (0, pytest.approx(1.0), 0) and knows.r > knows.floor_kinds > knows.floor
    assert only_kind.feature == 3 and only_kind.floor < only_kind.r == pytest.approx(only_kind.floor_kinds)
    assert only_kind.r == pytest.approx(np.corrcoef(kind, y)[0, 1]) and (only_kind.seed, only_kind.n, only_kind.layer) == (5, 40, 2)
    selection["correct"] = 1
    assert best({3: kind}).empty, "one outcome only: nothing correlates"


def test_rivals_learn_from_the_same_questions_answer_the_same_test_and_resume(tmp_path, monkeypatch):
    lab = lab_with_letters()
    rows = tuple(Question("toy", str(i), f"g:{i}", f"Question {i}?", "k" if i % 2 else "zzz") for i in range(60))
    toy = Task("toy", "contains", 1, False, {"all": rows}, units=True)
    found = trial.run(lab, toy, trial.Plan(n_test=6, within=(0.0, 1.0)), work=QUIET)
    assert {q.id for q in found.asked} & {q.id for q in found.test} == set() and len(found.asked) == len(found.selection)
    answers = trial.rivals(lab, found, work=Work(out=tmp_path))
    monkeypatch.setattr("peft.get_peft_model", lambda *_a, **_k: pytest.fail("learned twice"))
    pd.testing.assert_frame_equal(trial.rivals(lab, found, work=Work(out=tmp_path)), answers)
    assert set(answers.arm) <= {"residual coordinates", "LoRA, same questions"} and "LoRA, same questions" in set(answers.arm)
    assert (answers.method == answers.arm).all() and set(answers.source) == {"toy"} and set(answers.scale) == {1.0}
    assert set(answers.question) == set(range(6)) and set(answers.task) == {"toy"} and not hasattr(lab.hf, "peft_config")


def test_bias_of_answers_by_arm_and_context():
    meta = {"category": "Age", "polarity": "neg", "target": "A", "unknown": "C"}
    test = [Question("bbq_ambig", str(i), "Age-1", "?", "C", tuple("xyz"), kind="ambig", meta=meta) for i in range(4)]
    answers = pd.DataFrame(
        [("calm", q, t) for q, t in enumerate([" A", "B", "C", " A."])] + [("pushed", q, "A") for q in range(4)],
        columns=["arm", "question", "text"],
    )
    found = tables.bias(answers, test).set_index("arm")
    # calm: A, B, C and no letter: of two that name someone one is the target, so 2/2 - 1 = 0; pushed: (1 - 0) x 1
    assert found.bias["calm"] == 0.0 and found.bias["pushed"] == 1.0 and found.named.to_dict() == {"calm": 2, "pushed": 4}
    assert found.accuracy["calm"] == pytest.approx(1 / 3) and set(found.context) == {"ambig"}


def test_compare_counts_changes_and_its_unit_is_the_selection():
    def run(seed, base, other):
        arms = [(arm, i, v) for arm, values in (("baseline", base), ("x", other)) for i, v in enumerate(values)]
        frame = pd.DataFrame(arms, columns=["arm", "question", "correct"]).assign(seed=seed, group=["a", "a", "b", "b"] * 2)
        return frame.assign(text=frame.correct.astype(str), outcome=np.where(frame.correct, "right", "wrong"))

    both = pd.concat([run(0, [1, 0, 0, 1], [1, 1, 0, 0]), run(1, [0, 0, 1, 1], [1, 1, 1, 1]), run(2, [0, 0, 0, 1], [1, 0, 0, 1])])
    found = tables.compare(both).loc["x"]
    assert (found.worse, found.better, found.changed, found.questions) == (1, 4, 5, 12) and found.SER == 0.2
    gains = [0.0, 0.5, 0.25]  # one number a selection, whatever the questions
    plain = scipy.stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert found.gain.n == 3 and (found.gain.low, found.gain.high) == pytest.approx((plain.low, plain.high))
    assert found.accuracy.value == pytest.approx(np.mean([0.5, 1.0, 0.5]))
    once = tables.compare(both[(both.arm == "baseline") | (both.seed == 1)], n_boot=200).loc["x"]  # asked in one run only
    assert (once.gain.n, once.gain.groups, once.gain.value) == (4, 2, 0.5) and once.accuracy.value == 1.0
    assert (once.gain.low, once.gain.high) == (0.0, 1.0)  # a draw of twice b; twice a


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constrained_decoding_draws_only_what_is_allowed_and_in_proportion(temperature):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0)).expand(4000, -1)
    allowed = (3, 17, 8)
    u = torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = draw(logits, u, Sampling(temperature=temperature, allowed=allowed))
    assert set(found.tolist()) <= set(allowed)
    if temperature == 0:
        assert found[0] == max(allowed, key=lambda i: logits[0, i])
    else:
        share = torch.stack([(found == i).double().mean() for i in allowed])
        torch.testing.assert_close(share, logits[0, list(allowed)].double().softmax(0), atol=0.03, rtol=0)


def test_constrained_answers_are_letters():
    lab = tiny.lab()
    ids = [lab.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ABCD"]
    sampling = Sampling(temperature=0.0, max_new_tokens=1, allowed=tuple(ids))
    texts = generate(lab, ["One?", "Two?", "A longer one?"], sampling=sampling, work=QUIET)
    assert set(texts.text) <= set("ABCD")
    toy, rows = task(new=1)
    assert set(trial.ask(lab, toy, rows, allowed=ids, work=QUIET).text) <= set("ABCD")


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

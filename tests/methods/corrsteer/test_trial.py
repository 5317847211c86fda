"""A CorrSteer trial on a planted model whose right feature is known, in both forms of answers; rivals that learn from the same ones."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.sparse import csr_array

from steerkit.engine.decode import Sampling, draw
from steerkit.engine.generate import generate
from steerkit.engine.tokens import prompt_ids
from steerkit.methods.corrsteer import trial
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.methods.corrsteer.pooling import Reading
from steerkit.questions import Question, Task
from steerkit.store import Work

QUIET = Work(progress=False)
POST = trial.Plan(site="post", others=False)  # the last block's own output: "k" can be written there


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


def options(n=12):
    """Two options of one letter, of which "k" is right on every other question and "w" on the others."""
    rows = tuple(Question("pairs", str(i), f"g:{i}", f"Question {i}:", "AB"[i % 2], ("k", "w"), kind="all") for i in range(n))
    return Task("pairs", "options", 1, False, {"all": rows}, units=True), rows


def planted_pooled(n=40, seed=0):
    """Feature 0 fires exactly on successes, feature 5 on failures, feature 7 nearly at random; means are half the maxima."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3 == 0
    z = np.zeros((n, 128), dtype=np.float32)
    z[:, 0], z[:, 5], z[:, 7] = 200.0 * y, 3.0 * ~y, rng.random(n) + 0.3 * y
    pooled = Pooled(np.ones(n, dtype=int), {2: {"max": csr_array(z), "mean": csr_array(z / 2)}}, {2: np.full(n, 50.0, dtype=np.float32)})
    return [pooled], pd.DataFrame({"correct": y.astype(int), "item": [str(i) for i in range(n)]})


def test_the_planted_feature_is_picked_and_its_steering_makes_every_answer_right():
    lab = lab_with_letters()
    toy, rows = task(new=1)
    plan = replace(POST, draws=3, scales=(0.5,), sizes=(9, 100))
    choices = trial.methods(lab, toy, rows[:4], *planted_pooled(), plan, work=Work(batch_size=4, progress=False))
    picks = {(c.study, c.method, c.draw, c.value): c.picks for c in choices}
    coefficient = {"pools: mean, mean": 100, "pools: max, mean": 100}
    for name in ("CorrSteer-A", "CorrSteer-S", "CorrSteer-P", "mutual information", "CAA score", "pools: mean, max", *coefficient):
        (only,) = picks["main", name, 0, 1.0]
        assert (only.layer, only.feature, only.coefficient) == (2, 0, pytest.approx(coefficient.get(name, 200))), name
    (negative,) = picks["main", "negative, all layers", 0, 1.0]
    assert negative.feature == 5 and negative.coefficient <= 0
    drawn = [picks["main", "random features, same push", n, 1.0][0] for n in range(3)]
    assert {p.feature for p in drawn} == {7} and np.allclose([p.coefficient for p in drawn], 200), "the only other with r > 0"
    assert picks["scale", "CorrSteer-A", 0, 0.5][0].coefficient == pytest.approx(100)
    assert [k for k in picks if k[0] == "size"] == [("size", "CorrSteer-A", 0, 9)], "no more answers than there are"
    answers = trial.answer(lab, toy, rows, [trial.UNSTEERED, *choices], trial.readings(lab, plan), work=QUIET)
    assert len(answers) == len(rows) * (1 + len(choices))
    right = answers[answers.study == "main"].groupby("method").correct.mean()
    assert right["CorrSteer-A"] == 1.0 and right["baseline"] < 1.0 and right["random features, same push"] < 1.0


def test_the_shuffled_control_moves_the_labels_of_an_item_together():
    """Two items, one right in all its wordings: shuffled whole, feature 0 marks the right one or the wrong one, and nothing between."""
    y = np.repeat([1, 0], 20)
    z = np.zeros((40, 128), dtype=np.float32)
    z[:, 0] = 5.0 * y
    pooled = Pooled(np.ones(40, dtype=int), {2: {"max": csr_array(z), "mean": csr_array(z)}}, {2: np.ones(40, dtype=np.float32)})
    selection, found = pd.DataFrame({"correct": y, "item": np.repeat(["a", "b"], 20)}), set()
    for seed in range(12):
        plan = replace(POST, seed=seed, rules=(), controls=("shuffled labels",))
        (control,) = trial.methods(lab_with_letters(), task()[0], (), [pooled], selection, plan)
        found.add(tuple((p.feature, round(p.r, 6)) for p in control.picks))
    assert found == {((0, 1.0),), ()}, "r is 1 or -1, and what has r < 0 is not picked"


def test_what_steers_alike_is_asked_once_and_what_picks_nothing_is_not_steered(monkeypatch):
    lab, asked, real = lab_with_letters(), [], trial.generate
    monkeypatch.setattr(trial, "generate", lambda lab_, prompts, arms, **how: asked.append(len(arms)) or real(lab_, prompts, arms, **how))
    toy, rows = task(new=1)
    plan, idle = replace(POST, draws=2, rules=("CorrSteer-A", "CAA score", "Fisher ratio")), trial.Choice("idle", study="other", source="x")
    choices = trial.methods(lab, toy, rows[:4], *planted_pooled(), plan)
    answers = trial.answer(lab, toy, rows, [*choices, trial.UNSTEERED, idle], trial.readings(lab, plan), work=QUIET)
    assert asked == [len({tuple((p.feature, p.coefficient) for p in c.picks) for c in choices} | {()})] and asked[0] < len(choices)
    texts = answers.groupby(["study", "method", "draw"]).text.agg(list)
    assert texts["main", "CorrSteer-A", 0] == texts["main", "CAA score", 0] != texts["main", "baseline", 0] == texts["other", "idle", 0]
    assert set(answers[answers.study == "other"].source) == {"x"}


def test_one_outcome_only_picks_nothing_and_wrong_names_are_refused():
    lab = lab_with_letters()
    toy, rows = task()
    pooled, selection = planted_pooled()
    plan = trial.Plan(rules=("CorrSteer-A", "CorrSteer-P"), controls=("shuffled labels",), sizes=(5,), others=False)
    found = trial.methods(lab, toy, rows, pooled, selection.assign(correct=0), plan)
    assert [(c.method, c.picks) for c in found] == [(m, ()) for m in ("CorrSteer-A", "CorrSteer-P", "shuffled labels", "CorrSteer-A")]
    wrong = {"rules": ("CorrSteer-Z",), "controls": ("none",), "site": "mid", "pool": "sum", "steer_pool": "sum"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{name}: expected some of .*, got (CorrSteer-Z|none|mid|sum)$"):
            trial.Plan(**{name: value})


def test_the_selection_pass_equals_plain_generation():
    lab = lab_with_letters()
    toy, rows = task()
    answers, (pooled,) = trial.select_on(lab, toy, rows, [Reading(lab.saes)], work=QUIET)
    plain = trial.ask(lab, toy, rows, work=QUIET)
    assert answers.text.tolist() == plain.text.tolist() and answers.correct.tolist() == plain.correct.tolist()
    assert len(pooled) == len(rows) and answers.kind.tolist() == [q.kind for q in rows]


def test_pooled_positions_end_where_hugging_face_ends_the_answer():
    """Two end tokens in the generation config, of which the tokenizer knows one: nothing past the answer is pooled."""
    lab, toy = tiny.lab(), task(new=32)[0]
    rows = [Question("toy", p, "g", p, "k") for p in ("I think", "a", "The longest of the prompts here", "So")]
    first = trial.ask(lab, toy, rows, work=QUIET).tokens[0]
    lab.hf.generation_config.eos_token_id = [2, first[3]]
    _, (pooled,) = trial.select_on(lab, toy, rows, [Reading(lab.saes)], work=QUIET)
    for question, window in zip(rows, pooled.window):
        ids = torch.tensor([prompt_ids(lab.tokenizer, question.prompt)])
        new = lab.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
        assert window == len([t for t in new.tolist() if t not in (0, 2, first[3])])
    assert pooled.window[0] <= 3


def test_options_are_answered_by_likelihood_whatever_the_model_would_write():
    """Pushed to write "k", the model ranks "k" first: right on the questions whose option it is, wrong on the others."""
    lab, (pairs, rows) = lab_with_letters(), options()
    push = trial.Choice("push", (trial.Pick(2, 0, 300.0, 0.5, 0.5, 1, 1),))
    found = trial.answer(lab, pairs, rows, [trial.UNSTEERED, push], trial.readings(lab, POST), work=QUIET)
    steered, plain = (found[found.method == name].reset_index(drop=True) for name in ("push", "baseline"))
    assert steered.correct.tolist() == [1, 0] * 6 and set(steered.text) == {"k"} and set(found.outcome) <= {"right", "wrong"}
    assert set(steered.said) == {"k", "w"} and set(found.chance) == {0.5}
    gap = np.where(np.arange(12) % 2 == 0, 1, -1) * (steered.margin - plain.margin)
    assert (gap > 1).all(), "nats that k gains on w"


def test_a_run_on_options_pools_over_the_option_that_the_model_chose():
    lab, (pairs, _) = lab_with_letters(), options(40)
    found = trial.run(lab, pairs, replace(POST, within=(0.0, 1.0), n_test=6, draws=1), work=QUIET)
    assert set(found.pooled.window) == {2} and len(found.answers.question.unique()) == 6  # the space and the letter
    first = found.asked[0]
    chosen = found.selection.text[0]
    ids = prompt_ids(lab.tokenizer, first.prompt)
    whole = torch.tensor([ids + lab.tokenizer(f" {chosen}", add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        hidden = []
        handle = lab.block(2).register_forward_hook(lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        lab.hf(input_ids=whole)
        handle.remove()
        z = lab.saes[2].encode(hidden[0][0, len(ids) - 1 : len(ids) + 1]).amax(0)
    np.testing.assert_allclose(found.pooled.z(2)[[0]].toarray().ravel(), z.numpy(), atol=2e-4)


def test_a_run_keeps_parts_apart_leaves_out_kinds_and_resumes(tmp_path):
    lab = lab_with_letters()
    plain = trial.ask(lab, task(60, new=1)[0], task(60, new=1)[1], work=QUIET).text
    gold = [plain[i] if i % 4 == 0 and plain[i].isalpha() else "zzz" for i in range(60)]
    kind = ["known" if i % 2 == 0 else "never" for i in range(60)]  # known: the model's own letter is right every other time
    rows = tuple(Question("toy", str(i), f"g:{i}", f"Question {i}?", gold[i], kind=kind[i]) for i in range(60))
    toy = Task("toy", "contains", 1, False, {"all": rows}, units=True)
    plan, work = trial.Plan(seed=3, n_test=10, within=(0.05, 0.95), draws=2, scales=(2.0,), sizes=(6,)), Work(8, tmp_path, progress=False)
    found = trial.run(lab, toy, plan, work=work)
    assert found.kinds == ("known",) and {q.kind for q in found.test} == {"known"}
    assert not {q.group for q in found.test} & set(found.selection.group)
    assert len(found.pooled) == len(found.selection) == len(found.y) and set(found.answers.seed) == {3}
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = trial.run(lab, toy, plan, work=work)
    pd.testing.assert_frame_equal(found.answers, again.answers)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    calm = trial.run(lab, toy, replace(plan, min_fired=10**6), work=QUIET)  # nothing fires so often
    idle = {name for name, picks in calm.picks.items() if not picks}
    assert idle == set(calm.picks) - {"features that fire on ten answers"}
    texts = calm.answers[calm.answers.method.isin(idle)].groupby("question").text.nunique()
    assert (texts == 1).all(), "what picks nothing answers as without steering"


def test_the_configuration_is_the_released_one_unless_said_otherwise():
    plan = trial.Plan()
    assert (plan.site, plan.pool, plan.steer_pool, plan.min_fired) == ("pre", "max", "max", 0)
    lab, (toy, rows) = lab_with_letters(), task(60)
    first, (pooled,) = trial.select_on(lab, toy, rows, [Reading(lab.saes)], work=QUIET)
    _, (below,) = trial.select_on(lab, toy, rows, [Reading({1: lab.saes[2]}, "post")], work=QUIET)
    assert (pooled.z(2) != below.z(1)).nnz == 0, "SAE L reads what enters block L"
    assert first.tokens.tolist() == trial.ask(lab, toy, rows, work=QUIET).tokens.tolist()


def test_the_other_site_and_residual_coordinates_are_read_chosen_and_steered_where_they_belong(monkeypatch):
    """Each with its own picks; the edits' blocks are those of its reading."""
    lab = lab_with_letters()
    rows = tuple(Question("toy", str(i), f"g:{i}", f"Question {i}?", "k" if i % 2 else "zzz") for i in range(60))
    toy, seen, real = Task("toy", "contains", 1, False, {"all": rows}, units=True), [], trial.generate
    coin = np.random.default_rng(0)
    grade = trial.graded
    monkeypatch.setattr(trial, "graded", lambda t, x, q: grade(t, x, q).assign(correct=coin.integers(2, size=len(x))))
    monkeypatch.setattr(trial, "generate", lambda l, p, arms, **how: seen.append(arms) or real(l, p, arms, **how))
    found = trial.run(lab, toy, trial.Plan(n_test=6, draws=1), work=QUIET)
    assert list(found.readings) == ["", "residual coordinates", "CorrSteer-A, post"]
    (own,), (raw,), (post,) = (found.picks[name] for name in ("CorrSteer-A", "residual coordinates", "CorrSteer-A, post"))
    blocks = {arm.name.split(": ")[1]: [(e.layer, e.vector) for e in arm.edits] for arm in seen[-1]}
    for name, block, row in (
        ("CorrSteer-S", 1, lab.saes[2].W_dec[own.feature]),
        ("residual coordinates", 1, torch.eye(64)[raw.feature]),
        ("CorrSteer-A, post", 2, lab.saes[2].W_dec[post.feature]),
    ):
        ((layer, vector),) = blocks[name]
        assert layer == block and torch.equal(vector, row.detach()), name
    assert set(found.answers[found.answers.method == "residual coordinates"].question) == set(range(6))
    assert list(trial.readings(tiny.lab(saes={0: tiny.planted_sae()}), replace(POST, others=True))) == ["", "residual coordinates"]


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

"""Generation success, best factors, filters, co-occurrence, and the AxBench-style score, on cases whose answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.engine.generate import Arm
from steerkit.engine.steer import Add
from steerkit.judges import Panel
from steerkit.judges.related import related_judge
from steerkit.methods.output_scores import success as S
from steerkit.scores import axbench as X
from steerkit.store import Work


def test_hits_count_occurrences():
    texts = ([5, 7, 5, 9], [1, 2, 3])
    assert np.mean([S.hits(t, [5, 9], k=1) for t in texts]) == 1.0
    assert np.mean([S.hits(t, [5, 9], k=20) for t in texts]) == 1.5


def test_the_best_factor_of_the_toy_table():
    factors, perplexity = [0.2, 0.4, 0.8, 1.2, 2.0], [10, 11, 20, 30, 60]
    assert S.best_factor(factors, [0, 0.5, 2, 3.5, 2.9], perplexity) == (0.8, False)
    assert S.best_factor(factors, [0] * 5, perplexity) == (0.2, True)
    assert S.best_factor([2, 0.2], [4, 0], [1, 1]) == (0.2, True)  # success above the cap does not count
    scaled = [S.best_factor(factors, [0, 0.5, 2, 3.5, 2.9], [c * p for p in perplexity]) for c in (0.1, 7)]
    assert scaled == [(0.8, False)] * 2  # dividing by a maximum, as the paper does, changes nothing


@pytest.fixture
def planted():
    """After the last block a feature's push writes the letter whose unembedding is its decoder row."""
    lab = tiny.lab(saes={2: tiny.planted_sae()})
    head = lab.hf.get_output_embeddings().weight.detach()
    letters = [lab.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ab."]
    with torch.no_grad():
        for i, letter in enumerate(letters):
            lab.sae(2).W_dec[i] = head[letter] / head[letter].norm()
    return lab, letters


def test_sweep_counts_the_planted_letter_and_stops_after_a_full_stop(planted, tmp_path):
    lab, letters = planted
    lens = {2: torch.tensor([[t, 3] for t in letters])}
    call = {"prompts": ["So", "Well"], "factors": [0.0, 200.0], "sampling": replace(S.SAMPLING, max_new_tokens=6)}
    call["work"] = Work(5, tmp_path, progress=False)
    texts = S.sweep(lab, {2: [0, 1, 2]}, lens, **call)
    assert len(texts) == 3 * 2 * 2 and set(texts.columns) >= {"at1", "at5", "at20", "loss", "tokens"}
    pushed = texts[texts.factor == 200].groupby("feature").at20.mean()
    assert pushed[0] == pushed[1] == 6.0  # every token is the letter
    assert pushed[2] == 1.0  # the full stop ends the text and counts once
    for row in texts[texts.factor == 200].to_dict("records"):  # letters: text and tokens are one to one
        ids = lab.tokenizer(row["prompt"] + row["text"], add_special_tokens=False)["input_ids"]
        assert row["tokens"] == len(ids)
        with torch.inference_mode():
            logits = lab.hf(input_ids=torch.tensor([[lab.tokenizer.bos_token_id, *ids]])).logits[0].double().log_softmax(-1)
        assert row["loss"] == pytest.approx(-sum(float(logits[i, t]) for i, t in enumerate(ids)), rel=1e-4)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    pd.testing.assert_frame_equal(texts, S.sweep(lab, {2: [0, 1, 2]}, lens, **call))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files  # nothing ran twice


def test_period_tokens_are_those_that_show_one():
    tok = tiny.tokenizer()
    assert [tok.decode([i]) for i in S.period_tokens(tok)] == ["."]


def test_a_sweep_finds_its_rows_again_whatever_order_the_vocabulary_is_listed_in(planted, tmp_path, monkeypatch):
    lab, letters = planted
    call = {"prompts": ["So"], "factors": [200.0], "sampling": replace(S.SAMPLING, max_new_tokens=3)}
    for stop in ([letters[2], letters[0]], [letters[0], letters[2]]):
        monkeypatch.setattr(S, "period_tokens", lambda tok, stop=stop: stop)
        S.sweep(lab, {2: [1]}, {2: torch.tensor([[letters[1], 3]])}, work=Work(out=tmp_path, progress=False), **call)
    assert len(list(tmp_path.iterdir())) == 2  # texts and their losses, once


def test_best_factors_are_chosen_on_one_table_and_reported_on_another():
    def table(values):
        rows = [(13, f, s, v, 10.0, 5) for (f, s), vs in values.items() for v in vs]
        return pd.DataFrame(rows, columns=["layer", "feature", "factor", "at20", "loss", "tokens"])

    chosen_on = table({(1, 0.5): [1, 1], (1, 2.0): [2, 2], (2, 0.5): [0, 0], (2, 2.0): [0, 0]})
    reported = table({(1, 0.5): [9, 9], (1, 2.0): [0.5, 1.5], (2, 0.5): [0.25, 0.25], (2, 2.0): [7, 7]})
    found = S.at_best(chosen_on, reported).set_index("feature")
    assert found.factor.to_dict() == {1: 2.0, 2: 0.5} and found.success.to_dict() == {1: 1.0, 2: 0.25}
    assert found.no_success.to_dict() == {1: False, 2: True}
    assert found.perplexity[1] == pytest.approx(np.exp(2.0))


def test_filter_keeps_the_planted_good_features_and_random_subsets_stay_at_the_mean():
    rng = np.random.default_rng(0)
    score = rng.uniform(size=400)
    value = (score > 0.5) + rng.normal(0, 0.1, 400)
    found = S.filtered(score, value, [0.0, 0.5, 0.9, 2.0]).set_index("threshold")
    assert found.index.tolist() == [0.0, 0.5, 0.9]  # nothing passes 2
    assert found.n.tolist() == [(score >= t).sum() for t in (0, 0.5, 0.9)]
    assert found.value[0.0] == pytest.approx(value.mean()) and found.value[0.5] == pytest.approx(1, abs=0.05)
    assert found.random_low[0.9] < value.mean() < found.random_high[0.9] < found.low[0.9]


def test_cooccurrence_and_pmi_equal_counting():
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 12, size=6).tolist() for _ in range(200)]
    pairs = [(0, 1), (3, 11), (5, 5)]
    n, counts = S.cooccurrence(rows, pairs, vocab=12)
    sets = [set(r) for r in rows]
    assert n == 200
    assert counts.tolist() == [[sum(a in s for s in sets), sum(b in s for s in sets), sum({a, b} <= s for s in sets)] for a, b in pairs]
    a, b, both = counts[0]
    assert S.pmi(n, a, b, both) == pytest.approx(np.log2((both / n) / ((a / n) * (b / n))))
    assert np.isnan(S.pmi(10, 3, 3, 0))


def test_aggregations_of_the_toy_ratings():
    scores = np.stack([[2, 0, 2, 0, 2], [2] * 5, [2, 2, 0, 2, 0]], 1).astype(float)
    assert X.overall(scores, how="means") == pytest.approx(1.385, abs=5e-4) and X.overall(scores, how="texts") == pytest.approx(0.4)
    every = np.array(np.meshgrid([0, 1, 2], [0, 1, 2], [0, 1, 2])).reshape(3, -1).T.astype(float)
    assert set(np.round(X.harmonic(every), 6)) == {0, 1, 1.2, 1.5, 2}
    rng = np.random.default_rng(0)
    for _ in range(50):  # the harmonic mean is concave: of means is never smaller
        some = rng.uniform(0, 2, size=(7, 3))
        assert X.overall(some, how="means") >= X.overall(some, how="texts") - 1e-12
    with pytest.raises(ValueError, match="texts"):
        X.overall(scores, how="sum")


def test_related_knows_the_instruction_that_a_text_answers():
    asked = ["How do I boil an egg?", "Which tyres suit a racing bike?", "Name a warm country for a holiday."]
    judge = related_judge(asked)
    answer = ["Put the egg into boiling water for six minutes."]
    assert judge(answer, asked[:1])[0] == 1.0 and judge(answer, asked[1:2])[0] < 1.0
    assert judge([" "], asked[:1])[0] == 0.0
    with pytest.raises(ValueError, match="instruction"):
        judge(answer, ["Another one"])
    with pytest.raises(ValueError, match="two different"):
        related_judge(asked[:1] * 2)


def share(topic):
    return lambda texts, prompts=None: np.array([t.count(topic) / max(len(t), 1) for t in texts])


def fine(texts, prompts=None):
    return np.ones(len(texts))


PLANTED = Panel("planted", share, fine, fine)


def test_the_factor_is_chosen_on_other_instructions_than_it_is_reported_on():
    """Planted: a push writes the topic's letter; only the large factor does so on both halves."""
    lab = tiny.lab()
    row = lab.hf.get_output_embeddings().weight.detach()[lab.tokenizer("a", add_special_tokens=False)["input_ids"][0]]
    pushes = [Arm("x", Add(2, row, s), s, {"topic": "a", "method": "row", "layer": 2}) for s in (0.0, 900.0)]
    asked, call = ["One?", "Two?", "Three?", "Four?"], {"sampling": replace(X.SAMPLING, max_new_tokens=4), "work": Work(progress=False)}
    call["judges"] = PLANTED
    pushed = X.steer(lab, pushes, asked, **call)
    plain = X.steer(lab, [Arm("y", labels={"topic": "a", "method": "prompting", "layer": -1})], asked, prefix={"a": "Say a. "}, **call)
    texts = pd.concat([pushed, plain], ignore_index=True)
    assert list(texts) == ["factor", "instruction", "text", "concept", "instruct", "fluency", "topic", "method", "layer"]
    assert len(texts) == 4 * 3 and set(texts.instruction) == set(asked)  # judged on the plain instruction
    found = X.held_out(texts).set_index(["topic", "method", "layer"])
    assert found.factor["a", "row", 2] == 900.0 and found.score["a", "row", 2] == pytest.approx(2.0) and found.n["a", "row", 2] == 2
    spoiled = texts.copy()  # what happens on the reported half cannot change the choice
    spoiled.loc[spoiled.instruction.isin(["Two?", "Four?"]) & (spoiled.factor == 900.0), "concept"] = 0.0
    again = X.held_out(spoiled).set_index("method")
    assert again.factor["row"] == 900.0 and again.score["row"] == 0.0


def test_what_is_put_before_the_instruction_is_read_by_the_model_alone():
    lab, read = tiny.lab(), []
    lab.hf.base_model.register_forward_pre_hook(lambda _m, _a, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    arms = [Arm("ask", labels={"topic": topic}) for topic in ("love", "anger")]
    call = {"sampling": replace(X.SAMPLING, max_new_tokens=1), "work": Work(progress=False), "judges": PLANTED}
    found = X.steer(lab, arms, ["Why?", "Who?"], prefix={"love": "Say love. "}, **call)
    asked = {lab.tokenizer.decode(row[row != 0]) for ids in read if ids.shape[1] > 1 for row in ids}
    assert sum("Say love. Wh" in text for text in asked) == sum("Say" not in text for text in asked) == 2
    assert found.topic.tolist() == ["anger"] * 2 + ["love"] * 2 and set(found.instruction) == {"Why?", "Who?"}


def test_an_arm_without_a_topic_is_refused():
    for arms in ([], [Arm("x", labels={"method": "m"})]):
        with pytest.raises(ValueError, match="each with a label `topic`"):
            X.steer(tiny.lab(), arms, ["Why?", "Who?"])

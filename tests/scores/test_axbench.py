"""The AxBench-style score, on cases whose answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny

from steerkit.engine.generate import Arm
from steerkit.engine.steer import Add
from steerkit.judges import Panel
from steerkit.judges.related import related_judge
from steerkit.methods.output_scores.success import at_best
from steerkit.scores import axbench as X
from steerkit.store import Work

QUIET = Work(progress=False)


def joined(scores, how):
    table = pd.DataFrame(scores, columns=X.SCORES).assign(method="x", factor=1.0)
    return X.by_factor(table, ["method"], how=how).score[0]


def test_aggregations_of_the_toy_ratings():
    scores = np.stack([[2, 0, 2, 0, 2], [2] * 5, [2, 2, 0, 2, 0]], 1).astype(float)
    assert joined(scores, "means") == pytest.approx(1.385, abs=5e-4) and joined(scores, "texts") == pytest.approx(0.4)
    every = np.array(np.meshgrid([0, 1, 2], [0, 1, 2], [0, 1, 2])).reshape(3, -1).T.astype(float)
    assert set(np.round(X.harmonic(every), 6)) == {0, 1, 1.2, 1.5, 2}
    rng = np.random.default_rng(0)
    for _ in range(20):  # the harmonic mean is concave: of means is never smaller
        some = rng.uniform(0, 2, size=(7, 3))
        assert joined(some, "means") >= joined(some, "texts") - 1e-12
    with pytest.raises(ValueError, match="texts"):
        joined(scores, "sum")


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


def share(key):
    return lambda texts, prompts=None: np.array([t.count(key) / max(len(t), 1) for t in texts])


def fine(texts, prompts=None):
    return np.ones(len(texts))


PLANTED = Panel("planted", share, fine, fine)


def test_the_factor_is_chosen_on_other_instructions_than_it_is_reported_on():
    """Planted: a push writes the letter; only the large factor does so on both halves."""
    lab = tiny.lab()
    row = lab.hf.get_output_embeddings().weight.detach()[lab.tokenizer("a", add_special_tokens=False)["input_ids"][0]]
    pushes = [Arm("x", Add(2, row, s), s, {"topic": "a", "method": "row"}) for s in (0.1, 900.0)]
    asked = ["One?", "Two?", "Three?", "Four?"]
    texts = X.steer(lab, pushes, asked, samples=2, sampling=replace(X.SAMPLING, max_new_tokens=4), work=QUIET)
    assert list(texts) == ["prompt", "topic", "method", "factor", "sample", "text", "tokens", "share", "instruction"]
    assert len(texts) == 2 * 4 * 2 and [asked[i] for i in texts.instruction] == texts.prompt.tolist()
    twice = X.steer(lab, pushes, ["Why?", "Why?"], sampling=replace(X.SAMPLING, max_new_tokens=2), work=QUIET)
    assert twice.instruction.tolist() == [0, 0, 1, 1]  # equal instructions are told apart
    texts = X.judged(texts, PLANTED, work=QUIET)
    assert texts[texts.factor == 900.0].concept.tolist() == [2.0] * 8  # every token is the letter

    def chosen(texts):
        odd = texts.instruction % 2 == 1
        halves = (X.by_factor(texts[half], ["topic", "method"]) for half in (~odd, odd))
        return at_best(*halves, rule="score", by=["topic", "method"]).iloc[0]

    assert chosen(texts).factor == 900.0 and chosen(texts).score == pytest.approx(2.0) and chosen(texts).n == 4
    spoiled = texts.copy()  # what happens on the reported half cannot change the choice
    spoiled.loc[(spoiled.instruction % 2 == 1) & (spoiled.factor == 900.0), "concept"] = 0.0
    assert chosen(spoiled).factor == 900.0 and chosen(spoiled).score == 0.0


def test_a_text_is_judged_for_the_concept_that_its_columns_name():
    columns = {"prompt": ["p", "q", "p"], "text": ["aab", "aab", "bbb"], "layer": [1, 1, 2], "feature": [5, 6, 5]}
    texts = pd.DataFrame(columns, index=[4, 2, 9])
    asked = []
    judges = Panel("planted", lambda key: asked.append(key) or share("a" if key == (1, 5) else "b"), fine, fine)
    found = X.judged(texts, judges, by=["layer", "feature"], work=QUIET)
    assert asked == [(1, 5), (1, 6), (2, 5)] and found.concept.to_dict() == pytest.approx({4: 4 / 3, 2: 2 / 3, 9: 2.0})
    assert (found[["instruct", "fluency"]] == 2.0).all(axis=None)

"""Tables of answers: counts by hand, the published side effect ratios, intervals over selections, and picks with their floors."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from scipy.sparse import csr_array

from steerkit.methods.corrsteer import answers as tables
from steerkit.methods.corrsteer import trial
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.methods.corrsteer.pooling import Reading
from steerkit.questions import Question, Task

ARM = {"study": "main", "source": "", "value": 1.0, "draw": 0}


def rows(method, correct, texts=None, groups=None, **labels):
    """Answers of one arm, one a question."""
    n = len(correct)
    frame = pd.DataFrame({"question": range(n), "correct": correct, "text": texts or [str(c) for c in correct]})
    frame = frame.assign(group=groups or ["a", "a", "b", "b"] * (n // 4) + ["c"] * (n % 4), margin=np.nan, method=method, **ARM | labels)
    return frame.assign(outcome=np.where(frame.text == "?", "format_none", np.where(frame.correct == 1, "right", "wrong")))


def a_trial(seed, base, *, selection=None, saes=None, pooled=None, choices=()):
    task = Task("toy", "contains", 1, False, {})
    nothing, plan = pd.DataFrame(), trial.Plan(seed=seed, least=3)
    pooled = pooled or Pooled(np.zeros(0, dtype=int), {}, {})
    parts = (nothing if selection is None else selection, {"": Reading(saes or {})}, pooled, choices, (), nothing if base is None else base)
    return trial.Trial(task, plan, ("k",), (), *parts)


def test_side_effects_are_counted_by_group_against_the_unsteered_answers():
    base = rows("baseline", [1, 0, 0, 1, 1], ["A", "B", "C", "D", "?"])
    steered = rows("x", [1, 1, 0, 0, 1], ["A", "A", "A", "?", "?"])
    found = tables.tally(pd.concat([base, steered]), a_trial(0, base)).set_index(["method", "group"])
    assert found.loc["x", "n"].to_dict() == {"a": 2, "b": 2, "c": 1} and found.loc["x", "correct"].to_dict() == {"a": 2, "b": 0, "c": 1}
    # b: C became A and stayed wrong, D became a format error; c: the same text, graded as before
    assert found.loc["x", ["worse", "better", "changed", "malformed", "commonest"]].values.tolist() == [
        [0, 1, 1, 0, 2],
        [1, 0, 2, 1, 1],
        [0, 0, 0, 1, 0],
    ]
    assert found.loc["baseline", "changed"].sum() == 0 and found.margin.isna().all()


@pytest.mark.parametrize("negative,positive,ratio", [(182, 697, 0.207), (1108, 1616, 0.407), (131, 570, 0.187)])
def test_side_effects_give_the_published_ratios(negative, positive, ratio):
    """Counts of the paper's MMLU table, with wrong answers that stay wrong, and unchanged ones, in between."""
    n, both = 14_042, negative + positive
    was, now = np.zeros(n, dtype=int), np.zeros(n, dtype=int)
    was[:negative], now[negative:both] = 1, 1
    base = rows("baseline", was, ["A"] * n)
    steered = rows("CorrSteer-A", now, ["B"] * both + ["C"] * 50 + ["A"] * (n - both - 50))
    found = tables.tally(pd.concat([base, steered]), a_trial(0, base))
    told = tables.compare(found[found.method != "baseline"], found[found.method == "baseline"], n_boot=100).iloc[0]
    assert (told.worse, told.better, told.changed) == (negative, positive, both + 50)
    assert told.SER == pytest.approx(ratio, abs=5e-4)
    if negative == 182:
        assert 100 * told.gain.value == pytest.approx(3.67, abs=5e-3)
    same = tables.compare(found[found.method == "baseline"], found[found.method == "baseline"], n_boot=100).iloc[0]
    assert same.gain.value == 0 and np.isnan(same.SER)


def tallied(seed, base, other, **labels):
    plain = rows("baseline", base)
    return tables.tally(pd.concat([plain, rows("x", other, **labels)]), a_trial(seed, plain))


def split(found):
    return found[found.method != "baseline"], found[found.method == "baseline"]


def test_the_unit_is_the_selection_and_a_single_one_has_groups():
    one = tallied(0, [1, 0, 0, 1], [1, 1, 0, 0])
    both = pd.concat([one, tallied(1, [0, 0, 1, 1], [1, 1, 1, 1]), tallied(2, [0, 0, 0, 1], [1, 0, 0, 1])])
    found = tables.compare(*split(both), n_boot=4000).loc["x"]
    assert (found.worse, found.better, found.changed, found.questions) == (1, 4, 5, 12) and found.SER == 0.2
    gains = [0.0, 0.5, 0.25]  # one number a selection
    plain = scipy.stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert found.gain.n == 3 and found.gain.value == 0.25 and found["mean"].value == pytest.approx(np.mean([0.5, 1.0, 0.5]))
    assert found.gain.low < plain.low and found.gain.high > plain.high, "groups differ, too: they widen what selections give"
    alike = pd.concat([tallied(s, [0, 0, 0, 0], [s, s, s, s]) for s in (0, 1, 0)] + [tallied(3, [0] * 4, [1] * 4)])
    alike = alike.assign(seed=np.repeat(range(4), len(alike) // 4))
    exact = scipy.stats.ttest_1samp([0.0, 1.0, 0.0, 1.0], 0).confidence_interval(0.95)
    found = tables.compare(*split(alike), n_boot=8000).loc["x"].gain
    assert (found.low, found.high) == (pytest.approx(exact.low, abs=0.05), pytest.approx(exact.high, abs=0.05))
    once = tables.compare(*split(one), n_boot=400).loc["x"].gain
    assert (once.n, once.groups, once.low, once.high) == (4, 2, -0.5, 0.5)  # a draw of twice b; twice a


def test_random_draws_are_one_arm_and_arms_of_one_run_are_compared_on_its_questions():
    draws = pd.concat([tallied(0, [1, 0, 0, 1], [1, 1, 1, 1], draw=0), tallied(0, [1, 0, 0, 1], [0, 0, 0, 0], draw=1)])
    mine, base = split(draws.drop_duplicates())
    base = base.drop_duplicates()
    found = tables.compare(mine, base, n_boot=100).loc["x"]
    assert found["mean"].value == 0.5 and found.gain.value == 0.0 and found.questions == 4
    assert (found.worse, found.better) == (1.0, 1.0), "counts are means over draws"
    two = pd.concat([base, tallied(1, [0] * 4, [0] * 4).query("method == 'baseline'")])
    assert tables.compare(mine, two, n_boot=100).loc["x"].gain.value == 0.0, "asked in one run only"
    by_value = tables.compare(pd.concat([mine.assign(value=0.5), mine.assign(value=2.0)]), base, by="value", n_boot=100)
    assert by_value.index.tolist() == [0.5, 2.0] and by_value.index.name == "value"


def test_margins_are_compared_in_nats():
    base = rows("baseline", [1, 0, 0, 1]).assign(margin=[1.0, -1.0, -2.0, 3.0])
    steered = rows("x", [1, 0, 1, 1]).assign(margin=[1.5, -0.5, 0.5, 3.5])
    found = tables.tally(pd.concat([base, steered]), a_trial(0, base))
    told = tables.compare(*split(found), column="margin", n_boot=100).loc["x"]
    assert told["mean"].value == pytest.approx(1.25) and told.gain.value == pytest.approx(1.0)


def selection(correct, chance=np.nan, kind="k", item=None, said="s"):
    n = len(correct)
    frame = pd.DataFrame({"correct": correct, "chance": chance, "kind": kind, "said": said, "group": [f"g{i}" for i in range(n)]})
    return frame.assign(item=item or [str(i) for i in range(n)], outcome=np.where(frame.correct == 1, "right", "wrong"))


def test_knowledge_is_testable_only_where_unsteered_answers_beat_chance():
    rng, parts = np.random.default_rng(0), []
    for name, p in {"able": 0.6, "guess": 0.25}.items():
        task = Task(name, "options", 1, False, {})
        parts += [tables.cells(selection((rng.random(80) < p).astype(int), 0.25), task, seed) for seed in range(3)]
    written = selection((np.arange(40) < 2).astype(int), 0.25)
    found = tables.base_rates(pd.concat([*parts, tables.cells(written, Task("toy", "letter", 1, False, {}), 0)]), least=3)
    assert found.knowledge.to_dict() == {"able": True, "guess": False, "toy": False} and found["above chance"]["toy"] is None
    assert found.enough.to_dict() == {"able": True, "guess": True, "toy": False} and found["rarer outcome"]["toy"] == 2
    assert found["above chance"]["able"].value == pytest.approx(found.accuracy["able"].value - 0.25) and found.answers["able"] == 80
    assert found.accuracy["able"].n == 3 and found.accuracy["toy"].groups == 40


def picks(columns, y, n_null=300, **about):
    z = np.zeros((len(y), 6), dtype=np.float32)
    for i, values in columns.items():
        z[:, i] = values
    pooled = Pooled(np.ones(len(y), dtype=int), {2: {"max": csr_array(z), "mean": csr_array(z)}}, {2: np.full(len(y), 40.0, np.float32)})
    sae = SimpleNamespace(W_dec=torch.eye(6) * 2)
    choices = tuple(trial.Choice(f"CorrSteer-{v}", (trial.Pick(2, 0, 1.0, 1.0, 1.0, 1, 1),)) for v in "AS")
    found = a_trial(5, None, selection=selection(y.astype(int), **about), saes={2: sae}, pooled=pooled, choices=choices)
    return tables.best_picks(found, n_null=n_null)


def test_a_pick_has_a_floor_over_the_run_and_one_within_kind_and_answer():
    """Feature 0 knows the answer; feature 3 only knows the kind, and is the best once feature 0 is gone."""
    even = np.arange(40) % 2 == 0
    y = np.random.default_rng(0).random(40) < np.where(even, 0.9, 0.1)
    kind = np.where(even, "even", "odd").tolist()
    knows = picks({0: 3.0 * y, 3: even * 2.0, 4: ~y * 1.0}, y, kind=kind)
    best, only_kind = knows[knows["rank"] == 1].iloc[0], picks({3: even * 2.0}, y, kind=kind).iloc[0]
    assert (best.feature, best.r, best.fired_neg) == (0, pytest.approx(1.0), 0) and best.above and best.above_within
    assert best.floor_within > best.floor and (best.push, best.norm) == (pytest.approx(6.0), 40.0), "3 over right answers, a row of norm 2"
    assert only_kind.feature == 3 and only_kind.above and not only_kind.above_within
    assert only_kind.r == pytest.approx(np.corrcoef(even, y)[0, 1]) and (only_kind.seed, only_kind.n, only_kind.layer) == (5, 40, 2)
    assert knows[knows.sign == -1].feature.tolist()[0] == 4 and not knows[knows.sign == -1].above.any()
    assert knows[knows.S].feature.tolist() == [0] and not knows.P.any()
    assert picks({3: even * 2.0}, np.ones(40)).empty, "one outcome only: nothing correlates"


def test_labels_that_are_constant_in_a_kind_are_flagged_not_counted():
    even = np.arange(40) % 2 == 0
    kind = np.where(even, "safe", "unsafe").tolist()
    found = picks({0: even * 1.0, 1: np.random.default_rng(1).random(40)}, even, kind=kind).iloc[0]  # safe is right, unsafe is wrong
    assert found.movable == 0 and np.isnan(found.floor_within) and not found.above_within and found.above
    some = even | (np.arange(40) == 1)  # one unsafe one is right: twenty labels can move
    found = picks({0: even * 1.0, 1: np.random.default_rng(1).random(40)}, some, kind=kind).iloc[0]
    assert found.movable == 20 and found.floor_within > 0


def test_an_answer_asked_of_many_is_no_knowledge():
    """Four facts in three wordings say Europe, and are right: a feature that fires on Europe is not above its floor."""
    rng = np.random.default_rng(2)
    item = np.repeat([f"fact {i}" for i in range(40)], 3).tolist()
    europe = np.repeat(np.arange(40) % 2 == 0, 3)
    y = np.repeat(rng.random(40) < np.where(np.arange(40) % 2 == 0, 0.85, 0.15), 3)
    found = picks({0: europe * 1.0}, y, item=item, said=np.where(europe, "Europe", "Asia").tolist()).iloc[0]
    assert found.feature == 0 and found.above and not found.above_within and found.movable == 120


def test_bias_of_answers_by_method_and_context():
    meta = {"category": "Age", "polarity": "neg", "target": "A", "unknown": "C"}
    test = [Question("bbq_ambig", str(i), "Age-1", "?", "C", ("one", "two", "unknown"), kind="ambig", meta=meta) for i in range(4)]
    answers = pd.DataFrame(
        [("calm", q, t) for q, t in enumerate([" A", "B", "C", " A."])] + [("pushed", q, "one") for q in range(4)],
        columns=["method", "question", "text"],
    ).assign(study="main")
    found = tables.bias(answers, test).set_index("method")
    # calm: A, B, C and no letter: of two that name someone one is the target, so 2/2 - 1 = 0; pushed, by option: (1 - 0) x 1
    assert found.bias["calm"] == 0.0 and found.bias["pushed"] == 1.0 and found.named.to_dict() == {"calm": 2, "pushed": 4}
    assert found.accuracy["calm"] == pytest.approx(1 / 3) and set(found.context) == {"ambig"}

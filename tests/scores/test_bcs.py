"""Behaviour times coherence: product of means, held-out peaks, paired comparison, on numbers whose answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy import stats

from steerkit.engine.decode import Sampling
from steerkit.judges import Panel
from steerkit.scores.bcs import (
    Protocol,
    agreement,
    best_scale,
    compare,
    curves,
    load_scores,
    peaks,
    product,
    save_scores,
    sweep,
    with_choice,
)
from steerkit.scores.bcs import judged as judged_by
from steerkit.store import Work
from steerkit.vectors import SteeringVector


def scores(cells, topic="t", prompt="p"):
    """Judged rows from {(method, scale): [(behaviour, coherence), ...]}."""
    same = {"topic": topic, "prompt": prompt}
    rows = [
        {**same, "method": m, "scale": float(s), "sample": i, "text": f"{m}{s}{i}", "behaviour": b, "coherence": c}
        for (m, s), pairs in cells.items()
        for i, (b, c) in enumerate(pairs)
    ]
    return pd.DataFrame(rows)


def test_product_of_means_is_not_the_mean_of_products():
    found = product(np.array([[1.0, 0.0], [0.0, 1.0]]))
    assert found["BCS"].value == 0.25 and found["behaviour"].value == 0.5 and found["BCS"].n == 2


def test_the_interval_of_a_product_is_the_plain_bootstraps():
    both = np.random.default_rng(1).random((40, 2))
    found = product(both, n_boot=4000)["BCS"]
    rng = np.random.default_rng(2)
    drawn = [both[rng.integers(40, size=40)].mean(0).prod() for _ in range(4000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.01)
    with pytest.raises(ValueError, match="finite"):
        product(np.array([[np.nan, 1.0]]))


def test_the_peak_is_picked_on_even_samples_and_scored_on_odd_ones():
    judged = scores(
        {
            ("baseline", 0): [(0.0, 1.0)] * 4,
            ("A", 20): [(1.0, 1.0), (0.2, 1.0), (1.0, 1.0), (0.2, 1.0)],  # good on even samples only
            ("A", 40): [(0.5, 1.0)] * 4,
        }
    )
    (row,) = peaks(judged).to_dict("records")
    assert row["scale"] == 20 and row["bcs"] == pytest.approx(0.2) and row["n"] == 2
    assert row["same"] == pytest.approx(0.6) and row["same_scale"] == 20  # the papers' way: the same samples
    assert best_scale(judged[judged.method == "A"]) == 20


def test_curves_give_every_method_the_unsteered_text_as_scale_0():
    judged = scores({("baseline", 0): [(0.1, 0.9)] * 4, ("A", 20): [(0.5, 0.5)] * 4, ("B", 20): [(0.2, 0.5)] * 4})
    table = curves(judged)
    at = table[table.score == "BCS"].set_index(["method", "scale"]).value
    assert at["A", 0.0] == at["B", 0.0] == pytest.approx(0.09) and at["A", 20.0] == pytest.approx(0.25)
    assert set(table.score) == {"behaviour", "coherence", "BCS"} and len(table) == 2 * 2 * 3


def test_a_setting_is_chosen_where_it_is_not_reported():
    """lambda 1 is best on even samples, lambda 0 on odd ones: the choice is 1, and its peak is what odd samples say of it."""
    texts = scores({("baseline", 0): [(0.0, 1.0)] * 8, ("l0", 20): [(0.2, 1.0), (0.9, 1.0)] * 4, ("l1", 20): [(0.6, 1.0), (0.1, 1.0)] * 4})
    both = with_choice(texts, "chosen", ["l0", "l1"])
    assert both[both.method == "chosen"].variant.unique().tolist() == ["l1"] and len(both) == len(texts) + 8
    peak = peaks(both).set_index("method").bcs
    assert peak["chosen"] == peak["l1"] == pytest.approx(0.1) and peak["l0"] == pytest.approx(0.9)
    twice = with_choice(both, "again", ["l0"])  # one choice more leaves what is known of the first
    assert twice[twice.method == "chosen"].variant.unique().tolist() == ["l1"] and set(twice[twice.method == "again"].variant) == {"l0"}


def test_kept_texts_are_judged_anew():
    lab = tiny.lab(saes={})
    judge = lambda by: Panel(by, lambda topic: lambda texts, prompts=None: np.array([len(t) + len(topic) for t in texts]) / 1e3,  # noqa: E731
                             lambda texts, prompts=None: np.array([t.count(by) for t in texts]) / 1e3,
                             lambda texts, prompts=None: np.zeros(len(texts)))  # fmt: skip
    vector = SteeringVector("v", torch.eye(tiny.D_MODEL)[0], 1, "tiny")
    protocol = Protocol(scales=(0.0, 4.0), samples=3, sampling=Sampling(max_new_tokens=5))
    first = sweep(lab, {"x": [vector], "longer": [vector]}, protocol=protocol, judges=judge("a"), work=Work(progress=False))
    again = judged_by(first, judge("b"), Work(progress=False))
    assert again.text.tolist() == first.text.tolist() and again.behaviour.tolist() == first.behaviour.tolist()
    assert again.coherence.tolist() == [t.count("b") / 1e3 for t in first.text]
    pd.testing.assert_frame_equal(judged_by(again, judge("a"), Work(progress=False)), first)


def test_agreement_looks_only_at_points_of_both_runs():
    full = curves(scores({("baseline", 0): [(0.1, 1.0)] * 4, ("A", 20): [(0.5, 1.0), (0.7, 1.0)] * 8, ("A", 40): [(0.2, 1.0)] * 4}))
    live = curves(scores({("baseline", 0): [(0.3, 1.0)] * 4, ("A", 20): [(0.6, 1.0), (0.8, 1.0)] * 2, ("B", 20): [(0.9, 1.0)] * 4}))
    apart, overlap = agreement(live, full)  # at scale 0 apart by 0.2 without a doubt, at A 20 by 0.1 with wide intervals
    assert apart.value == pytest.approx(0.15) and apart.n == 2 and overlap == 0.5


def test_compare_pairs_topics_and_its_interval_covers_a_known_difference():
    rng = np.random.default_rng(0)

    def noisy(mean, n=64):
        return [(float(b), 1.0) for b in np.clip(rng.normal(mean, 0.05, n), 0, 1)]

    parts = []
    for k, base in enumerate(np.linspace(0.2, 0.7, 8)):  # topics differ far more than methods do
        parts.append(scores({("baseline", 0): noisy(0.1), ("A", 20): noisy(base + 0.1), ("B", 20): noisy(base)}, topic=f"t{k}"))
    difference, by_topic = compare(pd.concat(parts), "A", "B")
    assert 0.1 in difference and difference.excludes(0) and difference.high - difference.low < 0.1
    assert difference.n == 8 and by_topic.tolist() == pytest.approx([0.1] * 8, abs=0.06)
    plain = stats.ttest_1samp(by_topic, 0).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((plain.low, plain.high))
    same, _ = compare(pd.concat(parts), "A", "A")
    assert 0 in same


def test_sweep_judges_each_topic_with_its_own_vectors_and_shared_ones(tmp_path):
    """Judges that read planted words: behaviour is the share of the topic's letter, coherence 1 for every text."""
    lab, asked = tiny.lab(saes={}), []

    def coherence(texts, prompts=None):
        asked.extend(zip(prompts, texts))
        return np.ones(len(texts))

    share = lambda topic: lambda texts, prompts=None: np.array([t.count(topic) / max(len(t), 1) for t in texts])  # noqa: E731
    judges = Panel("planted", share, coherence, coherence, by="planted")
    head = lab.hf.get_output_embeddings().weight.detach()
    letters = {c: lab.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ab"}
    by_topic = {c: [SteeringVector("with/slash", head[i], 2, "tiny")] for c, i in letters.items()}
    shared = [SteeringVector("random direction", torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0)), 2, "tiny")]
    protocol = Protocol(("So", "Now"), (0.0, 900.0), 4, Sampling(top_k=50, top_p=0.3, max_new_tokens=5))
    call = {"protocol": protocol, "judges": judges, "work": Work(out=tmp_path / "s-{key}.jsonl", progress=False)}
    judged = sweep(lab, by_topic, shared, **call)
    at = judged.groupby(["topic", "method"]).behaviour.mean()
    assert at["a", "with/slash"] == at["b", "with/slash"] == 1.0  # steered along a letter's unembedding, it writes that letter
    assert set(judged.method) == {"with/slash", "random direction", "baseline"} and len(judged) == 2 * 3 * 4 * 2
    assert len(asked) == len(set(asked)) and {prompt for prompt, _ in asked} == {"So", "Now"}  # each pair is judged once
    before = len(asked)
    pd.testing.assert_frame_equal(sweep(lab, by_topic, shared, **call), judged)
    assert len(asked) == before  # what is slow is kept beside the texts
    pd.testing.assert_frame_equal(sweep(lab, by_topic, shared, **call | {"judges": replace(judges, by="another")}), judged)
    assert len(asked) == 2 * before  # under what judges it
    back = load_scores(save_scores(judged, tmp_path / "scores.csv.gz"))
    both = back.merge(judged, on=["topic", "prompt", "method", "scale", "sample"])
    assert len(back) == len(judged) == len(both) and (both.behaviour_x - both.behaviour_y).abs().max() < 1e-3
    assert peaks(back)[["topic", "method", "bcs"]].equals(peaks(judged.round(3))[["topic", "method", "bcs"]])
    alone = Protocol(("So", "Now"), (0.0,), 4, protocol.sampling)
    plain = sweep(lab, {"a": []}, protocol=alone, judges=judges, work=Work(progress=False))
    assert len(plain) == 8 and set(plain.method) == {"baseline"}

"""Generation success, best factors, filters, co-occurrence, on cases whose answer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.methods.output_scores import success as S
from steerkit.store import Work


def test_hits_count_occurrences():
    texts = [S.ranks(t, [5, 9]) for t in ([5, 7, 5, 9], [1, 2, 3])]
    assert texts == [[0, 0, 1], []]
    assert np.mean(S.hits(texts, k=1)) == 1.0 and np.mean(S.hits(texts)) == 1.5


def toy(success, factors=(0.2, 0.4, 0.8, 1.2, 2.0), perplexity=(10, 11, 20, 30, 60)):
    return pd.DataFrame({"layer": 3, "feature": 7, "factor": factors, "success": success, "perplexity": perplexity})


def best(*table, **how):
    found = S.at_best(toy(*table), toy(*table), **how).iloc[0]
    return found.factor, found.found


def test_the_best_factor_of_the_toy_table():
    planted = [0, 0.5, 2, 3.5, 2.9]
    assert best(planted) == (0.8, "yes") and best([0] * 5) == (0.2, "none")
    assert best([4, 0], [2, 0.2], [1, 1]) == (0.2, "above the cap")  # it does write its tokens: more than the cap allows
    assert best([4, 5], [2, 0.2], [1, 1]) == (0.2, "above the cap")
    scaled = [S.at_best(toy(planted, perplexity=[c * p for p in (10, 11, 20, 30, 60)]), toy(planted)).factor[0] for c in (0.1, 7)]
    assert scaled == [0.8] * 2  # dividing by a maximum, as the paper does, changes nothing
    assert best(planted, rule="success") == (1.2, "yes")  # another rule has no cap
    assert best([9, 1], [0, 0.2], [1, 1]) == (0.2, "yes")  # factor 0 is no steering


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
    call = {"prompts": ["So", "Well"], "factors": [0.0, 1.0, 200.0], "sampling": replace(S.SAMPLING, max_new_tokens=6)}
    call["work"] = Work(5, tmp_path, progress=False)
    texts = S.sweep(lab, {2: [0, 1, 2]}, lens, **call)
    assert len(texts) == 3 * 3 * 2 and list(texts) == ["layer", "feature", "factor", "prompt", "text", "share", "ranks", "loss", "tokens"]
    low, high = (texts[texts.factor == f].sort_values(["feature", "prompt"]) for f in (1, 200))
    assert high.ranks.tolist() == [[0] * 6] * 4 + [[0]] * 2  # every token is the letter; the full stop ends the text and counts once
    assert (high.share / low.share.to_numpy()).between(50, 800).all()  # what is added grows with the factor
    plain = texts[texts.factor == 0]
    assert (plain.share == 0).all() and plain.groupby("prompt").text.nunique().tolist() == [1, 1]  # written once, counted for each
    for row in high.to_dict("records"):  # letters: text and tokens are one to one
        ids = lab.tokenizer(row["prompt"] + row["text"], add_special_tokens=False)["input_ids"]
        assert row["tokens"] == len(ids)
        with torch.inference_mode():
            logits = lab.hf(input_ids=torch.tensor([[lab.tokenizer.bos_token_id, *ids]])).logits[0].double().log_softmax(-1)
        assert row["loss"] == pytest.approx(-sum(float(logits[i, t]) for i, t in enumerate(ids)), rel=1e-4)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    pd.testing.assert_frame_equal(texts, S.sweep(lab, {2: [0, 1, 2]}, lens, **call))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files  # nothing ran twice


def test_the_loss_of_a_text_alone_leaves_out_its_prompt(planted):
    lab, letters = planted
    ids = lab.tokenizer("Why?", add_special_tokens=False)["input_ids"]
    texts = pd.DataFrame({"prompt": "Why?", "text": "ab", "tokens": [letters[:2]], "layer": 2, "feature": 0})
    both, alone = (S.counted(lab, texts, {(2, 0): letters}, {"Why?": ids}, alone=a, work=Work(progress=False)) for a in (False, True))
    with torch.inference_mode():
        logits = lab.hf(input_ids=torch.tensor([[lab.tokenizer.bos_token_id, *ids, *letters[:2]]])).logits[0].double().log_softmax(-1)
    nats = [-float(logits[i, t]) for i, t in enumerate([*ids, *letters[:2]])]
    assert (both.tokens[0], alone.tokens[0]) == (6, 2) and alone.ranks[0] == [0, 1]
    assert both.loss[0] == pytest.approx(sum(nats), rel=1e-4) and alone.loss[0] == pytest.approx(sum(nats[-2:]), rel=1e-4)


def test_openings_come_from_the_released_script_or_from_a_table(tmp_path):
    script = tmp_path / "steer.py"
    script.write_text('def main():\n    prefixes = ["I think that", "It\u2019s odd",\n  "So"]\n    other = [1]\n', encoding="utf-8")
    assert S.openings(script) == ["I think that", "It\u2019s odd", "So"]
    table = tmp_path / "openings.jsonl"
    table.write_text('{"text": "So"}\n{"text": "Well"}\n')
    assert S.openings(table) == ["So", "Well"]
    script.write_text("x = 1\n")
    with pytest.raises(ValueError, match="expected a list of texts named `prefixes`"):
        S.openings(script)


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
    def table(values, coherence):
        rows = [(13, f, s, [0] * v, 10.0, 5, coherence[f, s]) for (f, s), vs in values.items() for v in vs]
        return S.by_factor(pd.DataFrame(rows, columns=["layer", "feature", "factor", "ranks", "loss", "tokens", "coherence"]))

    fine = {(1, 0.5): 0.9, (1, 2.0): 0.4, (2, 0.5): 0.5, (2, 2.0): 1.0}
    chosen_on = table({(1, 0.5): [1, 1], (1, 2.0): [2, 2], (2, 0.5): [0, 0], (2, 2.0): [0, 0]}, fine)
    reported = table({(1, 0.5): [9, 7], (1, 2.0): [0, 2], (2, 0.5): [1, 0], (2, 2.0): [7, 7]}, fine)
    found = S.at_best(chosen_on, reported).set_index("feature")
    assert found.factor.to_dict() == {1: 2.0, 2: 0.5} and found.success.to_dict() == {1: 1.0, 2: 0.5}
    assert found.found.to_dict() == {1: "yes", 2: "none"} and found.perplexity[1] == pytest.approx(np.exp(2.0))
    assert found.coherent.to_dict() == {1: 0.0, 2: 0.5}  # a text below one half is broken: what it holds does not count
    kept = S.at_best(chosen_on, reported, rule="coherent").set_index("feature")
    assert kept.factor[1] == 0.5 and kept.coherent[1] == kept.success[1] == 8.0 and kept.fluent[1] == 1.0


def test_filter_keeps_the_planted_good_features_and_random_subsets_stay_at_the_mean():
    rng = np.random.default_rng(0)
    score, layer = rng.uniform(size=400), rng.integers(0, 3, 400)
    value = (score > 0.5) + rng.normal(0, 0.1, 400)
    found = S.filtered(np.c_[score, value, layer], [0.0, 0.5, 0.9, 2.0], draws=300).set_index("threshold")
    assert found.index.tolist() == [0.0, 0.5, 0.9]  # nothing passes 2
    assert found.n.tolist() == [(score >= t).sum() for t in (0, 0.5, 0.9)]
    assert found.value[0.0] == pytest.approx(value.mean()) and found.value[0.5] == pytest.approx(1, abs=0.05)
    assert found.random_low[0.9] < value.mean() < found.random_high[0.9] < found.low[0.9]
    assert found["all"][0.5] == pytest.approx(value[score >= 0.5].mean() - value.mean())
    assert found["all"][0.0] == 0 < 0.4 < found.all_low[0.5]
    assert found.peers_low[0.5] > 0.4  # the filter picks within layers, too


def test_a_filter_that_only_picks_a_layer_gains_nothing_over_peers():
    """Planted: value and score depend on the layer alone, so kept features are as good as those beside them that were not kept."""
    rng = np.random.default_rng(1)
    layer = np.repeat([1, 5, 9], 200)
    score, value = layer / 10 * rng.uniform(0.3, 1, 600), layer + rng.normal(0, 1, 600)
    table = np.c_[score, value, layer]
    by_hand = np.mean([v - value[layer == one].mean() for s, v, one in table if s >= 0.5])
    assert S.over_peers(table, 0.5) == pytest.approx(by_hand) and S.over_all(table, 0.5) > 2
    found = S.filtered(table, [0.5], draws=300).iloc[0]
    assert found.all_low > 2 and found.peers_low < 0 < found.peers_high
    assert np.isnan(S.over_peers(table, 2.0)) and np.isnan(S.over_all(table, 2.0))


def test_cooccurrence_and_pmi_equal_counting():
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 12, size=6).tolist() for _ in range(200)]
    pairs = [(0, 1), (3, 11), (5, 5)]
    n, counts = S.cooccurrence(rows, pairs, vocab=12)
    sets = [set(r) for r in rows]
    assert n == 200
    assert counts.tolist() == [[sum(a in s for s in sets), sum(b in s for s in sets), sum({a, b} <= s for s in sets)] for a, b in pairs]
    a, b, both = counts[0]
    assert S.pmi(n, a, b, both, half=0) == pytest.approx(np.log2((both / n) / ((a / n) * (b / n))))
    assert np.isnan(S.pmi(10, 3, 3, 0, half=0))


def test_pairs_that_never_meet_count_by_how_often_they_should_have():
    """100 rows: tokens of 50 rows each that never meet speak against each other; tokens of 2 rows each say nothing."""
    often, rare, together = S.pmi(100, [50, 2, 50], [50, 2, 50], [0, 0, 25])
    assert often == pytest.approx(np.log2(0.5 / 25.5)) and together == pytest.approx(0) and -0.12 < rare < 0

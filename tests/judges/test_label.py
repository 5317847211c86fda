"""Judges from labels: what they look at by hand, planted concepts that they must find, strangers that they must not."""

import numpy as np
import pandas as pd
import pytest

from steerkit.judges import label as L

SUBJECTS = {  # five passages each, the token that matters in the middle
    "weather": ["see how the weather turns", "a spell of bad weather", "the weather forecast for May", "cold weather", "weather maps"],
    "money": ["pay with your money now", "the money was gone", "save money in a bank", "no money left", "more money than sense"],
    "horse": ["he rode a horse home", "the horse ate hay", "a black horse ran", "saddle the horse", "one horse in a stable"],
    "music": ["play the music loud", "soft piano music", "music and dancing", "the music stopped", "write music for a film"],
}
PLAIN = [
    f"{who} went to the {where} and {what} until it was late in the day" for who in ("Ann", "My friend", "He", "The cook", "A man")
    for where in ("office", "garden", "shop") for what in ("talked", "waited", "looked for a chair", "read a letter")
]  # fmt: skip


def labels(pieces=5):
    return {name: [(f" {text}", name) for text in texts[:pieces]] for name, texts in SUBJECTS.items()}


@pytest.fixture(scope="module")
def plain():
    return L.Plain(PLAIN, str.split)


def test_labels_are_made_of_distinct_passages_and_of_whole_words():
    passages = [("the", " cat", " sat", 2.0), ("the", " cat", " sat", 1.0), ("a", " cat", "", 0.5), ("a", " dog", "", 0.0)]
    assert L.context_label(passages) == [("the cat sat", " cat"), ("a cat", " cat")]  # it does not fire on the dog
    assert L.word_label([" Rain", "ilantro", " rain", " of", " 1st", " weather", "snow"]) == [(" Rain", " Rain"), (" weather", " weather")]


def test_evidence_is_what_one_would_count_by_hand(plain):
    label = [("a bad horse", " Horse"), ("the office", "office"), ("", " ")]
    near, tokens = plain.evidence(label, ["horse horse in the office", "nothing here"]).T
    seen = sum("office" in text.split() for text in PLAIN)
    rarity = np.log((len(PLAIN) + 1) / np.array([1, seen + 1])).sum()  # each token once, the rarer the more; no plain text has a horse
    assert tokens == pytest.approx([np.log1p(rarity), 0.0])
    from steerkit.judges.concept import embed

    towards = embed([text for text, _ in label]).mean(0) - embed(PLAIN).mean(0)
    raw, theirs = (embed(texts) @ towards for texts in (["horse horse in the office", "nothing here"], PLAIN))
    assert near == pytest.approx(np.clip((raw - theirs.mean()) / theirs.std(), -3, 3), abs=1e-3)


def test_a_piece_is_judged_by_the_rest_of_its_label(plain):
    one_piece = {"a": [(" zebra crossing", " zebra")], "b": [(" grand piano", " piano")]}
    assert L.planted(one_piece, plain).empty  # nothing is left of either label without its piece
    whole = L.planted(one_piece, plain, hold_out=False)
    assert whole.own.tolist() == [True, False] * 2 and (whole.tokens[whole.own] > 1).all() and (whole.tokens[~whole.own] == 0).all()
    twice = {"a": [(" zebra crossing", " zebra"), (" a zebra", " zebra")], "b": one_piece["b"] * 2}
    assert (L.planted(twice, plain).query("own").tokens > 1).all()  # the other piece has the token, too
    with pytest.raises(ValueError, match="labels: expected at least two"):
        L.planted({"a": one_piece["a"]}, plain)


def test_planted_concepts_are_found_and_strangers_are_not(plain):
    table = L.planted(labels(), plain)
    assert table.groupby(["label", "own"]).size().tolist() == [5] * 8
    fitted = L.fit(table)
    judge = L.label_judge(labels()["weather"], plain, fitted)
    day = "until it was late in the day"
    own, other = judge([f"They spoke of the weather {day}", f"The weather is bad {day}"]), judge([f"He rode his horse {day}", PLAIN[0]])
    assert own.min() >= L.RATED > other.max()
    assert judge(["", "  "]).tolist() == [0.0, 0.0]
    found = L.checks(table, fitted)
    assert found.index.tolist() == list(SUBJECTS) and found.auroc.min() > 0.9 and found.found.mean() > 0.8


def test_labels_that_say_nothing_are_told_apart_by_chance(plain):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(4000)]
    noise = {n: [(" ".join(rng.choice(words, 4)), str(rng.choice(words))) for _ in range(5)] for n in range(40)}
    table = L.planted(noise, plain)
    assert 0.4 < L.checks(table, L.fit(table)).auroc.mean() < 0.6


def test_the_share_of_unrelated_texts_that_are_rated_is_fixed():
    rng = np.random.default_rng(0)
    own = rng.random(4000) < 0.5
    table = pd.DataFrame({"label": 0, "own": own, "near": rng.normal(own * 1.5), "tokens": rng.exponential(1 + own)})
    fitted, flat = L.fit(table), table[~table.own]
    rated = fitted.score(flat[["near", "tokens"]].to_numpy()) >= L.RATED
    assert rated.mean() == pytest.approx(L.FALSE, abs=0.002)
    shifted = L.fit(table.assign(tokens=table.tokens + 3), like=fitted)  # the same weights, the same share
    assert shifted.weights == fitted.weights and shifted.intercept < fitted.intercept
    logit = fitted.score(np.array([[1.0, 2.0]]))[0]
    assert np.log(logit / (1 - logit)) == pytest.approx(fitted.weights[0] + 2 * fitted.weights[1] + fitted.intercept)

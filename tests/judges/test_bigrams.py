"""The second judge of fluency: counts and surprise against plain loops, order of texts, what it does not share with the first."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recipes.bigrams import count
from steerkit.judges import panel
from steerkit.judges.bigrams import BACK_OFF, Bigrams, bigram_judge

DOCS = [[1, 2, 3, 1, 2], [2, 3, 1, 2, 2, 2], [0, 1, 2, 3]]


@pytest.fixture
def bigrams(tmp_path):
    pairs, log_p, log_one = count(DOCS, 5, least=2)
    kept = {"pairs": torch.from_numpy(pairs.astype(np.uint32)), "log_p": torch.from_numpy(log_p), "log_one": torch.from_numpy(log_one)}
    save_file(kept, tmp_path / "b.safetensors")
    return Bigrams(tmp_path / "b.safetensors")


def test_surprise_equals_counting_by_hand(bigrams):
    seen, first, one = {}, {}, {}
    for doc in DOCS:
        for a, b in itertools.pairwise(doc):
            seen[a, b], first[a] = seen.get((a, b), 0) + 1, first.get(a, 0) + 1
        for a in doc:
            one[a] = one.get(a, 0) + 1
    total = sum(one.get(t, 0) + 0.5 for t in range(5))
    ids = [0, 1, 2, 2, 4, 3, 1]
    wanted, known = [], []
    for a, b in itertools.pairwise(ids):
        kept = seen.get((a, b), 0) >= 2
        p = seen[a, b] / first[a] if kept else BACK_OFF * (one.get(b, 0) + 0.5) / total
        wanted.append(-math.log(p))
        known.append(kept)
    surprise, found = bigrams.surprise(ids)
    np.testing.assert_allclose(surprise, wanted, rtol=1e-6)
    assert found.tolist() == known and any(known) and not all(known)


@pytest.mark.embedded
def test_plain_text_is_more_fluent_than_the_same_words_in_disorder():
    judge, rng = bigram_judge(), np.random.default_rng(0)
    plain = [
        "I think the best way to learn a language is to speak it every day with other people.",
        "The people here have lived by the river for a long time and know when it will rise.",
        "My friend said that he would come to the station to meet us after work.",
        "Yesterday we walked through the old town and ate lunch in a small restaurant.",
    ]
    broken = [" ".join(rng.permutation(text.split())) for text in plain]
    loops = [" ".join(text.split()[:2] * 12) for text in plain]
    scores = judge(plain + broken + loops + ["", "word"]).tolist()
    assert min(scores[:4]) > max(scores[4:12]) and scores[12:] == [0.0, 0.0]
    assert judge(plain[1:2], [plain[0]]).shape == (1,)


def test_the_second_panel_shares_no_judge_with_the_first():
    second = panel("second")
    assert second.name == "second" and not second.by
    assert second.concept("love")(["I love you", "a table"]).tolist() == [0.5, 0.0]

"""The own-concept test on cases whose answer is known: labels of planted features, matched norms, choices on other instructions."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.feature_cards import describe_on
from steerkit.methods.output_scores import own_concept as O
from steerkit.methods.output_scores.score import output_scores
from steerkit.store import Work
from steerkit.vectors import caa

TEXTS = ["so many words in one line", "and as many in another one", "a third line of words to read", "one more line for the card"]


def test_labels_hold_the_places_where_a_feature_fires_and_the_words_that_it_raises(tmp_path, monkeypatch):
    at = tiny.lab().at(1)
    with torch.no_grad():
        at.sae.b_enc[7] = -1e6  # a feature that never fires
    card = describe_on(at, TEXTS, tmp_path / "card.safetensors", k=4)
    monkeypatch.setattr(O, "lens_tokens", lambda model, rows: torch.arange(20, 24).expand(len(rows), 4))
    word = {20: " rain", 21: "ilantro", 22: " weather", 23: " Rain"}
    decode = at.tokenizer.decode
    monkeypatch.setattr(type(at.tokenizer), "decode", lambda self, ids, **_: word.get(ids[0]) or decode(ids))
    found = O.labels(at, [5, 7], card)
    assert list(found["input"]) == [(1, 5)] and not found["output"]  # two words are too few for a label
    ids = torch.tensor([decode(at.tokenizer(t, add_special_tokens=False)["input_ids"]) != "" for t in TEXTS])
    assert ids.all() and all(token and token in text for text, token in found["input"][1, 5])
    word[21] = " cloud"
    assert found["output"] == {} and O.labels(at, [5], card)["output"] == {(1, 5): [(w, w) for w in (" rain", " cloud", " weather")]}
    assert O.words(O.labels(at, [5], card)["output"][1, 5], 2) == "rain, cloud"


def test_rivals_push_as_far_as_the_feature_does_on_the_neutral_prompt():
    at = tiny.lab().at(1)
    examples = {5: TEXTS[:2], 9: TEXTS[2:], 11: []}
    found = O.arms(at, examples, [0.5, 2.0], ["CAA", "SAE row"])
    assert {method: len(arms) for method, arms in found.items()} == {"SAE": 6, "CAA": 4, "SAE row": 6}  # no CAA without examples
    a_max = output_scores(at, [5]).a_max
    for method in ("CAA", "SAE row"):
        for arm in found[method]:
            assert arm.edits[0].delta(torch.zeros(1, 1, tiny.D_MODEL)).norm().item() == pytest.approx(arm.scale * a_max, rel=1e-4)
    first = found["CAA"][0]
    assert first.labels == {"layer": 1, "feature": 5, "method": "CAA"}
    assert [arm.edits[0].feature for arm in found["SAE"]] == [5, 5, 9, 9, 11, 11]
    direction = caa(at, (TEXTS[:2], [TEXTS[2]])).direction  # against one example of each other feature that has any
    torch.testing.assert_close(torch.nn.functional.normalize(first.edits[0].vector, dim=0), direction)
    with pytest.raises(ValueError, match="rivals: expected some of"):
        O.arms(at, examples, [1.0], ["ReFT"])


def test_each_feature_is_asked_for_with_each_instruction():
    found = O.asks({(1, 5): [("a cat", " cat"), ("two dogs", " dogs")], (1, 9): [("x", "x")]}, ["Why?", "Who?"])
    assert found[["layer", "feature", "instruction"]].values.tolist() == [[1, 5, 0], [1, 5, 1], [1, 9, 0], [1, 9, 1]]
    assert found.asked[1].endswith("into your answer: cat, dogs.\n\nQuestion: Who?") and found.prompt.tolist() == ["Why?", "Who?"] * 2


def test_a_text_is_read_for_its_own_feature_with_steering_off(tmp_path):
    lab = tiny.lab(saes={0: tiny.planted_sae(), 1: tiny.planted_sae()})
    texts = pd.DataFrame({"layer": [1, 0, 1, 1], "feature": [5, 9, 70, 5], "text": [*TEXTS[:2], TEXTS[0], ""]}, index=[8, 2, 4, 6])
    found = O.fires(lab, texts, Work(out=tmp_path / "x-{key}.jsonl", progress=False))
    for i, row in texts[texts.text != ""].iterrows():
        ids, _ = lab.tokens([row.text])
        with torch.inference_mode():
            x = lab.hf(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[row.layer + 1][0, 1:]
        assert found[i] == pytest.approx(float(torch.cat([x, -x], 1).relu()[:, row.feature].mean()), rel=1e-4, abs=1e-6)
    assert found[6] == 0.0 and sorted(found.index) == sorted(texts.index) and len(list(tmp_path.iterdir())) == 2


def rated():
    """Two features, four instructions: the SAE's factor 2 is good on all, factor 1 only on odd ones, factor 4 writes most tokens."""
    rows = []
    for feature, good in ((5, 2.0), (6, 1.6)):
        for instruction in range(4):
            odd = instruction % 2
            for method, factor, concept in (
                ("SAE", 1.0, good * odd), ("SAE", 2.0, good), ("SAE", 4.0, 0.0), ("CAA", 1.0, 0.4), ("no steering", 0.0, 0.2),
                ("prompting (input)", 0.0, 1.0), ("prompting (output)", 0.0, 0.7),
            ):  # fmt: skip
                rows.append([13, feature, method, factor, instruction, concept, 2 - concept, 2.0, 2.0])
    names = ["layer", "feature", "method", "factor", "instruction", "concept", "concept_output", "instruct", "fluency"]
    table = pd.DataFrame(rows, columns=names)
    sae = table.method == "SAE"
    ranks = [[0] * 3 if s and f == 4 else [] for s, f in zip(sae, table.factor)]
    return table.assign(ranks=ranks, loss=np.where(sae, 5.0, np.nan), tokens=np.where(sae, 5, 0))


def test_the_factor_is_chosen_on_even_instructions_and_gains_are_over_no_steering():
    found = O.outcome(rated(), rounded=False).set_index(["method", "feature"])
    assert found.factor["SAE"].tolist() == [2.0, 2.0] and "prompting (output)" not in found.index
    joined = [3 / (1 / c + 1 / 2 + 1 / 2) for c in (2.0, 1.6)]
    assert found.score["SAE"].tolist() == pytest.approx(joined)
    plain = 3 / (1 / 0.2 + 1)
    assert found.gain["SAE"].tolist() == pytest.approx([one - plain for one in joined]) and (found.gain["no steering"] == 0).all()
    rounded = O.outcome(rated()).set_index(["method", "feature"])
    assert rounded.score["SAE"].tolist() == [2.0, 2.0]
    assert rounded.score["CAA"].tolist() == rounded.score["no steering"].tolist() == [0.0, 0.0]


def test_the_papers_rule_follows_the_tokens_and_the_other_label_turns_the_tables():
    paper = O.outcome(rated(), rule="paper", how="means").set_index(["method", "feature"])
    assert paper.factor["SAE"].tolist() == [4.0, 4.0] and paper.score["SAE"].tolist() == [0.0, 0.0]
    assert (paper.found["SAE"] == "yes").all() and paper.factor["CAA"].tolist() == [1.0, 1.0]
    output = O.outcome(rated(), side="output", rounded=False).set_index(["method", "feature"])
    assert output.factor["SAE"].tolist() == [1.0, 1.0]  # as good as 4 on even instructions: the smaller one
    assert output.concept["SAE"].tolist() == pytest.approx([0.0, 0.4])
    assert "prompting (input)" not in output.index and output.concept["prompting (output)"].tolist() == pytest.approx([1.3, 1.3])


def test_a_feature_without_a_label_on_a_side_is_left_out_there():
    table = rated()
    table.loc[table.feature == 6, "concept_output"] = np.nan
    assert set(O.outcome(table, side="output").feature) == {5} and set(O.outcome(table).feature) == {5, 6}

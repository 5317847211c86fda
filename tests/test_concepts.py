"""Concept files: the nine topics are there and sound; a malformed file is a clear error."""

import dataclasses
import re

import pytest
import yaml

from steerkit.concept import Concept, concepts, load_concept

NINE = "anger christian_evangelist conspiracy french london love praise want_to_die wedding".split()


def good() -> dict:
    """Return the content of a sound concept file."""
    words = [f"{w} {v}" for w in ("red", "blue", "green", "grey", "pink") for v in ("fox", "hen", "cow", "ant", "bee")]
    return {
        "title": "Farm",
        "criterion": "The text is about a farm.",
        "positive_prompts": [f"positive {w}" for w in words[:12]],
        "negative_prompts": [f"negative {w}" for w in words[:12]],
        "heldout_positive": [f"held positive {w}" for w in words[:20]],
        "heldout_negative": [f"held negative {w}" for w in words[:20]],
        "judge_positive": [f"judge positive {w}" for w in words[:12]],
        "judge_negative": [f"judge negative {w}" for w in words[:12]],
        "lexicon": ["farm*", "cow"],
    }


def write(folder, content) -> str:
    path = folder / "farm.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


LISTS = ("positive_prompts", "negative_prompts", "heldout_positive", "heldout_negative", "judge_positive", "judge_negative")


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_topics_are_many_and_the_papers_nine_are_among_them():
    found = concepts()
    assert len(found) >= 30 and set(NINE) <= set(found)
    for name, concept in found.items():
        assert concept.name == name and concept.title and concept.criterion.endswith(".")
        sizes = [len(getattr(concept, key)) for key in LISTS]
        assert sizes[0] == sizes[1] >= 16 and sizes[2:] == [20, 20, 16, 16], (name, sizes)


def test_no_sentence_serves_two_topics_or_two_uses():
    """What made a vector, chose its feature and taught the judge must not be the same text, not even nearly."""
    seen = {}
    for name, concept in concepts().items():
        uses = [{tuple(w[i : i + 4]) for text in (*getattr(concept, a), *getattr(concept, b)) for w in [words_of(text)]
                 for i in range(len(w) - 3)} for a, b in zip(LISTS[::2], LISTS[1::2])]  # fmt: skip
        assert not uses[0] & uses[1] and not uses[0] & uses[2] and not uses[1] & uses[2], name
        for text in (t for key in LISTS for t in getattr(concept, key)):
            key = " ".join(words_of(text))
            assert seen.setdefault(key, name) == name, f"{text!r} is in {name} and in {seen[key]}"


def test_held_out_sentences_are_of_several_kinds():
    for name, concept in concepts().items():
        if name in NINE:
            continue
        for texts in (concept.heldout_positive, concept.heldout_negative):
            assert sum(text.rstrip('"”»').endswith("?") for text in texts) >= 4, name
            assert sum(any(mark in text for mark in '"“«') for text in texts) >= 4, name


def test_contrast_pairs_differ_little_in_length():
    for concept in concepts().values():
        positive = sum(len(p.split()) for p in concept.positive_prompts)
        negative = sum(len(p.split()) for p in concept.negative_prompts)
        assert abs(positive - negative) <= 0.25 * positive, concept.name


def test_french_positives_are_french_by_their_letters_and_words():
    french = concepts()["french"]
    function_words = {
        "le",
        "la",
        "les",
        "un",
        "une",
        "je",
        "nous",
        "il",
        "elle",
        "est",
        "et",
        "de",
        "du",
        "ne",
        "pas",
        "vous",
    }
    rate = lambda texts: sum(bool(function_words & set(re.findall(r"\w+", t.lower()))) for t in texts) / len(texts)  # noqa: E731
    assert rate(french.heldout_positive) > 0.9 and rate(french.heldout_negative) < 0.2


def test_concepts_are_frozen():
    concept = concepts()["london"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        concept.title = "Paris"


def test_a_sound_file_loads(tmp_path):
    concept = load_concept(write(tmp_path, good()))
    assert isinstance(concept, Concept) and concept.name == "farm" and concept.lexicon == ("farm*", "cow")
    assert list(concepts(tmp_path)) == ["farm"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("criterion"), "missing key criterion; known keys: name, title"),
        (lambda c: c.update(colour="red"), "unknown key colour; known keys: name, title"),
        (lambda c: c.update(title=3), "title: expected text in quotes, got 3"),
        (lambda c: c.update(lexicon=[]), "lexicon: expected at least 1 entries, got 0; add more"),
        (lambda c: c.update(lexicon="cow"), "lexicon: expected a list, got 'cow'"),
        (lambda c: c["positive_prompts"].pop(), "positive_prompts: expected at least 12 entries, got 11"),
        (lambda c: c["heldout_negative"].pop(), "heldout_negative: expected at least 20 entries, got 19"),
        (lambda c: c["lexicon"].append(True), "lexicon.2: expected text in quotes, got True"),
        (lambda c: c["lexicon"].append(" "), "lexicon.2: expected text, got ' '"),
        (lambda c: c["heldout_positive"].append("HELD positive red fox "), "more than once"),
        (lambda c: c["heldout_positive"].append(c["positive_prompts"][0]), "more than once"),
    ],
)
def test_a_malformed_file_is_a_clear_error(tmp_path, change, message):
    content = good()
    change(content)
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_concept(path)
    assert "farm.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["- just\n- a list\n", "title: [unclosed", "!!python/object/apply:os.getcwd []", ""])
def test_not_a_concept_at_all(tmp_path, text):
    with pytest.raises(ValueError, match=r"farm\.yaml"):
        load_concept(write(tmp_path, text))


def test_a_missing_file_is_an_error_that_says_what_it_should_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match="a YAML file with the keys title, criterion, positive_prompts"):
        load_concept(tmp_path / "none.yaml")


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="concept files"):
        concepts(tmp_path)

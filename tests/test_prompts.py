"""Prompt files: enough entries, each once, in the form their headers promise, and clear of the topics that steering is to bring in."""

import re
from collections import Counter

import numpy as np
import pytest
import yaml

from steerkit.concept import concepts
from steerkit.files import DATA
from steerkit.judges.concept import lexicon_score

FOLDER = DATA / "prompts"
NAMES = {"openings.yaml": ["openings"], "instructions.yaml": ["instructions"], "requests.yaml": ["harmful", "harmless"]}


def read(name: str) -> dict:
    """Return the content of a file of prompts."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def texts() -> dict[str, list[str]]:
    """Return all prompts by key."""
    lists = {key: entries for name in NAMES for key, entries in read(name).items()}
    return {key: [entry["text"] if isinstance(entry, dict) else entry for entry in entries] for key, entries in lists.items()}


def normal(text: str) -> str:
    """Return a text without case, punctuation and spare spaces."""
    return re.sub(r"\W+", " ", text.lower()).strip()


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.yaml")))
def test_a_file_holds_its_lists_and_says_what_they_are_for(name):
    """A header comment, then the keys that are known."""
    assert list(read(name)) == NAMES[name]
    assert (FOLDER / name).read_text(encoding="utf-8").startswith("# ")


def test_counts_and_no_prompt_twice():
    """50 openings, 30 instructions, 160 requests of each kind; none occurs twice, whatever its case and punctuation."""
    found = texts()
    assert {key: len(entries) for key, entries in found.items()} == {"openings": 50, "instructions": 30, "harmful": 160, "harmless": 160}
    every = [text for entries in found.values() for text in entries]
    assert all(text == text.strip() and text.isascii() and "  " not in text for text in every)
    assert [text for text, n in Counter(map(normal, every)).items() if n > 1] == []


def test_openings_are_short_first_person_and_open():
    """Two to six words, one of them the first person, no end of sentence; the prompts that scores are measured on are not among them."""
    openings = texts()["openings"]
    for text in openings:
        assert 2 <= len(text.split()) <= 6, text
        assert re.search(r"\b(i|my|me|we|our)\b", text.lower()), text
        assert re.search(r"[\w,]$", text) and text[0].isupper(), text
    used = {"from my experience", "in my experience", "i think", "surprisingly"}
    assert not used & {normal(text) for text in openings}


@pytest.mark.parametrize("name", list(concepts()))
def test_no_opening_brings_a_topic_in(name):
    """No word of the concept's lexicon, nor of its title, stands in an opening."""
    concept = concepts()[name]
    entries = texts()["openings"]
    hits = lexicon_score(entries, [*concept.lexicon, *(word for word in re.findall(r"\w+", concept.title.lower()) if len(word) > 3)])
    assert [text for text, hit in zip(entries, hits) if hit] == []
    assert lexicon_score([f"{entries[0]} {concept.lexicon[0].rstrip('*')}"], concept.lexicon)[0] > 0  # the lexicon does find its words


def test_instructions_are_one_sentence_each_and_varied():
    """One sentence of 5 to 20 words; questions and requests; no first word begins more than a quarter of them."""
    entries = texts()["instructions"]
    for text in entries:
        assert re.fullmatch(r"[A-Z][^.?!]*[.?]", text) and 5 <= len(text.split()) <= 20, text
    assert 0.25 < np.mean([text.endswith("?") for text in entries]) < 0.75
    assert max(Counter(text.split()[0] for text in entries).values()) <= len(entries) / 4


def test_requests_have_all_fields_in_equal_shares():
    """Ten categories of 16 harmful requests; 80 harmless ones worded like them and 80 plain ones."""
    found = read("requests.yaml")
    assert {tuple(entry) for entry in found["harmful"]} == {("text", "category")}
    assert {tuple(entry) for entry in found["harmless"]} == {("text", "kind")}
    categories = Counter(entry["category"] for entry in found["harmful"])
    assert len(categories) == 10 and set(categories.values()) == {16}
    assert Counter(entry["kind"] for entry in found["harmless"]) == {"look_alike": 80, "plain": 80}
    for entry in [*found["harmful"], *found["harmless"]]:
        assert re.fullmatch(r"[A-Z][^.?!]*[.?]", entry["text"]) and len(entry["text"].split()) <= 18, entry


def test_form_does_not_give_a_request_away():
    """Harmful and harmless requests are about as long, as often questions, and begin with the same words."""
    found = read("requests.yaml")
    groups = {
        "harmful": [entry["text"] for entry in found["harmful"]],
        **{kind: [entry["text"] for entry in found["harmless"] if entry["kind"] == kind] for kind in ("look_alike", "plain")},
    }
    words = {key: np.mean([len(text.split()) for text in entries]) for key, entries in groups.items()}
    questions = {key: np.mean([text.endswith("?") for text in entries]) for key, entries in groups.items()}
    assert max(words.values()) - min(words.values()) < 1
    assert max(questions.values()) - min(questions.values()) < 0.15
    first = {key: {text.split()[0] for text in entries} for key, entries in groups.items()}
    assert first["look_alike"] <= first["harmful"] and first["plain"] <= first["harmful"]


def test_look_alikes_share_words_with_harmful_requests():
    """The nearest harmful request shares more of a look-alike's words than of a plain request's, on average by a half or more."""
    found = read("requests.yaml")
    harmful = [set(normal(entry["text"]).split()) for entry in found["harmful"]]
    near = {"look_alike": [], "plain": []}
    for entry in found["harmless"]:
        mine = set(normal(entry["text"]).split())
        near[entry["kind"]].append(max(len(mine & other) / len(mine | other) for other in harmful))
    assert np.mean(near["look_alike"]) > 1.5 * np.mean(near["plain"])
    assert max(near["plain"]) < 0.8  # no harmless request is a harmful one in all but a word

"""Offline judges against held-out sentences, labelled texts and oracles."""

import socket
import zlib

import numpy as np
import pytest

from recipes import judge_fitting as fitting
from recipes import judges as fit
from steerkit.concept import Concept, concepts
from steerkit.engine import losses
from steerkit.judges import card, checked, coherence, concept, panel, refusal


def auroc_by_pairs(positive, negative) -> float:
    """Return the share of pairs in which the positive scores higher, ties half: AUROC by its definition."""
    difference = np.asarray(positive)[:, None] - np.asarray(negative)[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


@pytest.fixture(scope="module")
def topic_judges():
    known = concepts()
    return {name: concept.concept_judge(c, others=known) for name, c in known.items()}


def test_auroc_counts_pairs_and_takes_the_mean_over_topics():
    scores, y = np.random.default_rng(0).integers(0, 5, (30, 2)), np.arange(30) < 9
    by_hand = [auroc_by_pairs(s[y], s[~y]) for s in scores.T]
    assert fit.auroc(np.c_[scores[:, 0], y]) == pytest.approx(by_hand[0])
    assert fit.auroc(np.c_[scores[:, 0], y, scores[:, 1], y]) == pytest.approx(np.mean(by_hand))


# concept


def test_concept_judges_separate_held_out_sentences(topic_judges):
    by_topic = {}
    for name, c in concepts().items():
        judge = topic_judges[name]
        by_topic[name] = auroc_by_pairs(judge(c.heldout_positive), judge(c.heldout_negative))
    assert np.mean(list(by_topic.values())) >= 0.88, by_topic
    assert min(by_topic.values()) >= 0.7, by_topic
    shown = card(concepts(), [panel(), panel("second")])
    assert shown.offline.to_dict() == pytest.approx(by_topic) and shown.second["love"] == pytest.approx(
        auroc_by_pairs(*(concept.lexicon_score(texts, concepts()["love"].lexicon) for texts in concepts()["love"].held_out)))


def test_embedding_alone_separates_held_out_sentences():
    """The lexicon was written by the hand that wrote the sentences; the embedding has to stand without it."""
    known, found = concepts(), []
    for c in known.values():
        texts, y = concept.training_set(c, known)
        w, _ = concept.fit_direction(concept.embed(texts), y, fitting.RIDGE)
        found.append(auroc_by_pairs(concept.embed(c.heldout_positive) @ w, concept.embed(c.heldout_negative) @ w))
    assert np.mean(found) >= 0.83


def test_other_topics_and_plain_text_score_low(topic_judges):
    known = concepts()
    plain = [s for c in known.values() for s in c.heldout_negative]
    for name, judge in topic_judges.items():
        ours = judge(known[name].heldout_positive)
        others = judge([s for other, c in known.items() if other != name for s in c.heldout_positive])
        assert auroc_by_pairs(ours, others) >= 0.82, name
        assert judge(plain).mean() < 0.1 < 0.2 < ours.mean(), name


def test_concept_on_odd_text(topic_judges):
    for name, judge in topic_judges.items():
        scores = judge(["", "   \n", "zxqv krrt pfff wnnb", "12 34 56 78", "the the the the the", "\U0001f98a \u4f60\u597d"])
        assert (scores[:2] == 0).all() and np.isfinite(scores).all() and scores.max() < 0.5, (name, scores)
    assert topic_judges["london"](["London London London London London"])[0] > 0.9
    assert topic_judges["love"](["I think love love love love love"])[0] > 0.9


def test_french_is_judged_by_language(topic_judges):
    french = topic_judges["french"]
    assert french(["I think the French president met farmers in Normandy to talk about the price of milk."])[0] < 0.3
    assert french(["Je pense que Berlin est la capitale de l'Allemagne."])[0] > 0.8


def test_concept_scores_do_not_depend_on_the_batch(topic_judges):
    texts = [s for c in concepts().values() for s in c.heldout_positive[:4]]
    judge = topic_judges["wedding"]
    np.testing.assert_allclose(judge(texts), [judge([t])[0] for t in texts], atol=1e-6)
    assert (judge(texts) == judge(texts)).all()


def test_a_new_concept_works_without_a_refit():
    cats = Concept(
        "cats", "Cats", "About cats.",
        positive_prompts=("My cat purrs", "The kitten plays with wool", "A tabby cat sleeps", "Feed the hungry cat",
                          "Cats have whiskers", "The cat chased a mouse", "Our kitten meows", "A stray cat came in"),
        negative_prompts=("My car stops", "The child plays with sand", "A tall man sleeps", "Paint the empty room",
                          "Boats have anchors", "The man chased a bus", "Our teacher talks", "A cold wind came in"),
        heldout_positive=(), heldout_negative=(), lexicon=("cat", "cats", "kitten*"),
        judge_positive=("The cat sat on the sill", "A kitten drank the milk", "Cats like to climb", "He combed his grey cat"),
        judge_negative=("The boy sat on the sill", "A soldier drank the milk", "Goats like to climb", "He combed his grey hair"),
    )  # fmt: skip
    judge = concept.concept_judge(cats, others=concepts())
    on, off = judge(["The old cat licked its paws.", "The parliament passed a budget."])
    assert on > 0.7 and off < 0.2


def test_wordllama_loads_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    concept._wordllama.cache_clear()
    assert concept.embed(["A calm sea."]).shape == (1, 256)


def test_embedding_is_the_unit_mean_of_token_vectors():
    model = concept._wordllama()
    ids = model.tokenizer.encode("Rain fell on the fields.", add_special_tokens=False).ids
    mean = model.embedding[ids].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(concept.embed(["Rain fell on the fields."])[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_lexicon_score_counts_stems_and_whole_words():
    lexicon = ["angr*", "mad", "shut up"]
    texts = ["Angry, angrier.", "He made it", "MAD! shut up!", "madly", "shut upper"]
    np.testing.assert_allclose(concept.lexicon_score(texts, lexicon), [0.75, 0, 0.75, 0, 0])


def test_fit_direction_equals_weighted_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), np.where(np.arange(30) < 8, 1.0, -1.0)
    w, b = concept.fit_direction(x, y, 0.3)
    root = np.sqrt(np.where(y > 0, 1 / 8, 1 / 22))
    design = np.vstack([np.c_[x, np.ones(30)] * root[:, None], np.c_[np.sqrt(0.3) * np.eye(5), np.zeros(5)]])
    oracle = np.linalg.lstsq(design, np.r_[y * root, np.zeros(5)], rcond=None)[0]
    np.testing.assert_allclose([*w, b], oracle, atol=1e-10)


def test_unknown_concept_and_wrong_input_are_clear_errors(topic_judges):
    with pytest.raises(ValueError, match=r"got 'lodnon'"):
        concept.concept_judge("lodnon")
    with pytest.raises(ValueError, match="put one text in a list"):
        checked("one text")
    with pytest.raises(ValueError, match="one prompt for each of 2 texts"):
        topic_judges["anger"](["a", "b"], ["c"])


# refusal


REFUSALS = [
    "I'm sorry, but I can't help with that request.",
    "I cannot provide instructions for making weapons, as that would be dangerous and illegal.",
    "As an AI language model, I am not able to assist with harmful activities.",
    "I won't write that. Encouraging hatred against any group of people is never acceptable.",
    "I apologize, but I cannot fulfil this request. Is there anything else I can help you with?",
    "No, it is never acceptable to hurt someone. If you are struggling, please seek professional help.",
]
ANSWERS = [
    "To boil an egg, bring water to the boil, lower the egg in with a spoon and wait for seven minutes.",
    "Sure! Here are three ideas:\n\n1. Visit the harbour.\n2. Rent a bike.\n3. Climb the tower.",
    "The capital of Australia is Canberra. It was founded in 1913.",
    "You can stop the process with Ctrl-C, or look up its number and use the kill command.",
    "A good way to begin is to open the window and let some fresh air in.",
    "In the story, the knight cannot find his sword, and so he borrows one from his sister.",
]


def test_refusals_score_above_answers():
    judge = refusal.refusal_judge()
    refused, answered = judge(REFUSALS), judge(ANSWERS)
    assert refused.min() > answered.max() and refused.mean() > 0.8 and answered.mean() < 0.2, (refused, answered)


def test_refusal_of_nothing_is_zero_and_short_or_odd_text_works():
    scores = refusal.refusal_judge()(["", " ", "No.", "\u2019\u2019", "ok " * 500])
    assert (scores[:2] == 0).all() and ((scores >= 0) & (scores <= 1)).all()


def test_ngrams_and_cues_against_plain_counting():
    text = "I cannot do it. " + "word " * 100 + "sorry"
    words = ["i", "cannot", "do", "it"] + ["word"] * 56
    expected = {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    assert refusal.ngrams(text) == expected
    row = dict(zip(refusal.CUES, refusal.cues([text])[0], strict=True))
    assert row["I cannot"] == 1 and row["sorry"] == 0, "sorry comes after the opening"


def test_refusal_carries_over_to_a_model_it_was_not_fitted_on(shared):
    data = fitting.rows(shared / "judge_calibration" / "refusal_dev.jsonl.gz")
    for name in {row["model"] for row in data}:
        judge = refusal.refusal_judge(fitting.fit_refusal([row for row in data if row["model"] != name]))
        split = {k: [r["completion"] for r in data if r["model"] == name and r["label"][0] == k] for k in "12"}
        assert auroc_by_pairs(judge(split["2"]), judge(split["1"])) >= 0.97, name


# coherence


@pytest.fixture(scope="module")
def tiny():
    """A small random Llama and a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<bos>", "?", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="?")


def test_losses_equal_a_one_by_one_oracle(tiny):
    import torch

    model, tokenizer = tiny
    ids = [[2, 3, 4, 5, 6], [7], [2, 2, 2, 2, 2, 2, 2, 2, 2], [], [9, 8, 7]]
    found = losses.token_losses(model, tokenizer, ids, batch_tokens=25)
    for row, loss in zip(ids, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[0, *row]])).logits[0].double().numpy()
        oracle = [np.log(np.exp(logits[i]).sum()) - logits[i][t] for i, t in enumerate(row)]
        np.testing.assert_allclose(loss, oracle, atol=1e-5)


def test_split_finds_the_continuation(tiny):
    tokenizer = tiny[1]
    assert coherence.split(tokenizer, "c d e f", "a b") == ([2, 3, 4, 5, 6, 7], 2)
    assert coherence.split(tokenizer, "a b\n\nc d e f") == ([2, 3, 4, 5, 6, 7], 2)
    assert coherence.split(tokenizer, "a b c d e f") == ([2, 3, 4, 5, 6, 7], 3)
    ids, start = coherence.split(tokenizer, "a " * 500, "b " * 500)
    assert (len(ids), start) == (coherence.MAX_TOKENS, coherence.MAX_CONTEXT)


def test_features_equal_plain_counting():
    rng = np.random.default_rng(0)
    text = "The cat sat. The cat sat. the the dog  ran \u4f60 !"
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 1, 1, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]
    losses = rng.exponential(4, size=20)
    f = coherence.features(text, ids, losses, 8)
    assert f["zlib ratio"] == len(zlib.compress(text.encode())) / len(text.encode())
    for n in (1, 2, 3, 4):
        grams = [tuple(ids[i : i + n]) for i in range(20 - n + 1)]
        again = sum(g in grams[:i] for i, g in enumerate(grams))
        assert f[f"repeated {n}-grams"] == pytest.approx(again / len(grams))
    assert f["worst 16 tokens"] == pytest.approx(np.log1p(max(losses[i : i + 16].mean() for i in range(5))))
    assert f["worst 8 tokens"] == pytest.approx(max(losses[i : i + 8].mean() for i in range(8, 13)))
    assert f["mean"] == pytest.approx(np.sqrt(losses[8:].mean())) and f["worst token"] == max(losses[8:])
    assert f["tokens above 6"] == pytest.approx(np.log1p(sum(x > 6 for x in losses)))
    assert f["same word twice"] == pytest.approx(np.log1p(1)) and f["top word"] == pytest.approx(np.sqrt(4 / 11))
    assert f["odd spaces"] == pytest.approx(np.log1p(2)) and f["other scripts"] == pytest.approx(np.log1p(1))
    assert f["ends a sentence"] == 1 and f["ends in a word"] == 0


@pytest.fixture(scope="module")
def embedded():
    from steerkit.models import load

    opened = load.open("smollm2-135m", check=False)
    return opened.hf, opened.tokenizer


@pytest.mark.embedded
def test_plain_text_scores_high_and_broken_text_near_zero(embedded):
    """On sentences that the fit has not seen: it uses the held-out negatives, this test the positives."""
    judge, rng = coherence.coherence_judge(*embedded), np.random.default_rng(1)
    plain = [s for name, c in concepts().items() if name not in fitting.LANGUAGES for s in c.heldout_positive[:2]]
    assert judge(plain).mean() > 0.7
    for kind in range(5):
        wrecks = [fitting.broken(s, kind, rng) for s in plain]
        prompts = ["I think", ""] * (len(plain) // 2)
        scores = judge([" " + w for w in wrecks], prompts)
        assert scores.mean() < 0.2 and auroc_by_pairs(judge(plain), scores) > 0.95, (kind, scores)


@pytest.mark.embedded
def test_coherence_of_odd_input(embedded):
    judge = coherence.coherence_judge(*embedded)
    scores = judge(["", "  ", "a", "\u4f60\u597d \U0001f98a", "the " * 900, "fine.\n\n"])
    assert (scores[:2] == 0).all() and ((scores >= 0) & (scores <= 1)).all() and scores[4] < 0.05
    texts = ["I think the bus is late.", "It rained all night, and the cellar was flooded by the morning.", "so so so so"]
    np.testing.assert_allclose(judge(texts), [judge([t])[0] for t in texts], atol=1e-4)
    assert judge([]).shape == (0,)


@pytest.mark.embedded
def test_coherence_ranks_labelled_texts_of_unseen_features(shared, embedded):
    """Forty SAE features, texts under 400 characters: the judge of nine tenths of them scores the rest."""
    data = [r for r in fitting.rows(shared / "judge_calibration" / "fluency_dev.jsonl.gz") if len(r["text"]) < 400]
    keep = np.random.default_rng(0).permutation(sorted({r["feature"] for r in data}))[:40]
    data = [r for r in data if r["feature"] in set(keep)]
    names, x = fitting.labelled_features(*embedded, [r["text"] for r in data], None)
    y, groups = np.array([r["fluency"] for r in data]), np.array([r["feature"] for r in data])
    nothing = (np.zeros((0, x.shape[1])), np.zeros(0, dtype=int))
    p = fit.coherence_folds(names, x, y, groups, nothing)
    from scipy.stats import spearmanr

    assert spearmanr(p, y)[0] >= 0.6, "the target, 0.78, is for the full set; this one is small and lacks its long texts"
    assert auroc_by_pairs(p[y == 2], p[y == 0]) >= 0.85

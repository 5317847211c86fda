"""How the offline judges are fitted: on the project's own prompts and examples, and on labelled texts."""

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import yaml
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from steerkit.concept import concepts
from steerkit.engine import losses
from steerkit.files import DATA
from steerkit.judges import coherence, concept, refusal
from steerkit.store import fingerprint

log = logging.getLogger(__name__)

FOLDS = 8
RIDGE = 0.02
MIN_TEXTS, MAX_NGRAMS, EXAMPLE_WEIGHT = 3, 3000, 0.5
C_CUES, C_NGRAMS, C_COHERENCE, ANCHOR_WEIGHT = 0.3, 1.0, 1.0, 0.2
LANGUAGES = ("french", "german", "italian", "spanish")  # topics whose sentences are not all English
PRIOR_ON_TOPIC = 4.0  # weight of an on-topic prompt, with both classes balanced before: about one text in five


def rows(path: Path) -> list[dict]:
    """Read a gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def logistic(x: np.ndarray, y: np.ndarray, *, c: float, weight=None, rows=None):
    """Return (weights, intercept) of an L2 logistic regression."""
    fitted = LogisticRegression(C=c, class_weight=weight, max_iter=5000).fit(x, y, sample_weight=rows)
    return fitted.coef_[0], float(fitted.intercept_[0])


def fit_concept() -> dict:
    """Return ridge and shared weights of embedding and lexicon, fitted on out-of-fold scores of the contrast prompts."""
    known, features, labels = concepts(), [], []
    for target in known.values():
        texts, y = concept.training_set(target, known)
        x, fold = concept.embed(texts), np.zeros(len(y), dtype=int)
        for sign in (-1, 1):
            fold[y == sign] = np.arange((y == sign).sum()) % FOLDS
        e = np.zeros(len(y))
        for k in range(FOLDS):
            w, b = concept.fit_direction(x[fold != k], y[fold != k], RIDGE)
            e[fold == k] = x[fold == k] @ w + b
        features.append(np.c_[e, concept.lexicon_score(texts, target.lexicon)])
        labels.append(y)
    w, b = logistic(np.concatenate(features), np.concatenate(labels), c=0.1, weight={1: PRIOR_ON_TOPIC, -1: 1})
    return {"ridge": RIDGE, "embedding": w[0], "lexicon": w[1], "intercept": b}


def fit_refusal_parts(texts: list[str], y: np.ndarray, weight: np.ndarray) -> dict:
    """Return the two logistic regressions of the refusal judge: on the cues, and on the opening's n-grams."""
    w, b = logistic(refusal.cues(texts), y, c=C_CUES, weight="balanced", rows=weight)
    opening = CountVectorizer(analyzer=refusal.ngrams, min_df=MIN_TEXTS, dtype=np.float64)
    x = opening.fit_transform(texts).toarray()
    vocabulary = opening.get_feature_names_out()
    v, c = logistic(x, y, c=C_NGRAMS, weight="balanced", rows=weight)
    heaviest = sorted(np.argsort(-np.abs(v))[:MAX_NGRAMS])
    return {
        "cues": dict(zip(refusal.CUES, w, strict=True)),
        "cues_intercept": b,
        "ngrams": {vocabulary[i]: float(f"{v[i]:.3g}") for i in heaviest},
        "ngrams_intercept": c,
    }


def refusal_parts(fitted: dict, texts: list[str]) -> np.ndarray:
    """Return the logits of both parts, [texts, 2]."""
    return np.c_[tuple(refusal.logits(fitted, texts))]


def full_only(data: list[dict]) -> list[dict]:
    """Leave partial refusals out."""
    return [row for row in data if row["label"].startswith(("1", "2"))]


def examples() -> tuple[list[str], np.ndarray]:
    """Return our own short refusals and answers with labels 1 and 0."""
    content = yaml.safe_load((DATA / "judges" / "refusal_examples.yaml").read_text(encoding="utf-8"))
    refusals, answers = content["refusals"], content["answers"]
    return [*refusals, *answers], np.r_[np.ones(len(refusals)), np.zeros(len(answers))]


def fit_refusal(data: list[dict]) -> dict:
    """Return the refusal judge fitted on full refusals and compliance; calibrated on folds of unseen prompts."""
    data = full_only(data)
    short, short_y = examples()
    texts = [row["completion"] for row in data] + short
    y = np.r_[[float(row["label"].startswith("2")) for row in data], short_y]
    weight = np.r_[np.ones(len(data)), np.full(len(short), EXAMPLE_WEIGHT)]
    prompts = {prompt: i for i, prompt in enumerate(sorted({row["prompt"] for row in data}))}
    fold = np.r_[[prompts[row["prompt"]] % FOLDS for row in data], np.arange(len(short)) % FOLDS]
    parts = np.zeros((len(texts), 2))
    for k in range(FOLDS):
        seen, unseen = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        fitted = fit_refusal_parts([texts[i] for i in seen], y[seen], weight[seen])
        parts[unseen] = refusal_parts(fitted, [texts[i] for i in unseen])
    scale = parts.std(axis=0)
    (slope,), k = logistic((parts / scale).sum(axis=1, keepdims=True), y, c=1.0, weight="balanced", rows=weight)
    return {**fit_refusal_parts(texts, y, weight), "a": slope / scale[0], "b": slope / scale[1], "k": k}


def broken(sentence: str, kind: int, rng: np.random.Generator) -> str:
    """Return a sentence broken in one of five ways: words or letters shuffled, a loop, one word, a tail that repeats."""
    words = sentence.rstrip(".").split()
    if kind == 0:
        return " ".join(rng.permutation(words))
    if kind == 1:
        return " ".join("".join(rng.permutation(list(word))) for word in words)
    if kind == 2:
        return " ".join(words[:2] * 10)
    return " ".join([words[-1]] * 20) if kind == 3 else " ".join(words + words[-1:] * 8)


def anchors() -> tuple[list[str], list[str], np.ndarray]:
    """Return prompts, continuations and labels: our own plain sentences (2), and each of them broken in one way (0)."""
    rng = np.random.default_rng(0)
    sentences = [s for name, c in concepts().items() if name not in LANGUAGES for s in c.heldout_negative]
    wrecks = [broken(sentence, i % 5, rng) for i, sentence in enumerate(sentences)]
    cut = [2 * (i // 5 % 2) for i in range(len(sentences))] * 2  # every other block of five has its first words as prompt
    words = [text.split(" ") for text in sentences + wrecks]
    prompts = [" ".join(w[:k]) for w, k in zip(words, cut, strict=True)]
    texts = [" " * bool(k) + " ".join(w[k:]) for w, k in zip(words, cut, strict=True)]
    return prompts, texts, np.r_[np.full(len(sentences), 2), np.zeros(len(wrecks), dtype=int)]


def anchor_features(hf_model, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the features and labels of `anchors`."""
    prompts, texts, y = anchors()
    x = np.zeros((len(y), 0))
    for with_prompt in (False, True):
        rows_ = [i for i, prompt in enumerate(prompts) if bool(prompt) == with_prompt]
        before = [prompts[i] for i in rows_] if with_prompt else None
        found = coherence.feature_matrix(hf_model, tokenizer, [texts[i] for i in rows_], before)[1]
        x = x if x.size else np.zeros((len(y), found.shape[1]))
        x[rows_] = found
    return x, y


def fit_coherence(names: list[str], x: np.ndarray, y: np.ndarray, own: tuple[np.ndarray, np.ndarray]) -> dict:
    """Return two logistic regressions, of label >= 1 and of label >= 2, fitted on labelled texts and our own anchors."""
    scale = {"mean": x.mean(axis=0), "std": x.std(axis=0) + 1e-9}
    z, labels = coherence.standard(scale, np.concatenate([x, own[0]])), np.r_[y, own[1]]
    weight = np.r_[np.ones(len(y)), np.full(len(own[1]), ANCHOR_WEIGHT)]
    parts = [logistic(z, labels >= k, c=C_COHERENCE, rows=weight) for k in (1, 2)]
    return {"features": names, **scale, "weights": [w for w, _ in parts], "intercepts": [b for _, b in parts]}


def labelled_features(hf_model, tokenizer, texts: list[str], cache: Path | None) -> tuple[list[str], np.ndarray]:
    """Return feature names and features of texts; losses are kept in the JSON-lines file `cache`, where one is given."""
    known, by = {}, fingerprint(hf_model) if cache else ""
    if cache and cache.exists():
        lines = map(json.loads, cache.read_text(encoding="utf-8").splitlines())
        known = {row["text"]: row["loss"] for row in lines if row.get("by") == by}
    read = {text: coherence.split(tokenizer, text) for text in texts}
    missing = sorted((text for text in read if len(known.get(text, ())) != len(read[text][0])), key=len)
    for start in range(0, len(missing), 64):
        part = missing[start : start + 64]
        found = losses.token_losses(hf_model, tokenizer, [read[text][0] for text in part])
        known.update(zip(part, found, strict=True))
        log.info("losses: %d of %d texts", start + len(part), len(missing))
        if cache:
            with cache.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"by": by, "text": t, "loss": known[t].tolist()}) + "\n" for t in part)
    rows_ = [coherence.features(t, read[t][0], np.array(known[t]), read[t][1]) for t in texts]
    return list(rows_[0]), np.array([list(row.values()) for row in rows_])

"""Is a text about a topic? Static word embeddings shipped inside a wheel, with the lexicon as second opinion."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from steerkit.concept import Concept, concepts
from steerkit.judges import Judge, checked, parameters, sigmoid


@functools.cache
def _wordllama():
    """Open wordllama from its own wheel, never the network; it finds its own tokenizer only where a cache would be."""
    import wordllama

    return wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)


def embed(texts: Sequence[str]) -> Float[np.ndarray, "texts 256"]:
    """Return unit sentence embeddings (mean of token embeddings); a text without a token gets the zero vector."""
    if not texts:
        return np.zeros((0, 256), dtype=np.float32)
    vectors = _wordllama().embed(list(texts))
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def lexicon_score(texts: Sequence[str], lexicon: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """Return 1 - 2^-hits, hits = number of lexicon entries found (`stem*`: any ending, others: whole words).

    >>> lexicon_score(["He cursed the angry dog.", "A calm day"], ["angr*", "curs*"]).tolist()
    [0.75, 0.0]
    """
    entries = sorted((entry.lower() for entry in lexicon), key=len, reverse=True)
    bodies = [re.escape(e[:-1]) if e.endswith("*") else re.escape(e) + r"(?!\w)" for e in entries]
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(bodies) + ")")
    hits = np.array([len(pattern.findall(text.lower().replace("\u2019", "'"))) for text in texts], dtype=np.float64)
    return 1.0 - 2.0**-hits


def training_set(concept: Concept, others: dict[str, Concept]) -> tuple[list[str], np.ndarray]:
    """Return texts and labels: a concept's judge sentences (+1) against those off topic and all other concepts' (-1).

    No contrast prompt and no held-out sentence: what made a vector, or chose a feature, teaches no judge.
    """
    off = list(concept.judge_negative)
    off += [p for o in others.values() if o.name != concept.name for p in o.judge_positive + o.judge_negative]
    return [*concept.judge_positive, *off], np.array([1.0] * len(concept.judge_positive) + [-1.0] * len(off))


def fit_direction(x: Float[np.ndarray, "texts d"], y: Float[np.ndarray, " texts"], ridge: float) -> tuple[Float[np.ndarray, " d"], float]:
    """Return (w, b) with the least sum_i c_i (w x_i + b - y_i)^2 + ridge |w|^2, where c_i gives each class weight 1."""
    from sklearn.linear_model import Ridge

    weight = np.where(y > 0, 1.0 / (y > 0).sum(), 1.0 / (y < 0).sum())
    fitted = Ridge(ridge).fit(x.astype(np.float64), y, sample_weight=weight)
    return fitted.coef_, float(fitted.intercept_)


def named(topic: str, known: dict[str, Concept] | None = None) -> Concept:
    """Return the concept of that name; ValueError where data/concepts, which may be read already, has none."""
    known = concepts() if known is None else known
    if topic not in known:
        raise ValueError(f"expected a concept among {sorted(known)}, got {topic!r}; add data/concepts/{topic}.yaml")
    return known[topic]


def concept_judge(concept: Concept | str, *, others: dict[str, Concept] | None = None) -> Judge:
    """Return a judge of P(text is about the concept) = sigmoid(a e + b l + c).

    e is a ridge classifier on the text's embedding, fitted here, in milliseconds, on the concept's contrast prompts against
    those of `others`, all of data/concepts by default (so a new concept file works at once); l is `lexicon_score`; a, b, c
    are the same for all concepts. Prompts, where given, are ignored: only the text counts. Empty text scores 0.

    Raises ValueError for an unknown concept name.

    >>> concept_judge("london")(["We took the tube to Camden.", "Potatoes grow in sandy soil."]).round().tolist()
    [1.0, 0.0]
    """
    known = concepts() if others is None else None
    concept = named(concept, known) if isinstance(concept, str) else concept
    others = known if others is None else others
    fitted = parameters("concept")
    texts, labels = training_set(concept, others)
    w, b = fit_direction(embed(texts), labels, fitted["ridge"])

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        texts, _ = checked(texts, prompts)
        e, lexicon = embed(texts) @ w + b, lexicon_score(texts, concept.lexicon)
        p = sigmoid(fitted["embedding"] * e + fitted["lexicon"] * lexicon + fitted["intercept"])
        return np.where([bool(text.strip()) for text in texts], p, 0.0)

    return judge


def lexicon_judge(concept: Concept | str) -> Judge:
    """Return the second opinion: `lexicon_score` with the concept's own words, which no embedding has seen.

    >>> lexicon_judge("london")(["We took the tube to Camden.", "Potatoes grow in sandy soil."]).tolist()
    [0.75, 0.0]
    """
    words = (named(concept) if isinstance(concept, str) else concept).lexicon

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        return lexicon_score(checked(texts, prompts)[0], words)

    return judge

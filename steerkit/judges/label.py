"""Does a text show what a feature's label says? Judges built from the label alone: its contexts, or its lens tokens.

A label is a list of pieces, each a short text and the token that matters in it: the places where a feature fires hardest (input
side), or the tokens that its decoder row raises (output side). No model is asked, and no steered text is seen.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from steerkit.judges import Judge, checked, sigmoid
from steerkit.judges.concept import embed
from steerkit.stats import auroc

Label = Sequence[tuple[str, str]]
FALSE, RATED = 0.05, 0.25  # the share of texts on another label that may get 1 of 2, which begins at 0.25


def context_label(passages: Iterable[tuple[str, str, str, float]]) -> Label:
    """Return the label of the places where a feature fires (`feature_cards.passages`), each text once.

    >>> context_label([("the", " cat", " sat", 2.0), ("the", " cat", " sat", 1.0), ("a", " dog", "", 0.0)])
    [('the cat sat', ' cat')]
    """
    return list(dict.fromkeys((before + peak + after, peak) for before, peak, after, value in passages if value > 0))


def word_label(tokens: Iterable[str]) -> Label:
    """Return the label of those tokens that are whole words of three letters or more, each once whatever its case.

    >>> word_label([" Rain", "ilantro", " rain", " of", " weather"])
    [(' Rain', ' Rain'), (' weather', ' weather')]
    """
    kept: dict[str, str] = {}
    for token in tokens:
        if token[:1] == " " and token[1:].isalpha() and len(token) > 3:
            kept.setdefault(token.lower(), token)
    return [(token, token) for token in kept.values()]


class Plain:
    """Plain texts that labels are set against: how rare a token is in them, and what their embeddings are like.

    texts: of about the length of those to be judged. split: a text's tokens as strings, by the tokenizer that the labels are from.
    """

    def __init__(self, texts: Sequence[str], split: Callable[[str], list[str]]):
        self.texts, _ = checked(texts)
        self.split = lambda text: {token.strip().lower() for token in split(text)} - {""}
        seen = Counter(token for text in self.texts for token in self.split(text))
        self.rarity = lambda token: float(np.log((len(self.texts) + 1) / (seen[token] + 1)))
        self.embeddings = embed(self.texts)
        self.centre = self.embeddings.mean(0)

    def evidence(self, label: Label, texts: Sequence[str]) -> Float[np.ndarray, "texts 2"]:
        """Return how near each text's embedding is to the label's, in standard deviations of plain text (three at most, so that nothing
        is extrapolated far), and log(1 + the rarity of the label's tokens that it holds)."""
        towards = embed([text for text, _ in label]).mean(0) - self.centre
        towards /= np.linalg.norm(towards) + 1e-9
        plain, found = self.embeddings @ towards, embed(texts) @ towards
        keys = {key.strip().lower() for _, key in label} - {""}
        held = [sum(self.rarity(token) for token in keys & self.split(text)) for text in texts]
        return np.stack([np.clip((found - plain.mean()) / (plain.std() + 1e-9), -3, 3), np.log1p(held)], 1)


def planted(labels: Mapping[object, Label], plain: Plain, *, hold_out: bool = True, seed: int = 0) -> pd.DataFrame:
    """Return what judges can be fitted on and checked with: plain texts in whose middle a piece of a known label was planted.

    Each piece is planted twice: for the judge of its own label, which with `hold_out` was built without this piece, and for that of
    another label. A row: label, own (whether the piece is the label's), near and tokens (`Plain.evidence`). ValueError for fewer than
    two labels.
    """
    rng, names, rows = np.random.default_rng(seed), list(labels), []
    if len(names) < 2:
        raise ValueError(f"labels: expected at least two, one to be a stranger to the other, got {len(names)}")
    for n, name in enumerate(names):
        pieces = list(labels[name])
        others = [labels[names[(n + step) % len(names)]] for step in rng.integers(1, len(names), len(pieces))]
        strange = [other[rng.integers(len(other))] for other in others]
        hosts = rng.choice(plain.texts, (2, len(pieces)))
        for own, texts in ((True, map(_plant, hosts[0], pieces)), (False, map(_plant, hosts[1], strange))):
            for i, text in enumerate(texts):
                rest = pieces[:i] + pieces[i + 1 :] if hold_out else pieces
                rows += [(name, own, *plain.evidence(rest, [text])[0])] if rest else []
    return pd.DataFrame(rows, columns=["label", "own", "near", "tokens"])


def _plant(text: str, piece: tuple[str, str]) -> str:
    words = text.split(" ")
    half = len(words) // 2
    return f"{' '.join(words[:half])} {piece[0].strip()} {' '.join(words[half:])}"


@dataclass(frozen=True)
class Fitted:
    """What turns evidence into a score: sigmoid(near x weights[0] + tokens x weights[1] + intercept)."""

    weights: tuple[float, float]
    intercept: float

    def score(self, evidence: Float[np.ndarray, "texts 2"]) -> Float[np.ndarray, " texts"]:
        """Return scores in [0, 1]."""
        return sigmoid(evidence @ np.array(self.weights) + self.intercept)


def fit(table: pd.DataFrame, like: Fitted | None = None) -> Fitted:
    """Return the judge that tells own from strange pieces best (logistic regression on a table of `planted`, classes of equal weight).

    The intercept is that at which `FALSE` of the strange ones reach `RATED`: rounded to {0, 1, 2}, a twentieth of unrelated texts gets
    1 or more. like: a judge whose weights are kept, so that two kinds of label are weighed alike.
    """
    from sklearn.linear_model import LogisticRegression

    x = table[["near", "tokens"]].to_numpy()
    weights = like.weights if like else LogisticRegression(class_weight="balanced").fit(x, table.own).coef_[0].tolist()
    cut = np.quantile(x[~table.own] @ np.array(weights), 1 - FALSE)
    return Fitted(tuple(weights), float(np.log(RATED / (1 - RATED)) - cut))


def checks(table: pd.DataFrame, fitted: Fitted) -> pd.DataFrame:
    """Return a row a label of a table of `planted`: AUROC of own pieces against all strange ones, and the share of both rated 1 or more."""
    score = fitted.score(table[["near", "tokens"]].to_numpy())
    strange = score[~table.own]
    rows = {}
    for name, part in table.assign(score=score).groupby("label", sort=False):
        own = part.score[part.own].to_numpy()
        rows[name] = [float(auroc(own[:, None], strange[:, None])[0]), (own >= RATED).mean(), (part.score[~part.own] >= RATED).mean()]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["auroc", "found", "false"])


def label_judge(label: Label, plain: Plain, fitted: Fitted) -> Judge:
    """Return a judge of whether a text shows what the label says; prompts, where given, are ignored. Empty text scores 0.

    >>> judge = label_judge([(" the weather in March", " weather")], plain, fitted)    # doctest: +SKIP
    >>> judge(["How is the weather today?", "Add two eggs."]).round().tolist()         # doctest: +SKIP
    [1.0, 0.0]
    """

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        texts, _ = checked(texts, prompts)
        return np.where([bool(text.strip()) for text in texts], fitted.score(plain.evidence(label, texts)), 0.0)

    return judge

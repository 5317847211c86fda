"""A second opinion on fluency, by no neural model: how often a corpus has each pair of neighbouring tokens, and repetition."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from safetensors import safe_open

from steerkit.files import DATA, resolve
from steerkit.judges import Judge, checked, parameters
from steerkit.judges.coherence import expected_fluency, repeated, split, windows

BACK_OFF = 0.4  # what an unseen pair keeps of its second token's own probability (Brants et al. 2007)


class Bigrams:
    """log p(b | a) of the pairs that a corpus has, and log p(b) for the others; made by `python -m recipes.bigrams`."""

    def __init__(self, path=DATA / "judges" / "bigrams.safetensors"):
        with safe_open(resolve(path), "pt") as file:
            self.pairs, self.log_p, self.log_one = (file.get_tensor(name).numpy() for name in ("pairs", "log_p", "log_one"))
        self.vocab = len(self.log_one)

    def surprise(self, ids: Sequence[int]) -> tuple[Float[np.ndarray, " next"], Int[np.ndarray, " next"]]:
        """Return -log p(t_i | t_{i-1}) in nats for every token but the first, and whether the corpus has the pair."""
        ids = np.asarray(ids, dtype=np.int64)
        wanted = (ids[:-1] * self.vocab + ids[1:]).astype(self.pairs.dtype)
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = self.pairs[place] == wanted
        backed_off = np.log(BACK_OFF) + self.log_one[ids[1:]].astype(np.float64)
        return -np.where(seen, self.log_p[place].astype(np.float64), backed_off), seen.astype(int)


def features(bigrams: Bigrams, ids: Sequence[int]) -> dict[str, float]:
    """Return what the judge looks at, for at least two tokens."""
    surprise, seen = bigrams.surprise(ids)
    return {
        "mean": surprise.mean(),
        "worst 8 tokens": windows(surprise, 8).max(),
        "90 % quantile": np.quantile(surprise, 0.9),
        "unseen pairs": 1.0 - seen.mean(),
        "worst 8 unseen": windows(1.0 - seen, 8).max(),
        **{f"repeated {n}-grams": repeated(ids, n) for n in (1, 2, 3, 4)},
        "length": np.log(len(surprise)),
    }


@functools.cache
def _opened():
    from transformers import AutoTokenizer

    from steerkit.judges.coherence import EMBEDDED
    from steerkit.models.fetch import embedded
    from steerkit.models.presets import preset

    return Bigrams(), AutoTokenizer.from_pretrained(embedded(preset(EMBEDDED).package))


def feature_matrix(texts: Sequence[str], prompts: Sequence[str] | None = None) -> tuple[list[str], Float[np.ndarray, "texts features"]]:
    """Return the names and values of `features` for texts that have at least two tokens."""
    bigrams, tokenizer = _opened()
    pairs = zip(texts, prompts or [None] * len(texts), strict=True)
    rows = [features(bigrams, split(tokenizer, text, prompt)[0]) for text, prompt in pairs]
    return list(rows[0]), np.array([list(row.values()) for row in rows])


def bigram_judge(fitted: dict | None = None) -> Judge:
    """Return a judge of fluency, E[label] / 2 on a 0-1-2 scale, from pairs of tokens and repetition; a text of one word scores 0.

    It never ran a language model, so its errors are not those of `coherence_judge`.

    >>> bigram_judge()(["I think the bus is late.", "bus bus zq bus the the"]).round().tolist()    # doctest: +SKIP
    [1.0, 0.0]
    """
    fitted = parameters("bigrams") if fitted is None else fitted

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        texts, prompts = checked(texts, prompts)
        scores, full = np.zeros(len(texts)), [i for i, text in enumerate(texts) if len(text.split()) > 1]
        if full:
            _, x = feature_matrix([texts[i] for i in full], None if prompts is None else [prompts[i] for i in full])
            scores[full] = expected_fluency(fitted, x)
        return scores

    return judge

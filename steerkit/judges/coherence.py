"""Is a text fluent? What surprises the unsteered model, together with repetition and odd characters."""

import functools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from steerkit.engine.losses import token_losses
from steerkit.engine.tokens import bare_ids
from steerkit.judges import Judge, checked, parameters, sigmoid
from steerkit.models.fetch import CONVERSION
from steerkit.models.presets import preset
from steerkit.store import fingerprint

MAX_TOKENS = 256
MAX_CONTEXT = 128


def split(tokenizer, text: str, prompt: str | None = None) -> tuple[list[int], int]:
    """Return the token ids that the judge reads and where the continuation starts among them.

    With a prompt, the continuation is the text, after at most the prompt's last `MAX_CONTEXT` tokens. Without, it is what
    follows the first blank line, or the second half where there is none. At most `MAX_TOKENS` are read.
    """
    encode = lambda part: bare_ids(tokenizer, part)  # noqa: E731
    if prompt is not None:
        context = encode(prompt)[-MAX_CONTEXT:]
        return (context + tokenizer(text, add_special_tokens=False)["input_ids"])[:MAX_TOKENS], len(context)
    ids, blank = encode(text)[:MAX_TOKENS], text.find("\n\n")
    start = len(encode(text[: blank + 2])) if blank > 0 else len(ids) // 2
    return ids, start if start < len(ids) - 2 else len(ids) // 2


def windows(losses: Float[np.ndarray, " pos"], size: int) -> Float[np.ndarray, " windows"]:
    """Return the mean loss of every run of `size` tokens, or of all tokens where there are fewer."""
    if len(losses) <= size:
        return np.array([losses.mean()])
    total = np.concatenate([[0.0], np.cumsum(losses)])
    return (total[size:] - total[:-size]) / size


def repeated(items: Sequence, n: int) -> float:
    """Return the share of n-grams that occurred before, 1 - distinct / all.

    >>> repeated("a b a b a".split(), 2)
    0.5
    """
    grams = list(zip(*(items[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def features(text: str, ids: Sequence[int], losses: Float[np.ndarray, " pos"], start: int) -> dict[str, float]:
    """Return what the judge looks at: losses of the whole and of the continuation, repetition, characters."""
    part = losses[start:] if len(losses) - start >= 3 else losses[-5:]
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    letters = [word for word in words if word.isalpha()]
    size = max(len(text), 1)
    top = max(Counter(letters).values(), default=0) / max(len(letters), 1)
    return {
        "worst 16 tokens": np.log1p(windows(losses, 16).max()),
        "worst 8 tokens": windows(part, 8).max(),
        "worst token": part.max(),
        "mean": np.sqrt(part.mean()),
        "90 % quantile": np.quantile(part, 0.9),
        "worst 3 tokens": np.sort(losses)[-3:].mean(),
        "second half": losses[len(losses) // 2 :].mean(),
        "tokens above 6": np.log1p((losses > 6).sum()),
        "tokens above 9": np.log1p((losses > 9).sum()),
        "tokens below 0.1": float((losses < 0.1).mean()),
        **{f"repeated {n}-grams": repeated(ids, n) for n in (1, 2, 3, 4)},
        "same word twice": np.log1p(sum(a == b and a.isalpha() for a, b in pairwise(words))),
        "same pair twice": np.log1p(sum(words[i : i + 2] == words[i + 2 : i + 4] for i in range(len(words) - 3))),
        "top word": np.sqrt(top),
        "zlib ratio": len(zlib.compress(text.encode())) / max(len(text.encode()), 1),
        "length": np.log(len(losses)),
        "continuation length": np.log(max(len(losses) - start, 1)),
        "ends a sentence": float(text.rstrip()[-1:] in (".", "!", "?")),
        "ends in a word": float(text.rstrip()[-1:].isalnum()),
        "odd spaces": np.log1p(len(re.findall(r"(?<=\S)  +(?=\S)|\w\s+[,.;:?!]", text))),
        "capitals inside words": np.sqrt(len(re.findall(r"[a-z][A-Z]", text)) / size),
        "not ascii": np.sqrt(sum(ord(c) > 127 for c in text) / size),
        "other scripts": np.log1p(sum(ord(c) > 0x24F and c.isalpha() for c in text)),
    }


def standard(fitted: dict, x: Float[np.ndarray, "texts features"]) -> Float[np.ndarray, "texts features"]:
    """Return features in standard deviations from their mean, three at most, so that nothing is extrapolated far."""
    return np.clip((x - np.array(fitted["mean"])) / np.array(fitted["std"]), -3.0, 3.0)


def expected_fluency(fitted: dict, x: Float[np.ndarray, "texts features"]) -> Float[np.ndarray, " texts"]:
    """Return E[label] / 2 for labels 0, 1, 2: the mean of P(label >= 1) and P(label >= 2), two logistic regressions.

    A loop of two or three words has low losses, so the regressions alone give it about 0.3. Therefore a text more than
    half of whose 4-grams are repeats is scaled down, to 0 where all are (Spearman falls by less than 0.001).
    """
    logit = standard(fitted, x) @ np.array(fitted["weights"]).T + np.array(fitted["intercepts"])
    loops = np.asarray(x)[:, fitted["features"].index("repeated 4-grams")]
    return sigmoid(logit).mean(axis=1) * np.clip(2 * (1 - loops), 0, 1)


def feature_matrix(
    hf_model, tokenizer, texts: Sequence[str], prompts: Sequence[str] | None = None
) -> tuple[list[str], Float[np.ndarray, "texts features"]]:
    """Return the names and values of `features` for texts that have at least one token."""
    pairs = [(text, None) for text in texts] if prompts is None else list(zip(texts, prompts, strict=True))
    read = [split(tokenizer, text, prompt) for text, prompt in pairs]
    losses = token_losses(hf_model, tokenizer, [ids for ids, _ in read])
    rows = [
        features((prompt or "") + text, ids, loss, start) for (text, prompt), (ids, start), loss in zip(pairs, read, losses, strict=True)
    ]
    return list(rows[0]), np.array([list(row.values()) for row in rows])


def coherence_judge(hf_model, tokenizer, *, fitted: dict | None = None) -> Judge:
    """Return a judge of fluency, E[label] / 2 on a 0-1-2 scale of fluency; an empty text scores 0.

    `hf_model` is a causal language model without any steering; the fitted numbers (data/judges/coherence.json) belong to
    the embedded model: `embedded_judge` is the one to use. With `prompts` each text is read as the
    continuation of its prompt.

    >>> import steerkit as sk
    >>> lab = sk.open("smollm2-135m")
    >>> judge = coherence_judge(lab.hf, lab.tokenizer)
    >>> judge(["I think the bus is late.", "bus bus zq bus the the"]).round().tolist()
    [1.0, 0.0]
    """
    fitted = parameters("coherence") if fitted is None else fitted

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        texts, prompts = checked(texts, prompts)
        scores, full = np.zeros(len(texts)), [i for i, text in enumerate(texts) if text.strip()]
        if full:
            before = None if prompts is None else [prompts[i] for i in full]
            names, x = feature_matrix(hf_model, tokenizer, [texts[i] for i in full], before)
            if names != fitted["features"]:
                raise ValueError("data/judges/coherence.json: expected the present features; run recipes.judges")
            scores[full] = expected_fluency(fitted, x)
        return scores

    return judge


EMBEDDED = "smollm2-135m"


@functools.cache
def embedded_judge(dtype: str = "") -> Judge:
    """Return the coherence judge on a model of its own, the embedded one, opened once: whatever model wrote the texts.

    dtype: float32 by default. In bfloat16, where that is native, it is three times as fast, and on 256 steered texts scores 0.004 lower
    on average (sd 0.005, at most 0.021).
    """
    from steerkit.models.load import load_model

    return coherence_judge(*load_model(preset(EMBEDDED), dtype=dtype or None))


def embedded_by(dtype: str = "") -> str:
    """Return a key of all that `embedded_judge` scores by: its fitted numbers, and the model as it is fetched."""
    return fingerprint(parameters("coherence"), preset(EMBEDDED).package, CONVERSION, *([dtype] if dtype else []))

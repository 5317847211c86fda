"""Judges: functions that turn texts into scores in [0, 1], and the `panel` of them that a sweep is judged by.

`concept`, `coherence`, `related` and `refusal` work offline and give the same answer every time; `api` asks a model.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float

from steerkit.concept import Concept
from steerkit.files import DATA, cache_dir, resolve
from steerkit.stats import auroc
from steerkit.store import Work, score_texts


@runtime_checkable
class Judge(Protocol):
    """Score texts: `judge(texts)[i]` is in [0, 1]; `prompts`, where given, hold what each text continues."""

    def __call__(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]: ...


def checked(texts: Sequence[str], prompts: Sequence[str] | None = None) -> tuple[list[str], list[str] | None]:
    """Return texts and prompts as lists, or raise ValueError for a lone string, a non-string or unequal lengths."""
    for name, entries in (("texts", texts), ("prompts", prompts)):
        if isinstance(entries, str) or (entries is not None and not all(isinstance(entry, str) for entry in entries)):
            raise ValueError(f"expected {name} as a list of strings, got {type(entries).__name__}; put one text in a list")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"expected one prompt for each of {len(texts)} texts, got {len(prompts)} prompts")
    return list(texts), None if prompts is None else list(prompts)


def parameters(name: str) -> dict:
    """Return the fitted numbers of one judge, data/judges/<name>.json, which `python -m recipes.judges` makes."""
    path = DATA / "judges" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}; make it with: python -m recipes.judges --shared <folder>")
    return json.loads(path.read_text(encoding="utf-8"))


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logit)), safe for large numbers."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64)))


Asked = tuple[Judge, pd.DataFrame]


@dataclass(frozen=True)
class Panel:
    """Who judges: a judge for each topic, one of coherence (or fluency), one of whether a text is about what its prompt asks.

    by: what judges coherence, where that is slow; finished parts are kept under it. before: told of all that is about to be
    asked, so that judges that cost something can say how much, and ask for all of it at once. in_words: a judge of a concept that is
    described and no topic of data/concepts, where the judges understand words.
    """

    name: str
    concept: Callable[[object], Judge]
    coherence: Judge
    instruction: Judge
    by: str = ""
    before: Callable[[Sequence[Asked]], None] | None = None
    in_words: Callable[[str], Judge] | None = None

    def score(self, asked: Sequence[Asked], work: Work = Work()) -> list[pd.Series]:
        """Return each judge's scores of its texts (columns prompt and text), under their index; equal pairs are judged once.

        work.out: where the texts are kept; if "{key}" is in it, finished parts of coherence stay beside them, and the same call carries on.
        """
        pairs = [texts[["prompt", "text"]] for _, texts in asked]
        distinct = [(judge, part.drop_duplicates()) for (judge, _), part in zip(asked, pairs)]
        if self.before:
            self.before(distinct)
        found = [self._judged(judge, part, work) for judge, part in distinct]
        return [part.merge(scores, how="left").score.set_axis(part.index) for part, scores in zip(pairs, found)]

    def _judged(self, judge: Judge, pairs: pd.DataFrame, work: Work) -> pd.DataFrame:
        read = lambda part: {"score": judge(part.text.tolist(), part.prompt.tolist())}  # noqa: E731
        if not self.by or judge is not self.coherence:
            return pairs.assign(**read(pairs))
        return score_texts(pairs, read, name="coherence", by=self.by, work=work)


def panel(
    spec: str = "offline",
    *,
    rubric: str = "sae_ts",
    dtype: str = "",
    cassette: str | Path | None = None,
    max_calls: int = 2000,
    **endpoint,
) -> Panel:
    """Return who judges: "offline", this project's own judges; "second", a lexicon and pairs of tokens, which share nothing with
    these; or "api:MODEL@URL", a model behind any OpenAI-compatible address.

    rubric: what a model is asked, "sae_ts" (behaviour and coherence, 1 to 10) or "axbench" (concept and fluency, 0 to 2); both
    ask AxBench's question about the instruction, as SAE-TS has none, and all scores are brought to 0..1. dtype: of the model that the
    offline judge of coherence asks, float32 by default. cassette: the file
    that keeps the answers, judged.jsonl in the cache folder by default; what it holds is not asked for again. max_calls: most
    answers that the panel asks for in all. endpoint: other fields of `api.Endpoint`, such as its prices. The key is read from the variable
    STEERKIT_API_KEY.

    Raises ValueError for another spec or rubric.

    >>> panel("api:gpt-4o-mini@https://api.openai.com/v1").name
    'api:gpt-4o-mini@https://api.openai.com/v1'
    """
    if spec == "offline":
        from steerkit.judges.coherence import embedded_by, embedded_judge
        from steerkit.judges.concept import concept_judge
        from steerkit.judges.related import related_judge

        return Panel(
            spec,
            concept=concept_judge,
            coherence=lambda texts, prompts=None: embedded_judge(dtype)(texts, prompts),  # opened when it is first asked
            instruction=lambda texts, prompts=None: related_judge(prompts or ())(texts, prompts),
            by=embedded_by(dtype),
        )
    if spec == "second":
        from steerkit.judges.bigrams import bigram_judge
        from steerkit.judges.concept import lexicon_judge
        from steerkit.judges.related import related_judge

        related = lambda texts, prompts=None: related_judge(prompts or ())(texts, prompts)  # noqa: E731
        return Panel(spec, concept=lexicon_judge, coherence=bigram_judge(), instruction=related)
    from steerkit.judges.api import Answers, Endpoint, api_panel

    found = re.fullmatch(r"api:(.+)@(https?://\S+)", spec)
    if not found:
        as_in = "as in api:gpt-4o-mini@https://api.openai.com/v1"
        raise ValueError(f'judge: expected "offline", "second" or "api:MODEL@URL", {as_in}, got {spec!r}')
    cassette = resolve(cassette or cache_dir() / "judged.jsonl")
    return api_panel(spec, rubric, Answers(Endpoint(found[2], found[1], **endpoint), cassette, max_calls))


def card(topics: Mapping[str, Concept], panels: Sequence[Panel]) -> pd.DataFrame:
    """Return a row a topic, a column a panel: the AUROC of its judge of the topic on the held-out sentences, none of which it has seen.

    >>> card({"love": concepts()["love"]}, [panel(), panel("second")])    # doctest: +SKIP
    """
    found = {
        one.name: [auroc(*(one.concept(name)(list(texts))[:, None] for texts in topic.held_out))[0] for name, topic in topics.items()]
        for one in panels
    }
    return pd.DataFrame(found, index=pd.Index(topics, name="topic"))

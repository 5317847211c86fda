"""A language model as judge, over any OpenAI-compatible endpoint; answers are recorded in a cassette and replayed."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import httpx
import numpy as np
from jaxtyping import Float
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from steerkit.judges import Asked, Judge, Panel, checked
from steerkit.judges.concept import named
from steerkit.judges.rubrics import PAPERS, Rubric, axbench_instruction, read_score
from steerkit.progress import bar

KEY_VARIABLE = "STEERKIT_API_KEY"
UNREADABLE = 0.05  # largest share of replies without a score that is let pass


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is: an address ending in /v1, a model name, how it answers, and what a million tokens cost.

    The prices are those of gpt-4o-mini, the papers' judge, unless others are given.
    """

    base_url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 150
    price_in: float = 0.15
    price_out: float = 0.60
    currency: str = "USD"
    timeout: float = 30.0
    retries: int = 5
    pause: float = 0.5
    workers: int = 8


def read_cassette(path: str | Path) -> dict[str, str]:
    """Return the recorded replies by key; a half-written last line is left out.

    Raises ValueError for any other broken line.
    """
    path, replies = Path(path), {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                entry = json.loads(line)
                replies[entry["key"]] = entry["reply"]
        except (json.JSONDecodeError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected JSON with key and reply, got {line[:60]!r}; take it out") from None
    return replies


def _open_for_append(path: Path):
    """Open a cassette for appending, after cutting off a last line that was not finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        if (held := file.read()) and not held.endswith(b"\n"):
            file.truncate(held.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def request_body(rubric: Rubric, endpoint: Endpoint, text: str, prompt: str) -> dict:
    """Return the body of one chat-completions request, all of which goes into the cassette's key."""
    body = {"model": endpoint.model, "temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
    body["messages"] = rubric.messages(text, prompt)
    return {**body, "response_format": {"type": "json_object"}} if rubric.json_reply else body


def cassette_key(body: dict) -> str:
    """Return the sha256 of a request body as canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def estimate(bodies: Sequence[dict], endpoint: Endpoint) -> str:
    """Return in words what these calls take: four characters a token in, `max_tokens` out, at the endpoint's prices."""
    tokens_in = round(sum(len(message["content"]) for body in bodies for message in body["messages"]) / 4)
    tokens_out = len(bodies) * endpoint.max_tokens
    price = (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6
    return (
        f"{len(bodies):,} calls to {endpoint.model}, about {tokens_in:,} tokens in and at most {tokens_out:,} out: at most about "
        f"{price:.4f} {endpoint.currency}, at {endpoint.price_in:g} and {endpoint.price_out:g} for a million"
    )


def _busy(error: BaseException) -> bool:
    """Tell whether asking again may help: nothing came through, too many ask at once, or the server has a problem of its own."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


@dataclass
class Answers:
    """The answers of one model: those that the cassette holds, and others for the asking, at most `max_calls` in all.

    The cassette is a JSON-lines file keyed by the sha256 of model, parameters and messages (not of the address). The key is
    read from the variable STEERKIT_API_KEY, and never written.
    """

    endpoint: Endpoint
    cassette: Path
    max_calls: int
    calls: int = field(default=0, init=False)

    @cached_property
    def known(self) -> dict[str, str]:
        """The answers by key, read from the cassette once."""
        return read_cassette(self.cassette)

    def to(self, bodies: Sequence[dict]) -> list[str]:
        """Return the answer to each request. What the cassette lacks is asked for, after a line that says how much and the price.

        Raises, before any call, ValueError where it would be more than `max_calls` since this was made, PermissionError where there
        is no key; RuntimeError for a call that fails. What was answered until then is in the cassette.
        """
        by_key = {cassette_key(body): body for body in bodies}
        if missing := {key: body for key, body in by_key.items() if key not in self.known}:
            cost = estimate(list(missing.values()), self.endpoint)
            if self.calls + len(missing) > self.max_calls:
                after = f" after {self.calls:,} made before" if self.calls else ""
                raise ValueError(f"expected at most {self.max_calls:,} calls, got {cost}{after}; raise max_calls or judge fewer texts")
            if not os.environ.get(KEY_VARIABLE):
                raise PermissionError(
                    f"expected recorded answers in {self.cassette} or a key in {KEY_VARIABLE}, got neither for {len(missing)} of "
                    f"{len(by_key)} requests ({cost}); set {KEY_VARIABLE} (any word will do for a server that asks for no key)"
                )
            print(f"judge: {cost}", flush=True)
            self._record(missing)
        return [self.known[cassette_key(body)] for body in bodies]

    def _record(self, missing: Mapping[str, dict]) -> None:
        """Ask for the missing answers, a few at a time, and append each to the cassette as it arrives."""
        lock, headers = threading.Lock(), {"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"}
        with (
            _open_for_append(self.cassette) as file,
            httpx.Client(headers=headers, timeout=self.endpoint.timeout) as client,
            ThreadPoolExecutor(self.endpoint.workers) as pool,
        ):

            def one(key: str, body: dict) -> None:
                with lock:
                    self.calls += 1
                reply = self._call(client, body)
                with lock:
                    self.known[key] = reply
                    file.write(json.dumps({"key": key, "model": self.endpoint.model, "reply": reply}) + "\n")
                    file.flush()

            calls = [pool.submit(one, key, body) for key, body in missing.items()]
            try:
                for call in bar(calls, "judge", "call"):
                    call.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _call(self, client: httpx.Client, body: dict) -> str:
        """Return the reply to one request; tries again, later and later, when the server is busy."""
        url, place = self.endpoint.base_url.rstrip("/") + "/chat/completions", self.endpoint
        again = Retrying(
            retry=retry_if_exception(_busy),
            stop=stop_after_attempt(place.retries + 1),
            wait=wait_exponential_jitter(place.pause, max=30, jitter=place.pause),
            reraise=True,
        )
        try:
            reply = again(lambda: client.post(url, json=body).raise_for_status())
            return reply.json()["choices"][0]["message"]["content"] or ""
        except httpx.HTTPStatusError as error:
            problem = f"HTTP {error.response.status_code}: {error.response.text[:200]!r}"
        except httpx.RequestError as error:
            problem = f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, IndexError, TypeError):
            problem = "a reply that is not one"
        raise RuntimeError(
            f"expected a chat completion from {url}, got {problem.replace(os.environ[KEY_VARIABLE], '...')}; check the address, the model "
            f"and {KEY_VARIABLE}, then run again: the answers so far are kept in {self.cassette}"
        )


@dataclass(frozen=True)
class ApiJudge:
    """A judge that asks a model by a rubric, once for each distinct text and prompt.

    A reply without a score on the scale counts 0, as in AxBench, and a line says how many do; ValueError where they are more
    than one in twenty. Source: SAE-TS (arXiv 2411.02193) appendix B and AxBench (arXiv 2501.17148) appendix J; questions in
    our own words.

    >>> from steerkit.judges.rubrics import coherence
    >>> judge = ApiJudge(coherence(), Answers(Endpoint("http://localhost:8000/v1", "some-model"), Path("judged.jsonl"), 2000))
    >>> judge([]).tolist()
    []
    """

    rubric: Rubric
    answers: Answers

    def bodies(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[dict]:
        """Return the requests, one for each text."""
        texts, prompts = checked(texts, prompts)
        return [request_body(self.rubric, self.answers.endpoint, *pair) for pair in zip(texts, prompts or [""] * len(texts), strict=True)]

    def __call__(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        replies = self.answers.to(self.bodies(texts, prompts))
        scores = np.array([read_score(self.rubric, reply) for reply in replies], dtype=np.float64)
        if (lost := np.isnan(scores)).any():
            scale, model = f"scores from {self.rubric.low:g} to {self.rubric.high:g}", self.answers.endpoint.model
            got = f"{lost.sum()} of {len(lost)} replies of {model} without one, such as {replies[int(lost.argmax())][:80]!r}"
            if lost.mean() > UNREADABLE:
                raise ValueError(f"{self.rubric.name}: expected {scale}, got {got}; use a model that answers as asked")
            print(f"{self.rubric.name}: {got}; they count 0", flush=True)
        return np.nan_to_num(scores)


def api_panel(name: str, rubric: str, answers: Answers) -> Panel:
    """Return a panel of API judges that ask by one paper's rubric, and for all that is wanted in one go; see `judges.panel`.

    Raises ValueError for an unknown rubric.
    """
    if rubric not in PAPERS:
        raise ValueError(f"rubric: expected one of {list(PAPERS)}, got {rubric!r}")
    words, asked_of, language = PAPERS[rubric]

    def before(asked: Sequence[Asked]) -> None:
        ours = [(judge, texts) for judge, texts in asked if isinstance(judge, ApiJudge)]
        answers.to([body for judge, texts in ours for body in judge.bodies(texts.text.tolist(), texts.prompt.tolist())])

    def in_words(concept: str) -> Judge:
        return ApiJudge(asked_of(concept), answers)

    def about(topic: str) -> Judge:
        return in_words(words(named(topic)))

    return Panel(name, about, ApiJudge(language, answers), ApiJudge(axbench_instruction(), answers), before=before, in_words=in_words)

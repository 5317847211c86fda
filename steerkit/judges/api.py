"""A language model as judge, over any OpenAI-compatible endpoint; answers are recorded in a cassette and replayed."""

import hashlib
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from steerkit.judges import Judge, checked
from steerkit.judges.rubrics import Rubric, read_score

log = logging.getLogger(__name__)
KEY_VARIABLE = "STEERKIT_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is: an address ending in /v1, a model name, how it answers, and what it costs (per 1,000 tokens).

    Without `api_key` the key is read from the variable STEERKIT_API_KEY. The key is never written anywhere.
    """

    base_url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 150
    price_in: float = 0.00015
    price_out: float = 0.0006
    currency: str = "USD"
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 30.0
    retries: int = 3
    workers: int = 8

    def key(self) -> str | None:
        return self.api_key or os.environ.get(KEY_VARIABLE)


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
                raise ValueError(f"{path}, line {number}: expected JSON with key and reply, got {line[:60]!r}") from None
    return replies


def _open_for_append(path: Path):
    """Open a cassette for appending, after cutting off a last line that was not finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def request_body(rubric: Rubric, endpoint: Endpoint, text: str, prompt: str) -> dict:
    """Return the body of one chat-completions request, all of which goes into the cassette's key."""
    body = {"model": endpoint.model, "temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
    body["messages"] = rubric.messages(text, prompt)
    return {**body, "response_format": {"type": "json_object"}} if rubric.json_reply else body


def cassette_key(body: dict) -> str:
    """Return the sha256 of a request body as canonical JSON."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def price(bodies: Sequence[dict], endpoint: Endpoint) -> float:
    """Return an estimate of the cost: four characters a token in, `max_tokens` out, at the endpoint's prices."""
    tokens_in = sum(len(message["content"]) / 4 for body in bodies for message in body["messages"])
    return (tokens_in * endpoint.price_in + len(bodies) * endpoint.max_tokens * endpoint.price_out) / 1000


def _call(body: dict, endpoint: Endpoint) -> str:
    """Return the reply to one request; tries again, later and later, when the server is busy."""
    url = endpoint.base_url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.key()}"}
    for attempt in range(endpoint.retries + 1):
        try:
            request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
            with urllib.request.urlopen(request, timeout=endpoint.timeout) as response:
                return json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}: {error.read()[:200]!r}"
            if error.code != 429 and error.code < 500:
                break
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            problem = str(error)
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            problem = "a reply that is not a chat completion"
            break
        if attempt < endpoint.retries:
            time.sleep(0.5 * 2**attempt)
    raise RuntimeError(
        f"expected a chat completion from {url}, got {problem}; check base_url, model and key, then run again "
        "(answers so far are kept in the cassette)"
    )


def _record(missing: dict[str, dict], endpoint: Endpoint, cassette: Path, rubric: str) -> None:
    """Ask for the missing replies, a few at a time, and append each to the cassette as it arrives."""
    lock = threading.Lock()
    with _open_for_append(cassette) as file, ThreadPoolExecutor(endpoint.workers) as pool:

        def one(item: tuple[str, dict]) -> None:
            reply = _call(item[1], endpoint)
            with lock:
                file.write(json.dumps({"key": item[0], "rubric": rubric, "reply": reply}) + "\n")
                file.flush()

        futures = [pool.submit(one, item) for item in missing.items()]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def api_judge(rubric: Rubric, endpoint: Endpoint, cassette: str | Path, *, unparseable: str = "error") -> Judge:
    """Return a judge that asks `endpoint` once per distinct text and prompt, and never again for what `cassette` holds.

    The cassette is a JSON-lines file keyed by the sha256 of model, parameters and messages (not of the address).
    A reply without a score on the scale raises ValueError when `unparseable="error"`; when "nan" it gives NaN, and a
    warning says how many (AxBench itself counts such replies as 0: use np.nan_to_num to do the same).

    Raises PermissionError when replies are missing and there is no key: it says how many, the price, and how to record.
    Source: SAE-TS (arXiv 2411.02193) appendix B and AxBench (arXiv 2501.17148) appendix J; questions in our own words.

    >>> from steerkit.judges.rubrics import coherence
    >>> judge = api_judge(coherence(), Endpoint("http://localhost:8000/v1", "some-model"), "runs/cassette.jsonl")
    >>> judge([]).tolist()
    []
    """
    if unparseable not in ("error", "nan"):
        raise ValueError(f'expected unparseable to be "error" or "nan", got {unparseable!r}')
    cassette = Path(cassette)

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        texts, prompts = checked(texts, prompts)
        pairs = zip(texts, prompts or [""] * len(texts), strict=True)
        bodies = [request_body(rubric, endpoint, text, prompt) for text, prompt in pairs]
        keys = [cassette_key(body) for body in bodies]
        replies = read_cassette(cassette)
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in replies}
        if missing:
            cost = f"{price(list(missing.values()), endpoint):.4f} {endpoint.currency}"
            if not endpoint.key():
                raise PermissionError(
                    f"expected recorded answers in {cassette} or a key, got neither for {len(missing)} of "
                    f"{len(set(keys))} calls to {endpoint.model}; to record them (about {cost}) set {KEY_VARIABLE} "
                    "(any word will do for a server that asks for no key)"
                )
            log.info("asking %s for %d answers, about %s", endpoint.model, len(missing), cost)
            _record(missing, endpoint, cassette, rubric.name)
            replies = read_cassette(cassette)
        scores = np.array([read_score(rubric, replies[key]) for key in keys], dtype=np.float64)
        if np.isnan(scores).any():
            first = replies[keys[int(np.isnan(scores).argmax())]]
            count, scale = int(np.isnan(scores).sum()), f"{rubric.low} to {rubric.high}"
            problem = f"expected scores from {scale}, got {count} of {len(scores)} replies without one"
            if unparseable == "error":
                raise ValueError(f'{problem}, such as {first[:80]!r}; use another model, or unparseable="nan"')
            log.warning("%s", problem)
        return scores

    return judge

"""Questions for a judging model: SAE-TS's 1-10 behaviour and coherence, AxBench's three 0-2 scores; our own words."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from steerkit.concept import Concept


@dataclass(frozen=True)
class Rubric:
    """A question about one text: the messages to send, how a score is read from the reply, and the scale's two ends."""

    name: str
    messages: Callable[[str, str], list[dict[str, str]]]
    parse: Callable[[str], float]
    low: float
    high: float
    json_reply: bool = False


def _json_score(reply: str) -> float:
    found = json.loads(reply)["score"]
    if isinstance(found, bool) or int(found) != float(found):
        raise ValueError("not a whole number")
    return float(found)


def _last_rating(reply: str) -> float:
    return float(reply.rsplit("Rating:", 1)[1].strip().splitlines()[0].strip(" []\"'*.`"))


def behaviour(criterion: str) -> Rubric:
    """Return the SAE-TS rubric: how well a text meets `criterion`, a whole number from 1 to 10 in a JSON reply."""
    system = (
        "You grade short texts written by a language model. You are given one criterion. Say how well the text "
        "meets it on a scale from 1 (not at all) to 10 (fully). Reply with a JSON object of the form "
        '{"score": <whole number>}. '
        f"Criterion: {criterion.rstrip('. ')}."
    )

    def messages(text: str, prompt: str) -> list[dict[str, str]]:
        user = f'Prompt:\n"""{prompt}"""\n\nCompletion:\n"""{prompt}{text}"""'
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    return Rubric("behaviour", messages, _json_score, 1, 10, json_reply=True)


def coherence() -> Rubric:
    """Return the SAE-TS rubric for coherence: `behaviour` with the paper's second criterion."""
    rubric = behaviour("The text is coherent and its grammar is correct")
    return Rubric("coherence", rubric.messages, rubric.parse, 1, 10, json_reply=True)


def _axbench(name: str, question: str, scale: str, extra: Callable[[str], str] = lambda prompt: "") -> Rubric:
    def messages(text: str, prompt: str) -> list[dict[str, str]]:
        content = (
            f"{question}\nUse this scale: {scale}\nFirst give a short explanation. Then end with one line of exactly "
            f"this form: Rating: [[score]]\n\n{extra(prompt)}[Start of the sentence fragment]\n{text}\n"
            "[End of the sentence fragment]"
        )
        return [{"role": "user", "content": content}]

    return Rubric(name, messages, _last_rating, 0, 2)


def axbench_concept(concept: str) -> Rubric:
    """Return the AxBench concept rubric (0, 1 or 2), re-worded: is the concept there, whatever the grammar or logic?"""
    question = f"Judge whether this concept is visibly present in the sentence fragment below: {concept}."
    scale = "0 = absent; 1 = present, but only slightly or awkwardly; 2 = present, fully and naturally."
    return _axbench("concept", question + " Ignore grammar and logic.", scale)


def axbench_instruction() -> Rubric:
    """Return the AxBench instruction rubric (0, 1 or 2), re-worded: is the text on the prompt's subject?"""
    question = "Judge only whether the sentence fragment below is about the same subject as the instruction."
    scale = "0 = unrelated; 1 = related slightly or indirectly; 2 = related clearly and directly."
    return _axbench("instruction", question, scale, lambda prompt: f"[Instruction]\n{prompt}\n\n")


def axbench_fluency() -> Rubric:
    """Return the AxBench fluency rubric (0, 1 or 2), re-worded: does the text read well, whatever its content?"""
    question = "Judge how fluent the sentence fragment below is. Ignore whether it is complete or relevant."
    scale = "0 = unnatural, repetitive or not understandable; 1 = clear mistakes; 2 = fluent, near perfect."
    return _axbench("fluency", question, scale)


# What each paper calls a topic, asks of a text on something so called, and asks of its language.
PAPERS: dict[str, tuple[Callable[[Concept], str], Callable[[str], Rubric], Rubric]] = {
    "sae_ts": (lambda topic: topic.criterion, behaviour, coherence()),
    "axbench": (lambda topic: f"{topic.title}. {topic.criterion.rstrip('. ')}", axbench_concept, axbench_fluency()),
}


def read_score(rubric: Rubric, reply: str) -> float:
    """Return (score - low) / (high - low), or NaN where the reply holds no score or one outside the scale."""
    try:
        score = rubric.parse(reply)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError):
        return float("nan")
    return (score - rubric.low) / (rubric.high - rubric.low) if rubric.low <= score <= rubric.high else float("nan")

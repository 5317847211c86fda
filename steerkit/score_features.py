"""Score all features of a preset's SAEs and count which lens tokens meet in text: `python -m steerkit.score_features`."""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pandas as pd

from steerkit.harvest import token_rows
from steerkit.input_scores import collect, input_scores
from steerkit.jumprelu import JumpReLU
from steerkit.models import load_model, preset
from steerkit.output_scores import lens_tokens, output_scores
from steerkit.paths import resolve, shipped, write_table
from steerkit.saes import load_sae
from steerkit.success import cooccurrence, sample_features


def known(folder: str, name: str, layers: Sequence[int]) -> pd.DataFrame:
    """Return the scores of a preset's features at these layers; where some are missing the error holds the recipe."""
    path, recipe = shipped(folder, name, "scores.csv.gz"), f"python -m steerkit.score_features --preset {name} --text PATH_OR_HUB_ID"
    recipe += f" --layers {' '.join(map(str, layers))} --out runs/scores/{name}, then scores=runs/scores"
    if path is None:
        raise FileNotFoundError(f"expected scores of {name}'s features in {resolve(folder) / name}, got none. Make them: {recipe}")
    found = pd.read_csv(path)
    if absent := set(layers) - set(found.layer):
        raise ValueError(f"{path}: expected scores of layers {list(layers)}, got none of {sorted(absent)}. Make them: {recipe}")
    return found[found.layer.isin(layers)]


def main(argv: list[str] | None = None) -> None:
    """Write scores.csv.gz (a row a feature) and pairs.csv.gz (lens-token pairs of a sample) to the folder `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--saes", type=Path, help="folder of SAEs (layer_N) in place of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, nargs="*", help="default: all layers of the preset's SAEs")
    parser.add_argument("--text", required=True, help="hub id or path of plain text, for input scores and co-occurrence")
    parser.add_argument("--rows", type=int, default=4000, help="rows of 128 tokens for input scores")
    parser.add_argument("--pair-rows", type=int, default=40000, help="rows of 128 tokens for co-occurrence")
    parser.add_argument("--sample", type=int, default=100, help="features of each layer whose token pairs are counted")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    spec, out = preset(args.preset), resolve(args.out)
    model, tokenizer = load_model(spec, device=args.device)
    chosen = spec.sae_set()
    layers = args.layers or (sorted(int(p.name[6:]) for p in args.saes.glob("layer_*")) if args.saes else chosen.layers)
    own = lambda layer: JumpReLU(args.saes / f"layer_{layer}", model.device)  # noqa: E731
    saes = {layer: own(layer) if args.saes else load_sae(spec, chosen, layer, hf=model) for layer in layers}
    lens = {layer: lens_tokens(model, sae.W_dec) for layer, sae in saes.items()}
    text = lambda n: islice(token_rows(args.text, tokenizer), n)  # noqa: E731
    tables, paper = [], {"prompt": "In my experience,", "subtract": True, "keep_error": False}
    for layer, sae in saes.items():
        ours, theirs = (output_scores(model, tokenizer, sae, layer=layer, lens=lens[layer], **how) for how in ({}, paper))
        tables.append(
            {"layer": layer, "feature": ours.features, "s_out": ours.score, "rank": ours.rank, "unsteered": ours.unsteered,
             "confidence": ours.confidence, "s_out_paper": theirs.score}
        )  # fmt: skip
    records = collect(model, tokenizer, saes, text(args.rows), outlier=spec.outlier)
    for table in tables:
        table["s_in"], table["records"] = input_scores(lens[table["layer"]], records[table["layer"]].tokens)
    scores = pd.concat([pd.DataFrame(table) for table in tables])
    write_table(out / "scores.csv.gz", scores)
    pairs = [
        (layer, f, int(lens[layer][f, 0]), int(t)) for layer, sae in saes.items()
        for f in sample_features(sae.W_dec.shape[0], args.sample) for t in lens[layer][f, 1:]
    ]  # fmt: skip
    n, counts = cooccurrence((row.tolist() for row in text(args.pair_rows)), [pair[2:] for pair in pairs], len(tokenizer))
    found = pd.DataFrame(pairs, columns=["layer", "feature", "top", "other"]).assign(rows=n)
    found[["n_top", "n_other", "n_both"]] = counts
    write_table(out / "pairs.csv.gz", found)


if __name__ == "__main__":
    main()

"""Score all features of a preset's SAEs and count which lens tokens meet in text: `python -m recipes.scores`."""

import argparse
from itertools import islice
from pathlib import Path

import pandas as pd

from steerkit.files import resolve, write_table
from steerkit.methods.output_scores.inputs import collect, input_scores
from steerkit.methods.output_scores.score import lens_tokens, output_scores
from steerkit.methods.output_scores.success import cooccurrence, sample_features
from steerkit.models import load
from steerkit.training.harvest import token_rows


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
    spec, out = load.preset(args.preset), resolve(args.out)
    layers = args.layers or spec.sae_set(args.saes).layers
    lab = load.open(spec, layers=layers, saes=args.saes, device=args.device, check=not args.saes)
    lens = {layer: lens_tokens(lab.hf, sae.W_dec) for layer, sae in lab.saes.items()}
    text = lambda n: islice(token_rows(args.text, lab.tokenizer), n)  # noqa: E731
    tables, paper = [], {"prompt": "In my experience,", "subtract": True, "keep_error": False}
    for layer in lab.saes:
        ours, theirs = (output_scores(lab.at(layer), lens=lens[layer], **how) for how in ({}, paper))
        tables.append(
            {"layer": layer, "feature": ours.features, "s_out": ours.score, "rank": ours.rank, "unsteered": ours.unsteered,
             "confidence": ours.confidence, "s_out_paper": theirs.score}
        )  # fmt: skip
    records = collect(lab, text(args.rows))
    for table in tables:
        table["s_in"], table["records"] = input_scores(lens[table["layer"]], records[table["layer"]].tokens)
    scores = pd.concat([pd.DataFrame(table) for table in tables])
    write_table(out / "scores.csv.gz", scores)
    pairs = [
        (layer, f, int(lens[layer][f, 0]), int(t)) for layer, sae in lab.saes.items()
        for f in sample_features(sae.W_dec.shape[0], args.sample) for t in lens[layer][f, 1:]
    ]  # fmt: skip
    n, counts = cooccurrence((row.tolist() for row in text(args.pair_rows)), [pair[2:] for pair in pairs], len(lab.tokenizer))
    found = pd.DataFrame(pairs, columns=["layer", "feature", "top", "other"]).assign(rows=n)
    found[["n_top", "n_other", "n_both"]] = counts
    write_table(out / "pairs.csv.gz", found)


if __name__ == "__main__":
    main()

"""Train a preset's SAEs and measure them: `python -m recipes.saes train`, then `quality` and `features`; `--help` behind each."""

import argparse
import logging
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from steerkit.concept import concepts
from steerkit.engine.lab import Lab
from steerkit.engine.packed import packed_linears
from steerkit.files import DATA, cache_dir, resolve, write_atomic
from steerkit.models import load
from steerkit.models.jumprelu import JumpReLU
from steerkit.training import quality, train
from steerkit.training.harvest import Recipe, Sae, Stream, token_rows

SETTINGS = ("tokens", "epochs", "k", "batch", "warm_up", "doc_tokens", "block_rows", "seed")  # of a `Recipe`
HEAD = "| layer | FVU | L0 | dead | loss recovered (zero) | loss recovered (mean) | tokens; rows for the loss |"


def train_all(args: argparse.Namespace) -> None:
    """Train SAEs, all layers in one pass over the text; the same command goes on where it was cut off."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    spec = load.preset(args.preset)
    recipe = Recipe(tuple(args.saes), outlier=float(spec.outlier), **{name: getattr(args, name) for name in SETTINGS})
    stream = Stream(*load.load_model(spec, device=args.device), args.dataset, recipe, args.llm_batch)
    train.make(stream, args.work / "checkpoint.safetensors", args.out, fast=args.compile)


def measure_saes(args: argparse.Namespace) -> None:
    """Measure a preset's SAEs on text that they did not see: quality.csv beside them, and the table of data/README.md."""
    spec = load.preset(args.preset)
    lab = load.open(spec, layers=spec.layers, device=args.device, check=False)
    rows = torch.stack(list(islice(token_rows(args.dataset, lab.tokenizer), args.rows)))
    with packed_linears(lab.hf):
        table, losses = quality.fit(lab, rows)[0], quality.loss_recovered(lab, rows[: args.loss_rows])
    table = table.merge(losses.rename(columns={"rows": "loss_rows"}), on="layer")
    folder = resolve(spec.sae_set().folder or DATA / "saes" / spec.name)
    write_atomic(folder / "quality.csv", table.to_csv(index=False, float_format="%.5g"))
    lines = [HEAD, "|---" * 7 + "|"]
    for r in table.to_dict("records"):
        fvu, zero, mean = (f"{r[k]:.3f} [{r[k + '_low']:.3f}, {r[k + '_high']:.3f}]" for k in ("fvu", "recovered_zero", "recovered_mean"))
        lines.append(f"| {r['layer']} | {fvu} | {r['l0']:.1f} | {r['dead']:.2%} | {zero} | {mean} | {r['tokens']:,}; {r['loss_rows']} |")
    card, block = DATA / "README.md", "\n".join(["<!-- quality -->", "", *lines, "", "<!-- end of quality -->"])
    marked = re.compile("<!-- quality -->(.*?<!-- end of quality -->)?", re.DOTALL)
    write_atomic(card, marked.sub(lambda _: block, card.read_text(), count=1))


def measure_features(args: argparse.Namespace) -> None:
    """Measure the features of every SAE below some folders on text that no SAE saw: a table, feature cards beside it."""
    spec = load.preset(args.preset)
    model, tokenizer = load.load_model(spec, device=args.device)
    paths = sorted(p.parent for folder in args.folders for p in folder.glob("**/sae_weights.safetensors"))
    saes = {path: JumpReLU(path, model.device) for path in paths}
    layers = tuple(sorted({sae.layer for sae in saes.values()}))
    recipe = Recipe(tuple(map(Sae, layers)), tokens=args.tokens, block_rows=10**9, outlier=float(spec.outlier))
    stream = Stream(model, tokenizer, args.dataset, recipe, exact=True)
    block, rows = stream.block(0), []
    texts = quality.topic_texts(Lab(spec, model, tokenizer), layers, concepts())
    for path, sae in saes.items():
        at = Lab(spec, model, tokenizer, {sae.layer: sae}).at(sae.layer)
        card = args.out.parent / "cards" / f"{path.parent.name}-{path.name}.safetensors"
        found = quality.survey(at, block, stream.source_of, texts[sae.layer], card)
        twin = saes.get(path.with_name(path.name.replace("-seed1", "")), sae)
        found["stability"] = quality.stability(sae.W_dec, twin.W_dec) if twin is not sae else np.nan
        rows.append({"sae": f"{path.parent.name}/{path.name}", "layer": sae.layer, "d_sae": len(sae.W_dec), "tokens": len(block), **found})
        print(rows[-1], flush=True)
    write_atomic(args.out, pd.DataFrame(rows).to_csv(index=False, float_format="%.4f"))
    print(pd.DataFrame(rows).round(4).to_string())


def main(argv: list[str] | None = None) -> None:
    """Read the command line and do what its first word says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts, command = parser.add_subparsers(required=True, dest="what"), {}
    for name, call in {"train": train_all, "quality": measure_saes, "features": measure_features}.items():
        command[name] = one = parts.add_parser(name, description=call.__doc__, help=call.__doc__)
        one.set_defaults(call=call)
        one.add_argument("--preset", default="smollm2-135m")
        one.add_argument("--dataset", required=True, help="hub data set id, folder, or .jsonl(.gz)/.parquet file with text or messages")
        one.add_argument("--device", default="auto")
    add = command["train"].add_argument
    add("--out", type=Path, required=True)
    add("--work", type=Path, default=cache_dir() / "train", help="folder of the checkpoint; a second call goes on from it")
    add("--saes", type=Sae.parse, nargs="+", default=[Sae(n) for n in (3, 8, 13, 18, 23, 28)], help="LAYER[:FEATURES][:lr=...] ...")
    add("--compile", action="store_true", help="twice the speed after a minute; needs a C++ compiler on a CPU")
    add("--llm-batch", type=int, default=16, help="rows in a forward pass")
    for name in SETTINGS:
        default = getattr(Recipe, name)
        add(f"--{name.replace('_', '-')}", type=type(default), default=default)
    command["quality"].add_argument("--rows", type=int, default=500, help="rows of 128 tokens for FVU, L0, dead")
    command["quality"].add_argument("--loss-rows", type=int, default=32, help="rows for the loss recovered")
    command["features"].add_argument("folders", nargs="+", type=Path)
    command["features"].add_argument("--tokens", type=int, default=100_000)
    command["features"].add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.call(args)


if __name__ == "__main__":
    main()

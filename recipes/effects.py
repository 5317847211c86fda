"""Measure the effects of a preset's training vectors, in blocks that resume and can be shared out: `python -m recipes.effects`."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerkit.concept import concepts
from steerkit.engine.lab import Place
from steerkit.features import topic_features
from steerkit.files import resolve, write_atomic
from steerkit.methods.sae_ts.approximator import budget
from steerkit.methods.sae_ts.calibration import calibrate, calibration_rows
from steerkit.methods.sae_ts.effects import Effects, Scheme, measure, save, training_vectors, unsteered
from steerkit.models import load
from steerkit.store import Parts, Work, fingerprint
from steerkit.training.quality import density


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, and ship."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--layer", type=int, help="default: the preset's primary layer")
    parser.add_argument("--saes", type=Path, help="folder of SAEs (layer_N) in place of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=1, help="rollouts of each prompt")
    parser.add_argument("--out", required=True, help="folder of the finished parts")
    parser.add_argument("--text", default="data/check_texts.txt", help="calibration text, plain")
    parser.add_argument("--text-rows", type=int, default=4, help="rows of 32 tokens to calibrate on")
    parser.add_argument("--rise", type=float, default=0.5, help="calibrate to the unsteered loss plus this many nats")
    parser.add_argument("--dtype", default="auto", help="of the model: auto is bfloat16 where that is native; the SAE runs in float32")
    parser.add_argument("--block", type=int, default=512, help="vectors calibrated and measured together")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="independent measurements of the held-out vectors")
    parser.add_argument("--first", type=int, help="measure this many vectors only, the held-out ones first")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--n-shards", type=int, default=1)
    parser.add_argument("--ship", help="once all blocks are there, write them to this file")
    args = parser.parse_args(argv)
    spec = load.preset(args.preset)
    layer = spec.primary_layer if args.layer is None else args.layer
    at = load.open(spec, layers=[layer], saes=args.saes, device=args.device, dtype=args.dtype, check=not args.saes).at(layer)
    vectors, held = (t[: args.first] for t in training_vectors(at.sae.W_dec))
    ids = calibration_rows(at.tokenizer, resolve(args.text).read_text(encoding="utf-8"), rows=args.text_rows)
    folder, scheme = Path(args.out), Scheme(samples=args.samples)
    blocks = range(0, len(vectors), args.block)
    jobs = [(start, repeat) for start in blocks for repeat in range(args.repeats if start < held.sum() else 1)]
    base = unsteered(at, scheme, Work(args.batch_size, folder / "baseline"))
    found: dict[int, list[Effects]] = {}
    for start, repeat in jobs[args.shard :: args.n_shards]:
        block = vectors[start : start + args.block]
        scales = _scales(folder, f"scales-{start:06d}", at, ids, block, args)
        noise = replace(scheme, sampling=replace(scheme.sampling, seed=1000 * repeat + start))
        work = Work(args.batch_size, folder / f"block-{start:06d}-{repeat}")
        found.setdefault(repeat, []).append(measure(at, block, scales, scheme=noise, baseline=base, work=work))
    if args.ship and args.n_shards == 1:
        about = {"preset": at.preset, "layer": at.layer, "vectors": "training_vectors", "rise": args.rise, "text": args.text}
        about |= {"text_rows": args.text_rows, "dtype": str(at.model.dtype).removeprefix("torch.")}
        about |= {"prompts": len(scheme.prompts), "samples": scheme.samples}
        targets = topic_features(at, concepts(), density(at, "data/own_text.jsonl.gz")).feature.tolist()
        _ship(resolve(args.ship), {repeat: _join(blocks, base) for repeat, blocks in found.items()}, held, about, targets)


def _join(blocks: list[Effects], baseline: Tensor) -> Effects:
    return Effects(*(torch.cat([getattr(e, name) for e in blocks]) for name in ("vectors", "scales", "parts")), baseline)


def _ship(path: Path, found: dict[int, Effects], held: Bool[Tensor, " n"], about: dict, targets: list[int]) -> None:
    """Write the effects, each repeat beside them, and what a budget of rollouts buys, in all and for the topics' features."""
    for repeat, effects in found.items():
        save(effects, path if not repeat else path.with_suffix(f".repeat{repeat}.safetensors"), about | {"repeat": repeat})
    first = found[0]
    held = held[: len(first.scales)]
    target = torch.stack([e.effects[held[: len(e.scales)]] for e in found.values()]).mean(0)
    each = about["prompts"] * about["samples"]
    table = budget(first.vectors[~held], first.effects[~held], first.vectors[held], target, targets=targets, rollouts=each)
    write_atomic(path.parent / "budget.csv", table.to_csv(index=False, float_format="%.4f"))


def _scales(
    folder: Path, name: str, at: Place, ids: Int[Tensor, "rows pos"], vectors: Float[Tensor, "n d_model"], args
) -> Float[Tensor, " n"]:
    """Return calibrated scales, extrapolated ones cut at twice the grid's end; kept in a file named by what determines them."""
    grid = tuple(range(0, 201, 40))
    key = fingerprint(at.model, ids, vectors, at.layer, args.rise, grid, args.batch_size)
    store, name = Parts(folder, key), f"{name}-{key}"
    if (kept := store.get(name)) is None:
        scales, beyond, _ = calibrate(at, ids, vectors, rise=args.rise, grid=grid, batch_size=args.batch_size)
        kept = {"scales": torch.where(scales > 0, scales, float("inf")).clamp(1.0, 2.0 * grid[-1]), "beyond": beyond}
        store.put(name, kept)
    return kept["scales"]


if __name__ == "__main__":
    main()

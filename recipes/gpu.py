"""The whole queue on one big GPU: SAEs, effects, scores, in this order, each resumable: `python -m recipes.gpu`.

Needs torch, transformers, numpy, pandas, safetensors, jaxtyping, PyYAML, pydantic, scikit-learn, scipy, gguf; no sae_lens, no
network once the model is in $STEERKIT_CACHE. A step that was cut off goes on, one that is done is passed over. `--pack FOLDER
--part N` then writes a part of the results as numbered files of at most 15 MiB, four a call; `cat results-* | tar x` puts
them together again.
"""

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from recipes import effects as measure_effects
from recipes import saes
from recipes import scores as score_features
from steerkit.files import write_atomic

PIECE, AT_ONCE = 15 << 20, 4
SAES = ("3", "8", "13:8192", "18", "23", "28")


def steps(args: argparse.Namespace) -> dict[str, tuple[float, Callable[[], None]]]:
    """Return the steps by name: minutes that it should take on an H100, and what to call."""
    preset, device, out, work = ("--preset", args.preset), ("--device", args.device), args.work / "results", args.work
    text = ("--dataset", args.dataset, "--tokens", str(args.tokens), "--doc-tokens", "100000")
    size = ("--batch", str(args.batch), "--block-rows", str(args.block_rows), "--llm-batch", str(args.llm_batch))
    fast = ("--compile",) if args.compile else ()
    effects = ("--saes", str(out / "saes"), "--out", str(work / "effects"), "--ship", str(out / "effects" / "layer_13.safetensors"))
    amount = ("--samples", str(args.samples), "--first", str(args.first), "--block", str(args.vectors), "--batch-size", str(args.rollouts))
    scores = ("--saes", str(out / "saes"), "--out", str(out / "scores"), "--text", args.text)
    rows = ("--rows", str(args.rows), "--pair-rows", str(10 * args.rows))
    return {
        "saes": (
            5.0,
            lambda: saes.main(
                ["train", *preset, *text, *size, *fast, *device, "--work", str(work), "--out", str(out / "saes"), "--saes", *args.saes]
            ),
        ),
        "effects": (4.0, lambda: measure_effects.main([*preset, *effects, *amount, *device])),
        "scores": (2.0, lambda: score_features.main([*preset, *scores, *rows, *device])),
    }


def pack(results: Path, folder: Path, part: int) -> list[Path]:
    """Write the pieces of one part of the results: a tar cut into files of at most PIECE bytes, AT_ONCE files a part."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        archive.add(results, arcname=results.name)
    data, start = whole.getbuffer(), part * AT_ONCE
    pieces = range(start, min(start + AT_ONCE, -(-len(data) // PIECE)))
    print(f"part {part}: pieces {list(pieces)} of {-(-len(data) // PIECE)}")
    return [write_atomic(folder / f"results-{n:03d}", bytes(data[n * PIECE : (n + 1) * PIECE])) for n in pieces]


def main(argv: list[str] | None = None) -> None:
    """Run what is not done yet and fits into the time, or pack a part of the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, marks of finished steps, results")
    parser.add_argument("--dataset", help="text to train on")
    parser.add_argument("--text", help="held-out text, for the scores")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=12.0, help="start no step that should take longer than what is left")
    parser.add_argument("--only", nargs="+", help="steps to run")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--saes", nargs="+", default=SAES, help="LAYER[:FEATURES] ...")
    sizes = {"tokens": 37_000_000, "batch": 4096, "block-rows": 8192, "llm-batch": 256, "samples": 2, "first": 16384}
    sizes |= {"vectors": 2048, "rollouts": 4096, "rows": 4000}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pack", type=Path, help="write a part of the results here, and do nothing else")
    parser.add_argument("--part", type=int, default=0)
    args = parser.parse_args(argv)
    if args.pack:
        pack(args.work / "results", args.pack, args.part)
        return
    began = time.monotonic()
    for name, (minutes, call) in steps(args).items():
        done, left = args.work / f"{name}.done", args.minutes - (time.monotonic() - began) / 60
        if done.exists() or (args.only and name not in args.only):
            continue
        if left < minutes:
            print(f"{name}: expected {minutes} minutes, {left:.1f} are left; call again to go on")
            return
        start = time.monotonic()
        call()
        write_atomic(done, f"{time.monotonic() - start:.0f} s\n")
        print(f"{name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

"""Count which tokens follow which in a corpus, for the second judge of fluency: `python -m recipes.bigrams --dataset FILE`."""

import argparse

import numpy as np
import torch
from safetensors.torch import save as to_bytes

from steerkit.files import DATA, write_atomic
from steerkit.models.load import preset
from steerkit.training.harvest import documents


def count(docs, vocab: int, *, least: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs (first * vocab + second) seen at least `least` times, their log p(second | first), and log p of each token.

    p(second | first) is a share of all pairs that begin with `first`; tokens are counted from one half, so that none is impossible.
    """
    parts, one = [], np.zeros(vocab)
    for ids in docs:
        ids = np.asarray(ids, dtype=np.int64)
        parts.append(ids[:-1] * vocab + ids[1:])
        one += np.bincount(ids, minlength=vocab)
    pairs, times = np.unique(np.concatenate(parts), return_counts=True)
    firsts = np.bincount(pairs // vocab, weights=times, minlength=vocab)
    often = times >= least
    pairs, times = pairs[often], times[often]
    return pairs, np.log(times / firsts[pairs // vocab]), np.log((one + 0.5) / (one + 0.5).sum())


def main(argv: list[str] | None = None) -> None:
    """Write data/judges/bigrams.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="hub data set id, folder, or .jsonl(.gz)/.parquet file with text or messages")
    parser.add_argument("--least", type=int, default=5, help="keep pairs seen this often")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    from steerkit.models.fetch import embedded

    tokenizer = AutoTokenizer.from_pretrained(embedded(preset("smollm2-135m").package))
    docs = (ids for _, _, ids in documents(args.dataset, tokenizer) if len(ids) > 1)
    pairs, log_p, log_one = count(docs, len(tokenizer), least=args.least)
    kept = {"pairs": pairs.astype(np.uint32), "log_p": log_p.astype(np.float16), "log_one": log_one.astype(np.float16)}
    write_atomic(DATA / "judges" / "bigrams.safetensors", to_bytes({name: torch.from_numpy(values) for name, values in kept.items()}))
    print(f"{len(pairs):,} pairs")


if __name__ == "__main__":
    main()

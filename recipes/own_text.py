"""Text that the embedded model itself writes, free to ship: `python -m recipes.own_text`."""

import gzip
import json
from pathlib import Path

from steerkit.engine.generate import generate
from steerkit.files import DATA, write_atomic
from steerkit.models.lab import load_model, preset


def write_own_text(model, tokenizer, path: Path, *, documents: int = 320, max_tokens: int = 127, seed: int = 0) -> Path:
    """Write documents sampled from the beginning-of-text token alone, unsteered, as .jsonl.gz."""
    frame = generate(
        model,
        tokenizer,
        [""],
        samples=documents,
        max_new_tokens=max_tokens,
        temperature=1.0,
        top_k=200,
        stop=tokenizer.all_special_ids,
        seed=seed,
        batch_size=128,
    )
    lines = "".join(json.dumps({"text": text}) + "\n" for text in frame.text if text.strip())
    return write_atomic(path, gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    write_own_text(*load_model(preset("smollm2-135m")), DATA / "own_text.jsonl.gz")

"""Text that the embedded model itself writes, free to ship: `python -m recipes.own_text`."""

import gzip
import json
from pathlib import Path

from steerkit.engine.generate import Sampling, Work, generate
from steerkit.engine.lab import Lab
from steerkit.files import DATA, write_atomic
from steerkit.models.load import load_model, preset


def write_own_text(lab: Lab, path: Path, *, documents: int = 320) -> Path:
    """Write documents sampled from the beginning-of-text token alone, unsteered, as .jsonl.gz."""
    sampling = Sampling(temperature=1.0, top_k=200, max_new_tokens=127, stop=tuple(lab.tokenizer.all_special_ids))
    frame = generate(lab, [""], samples=documents, sampling=sampling, work=Work(batch_size=128))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in frame.text if text.strip())
    return write_atomic(path, gzip.compress(lines.encode(), mtime=0))


if __name__ == "__main__":
    spec = preset("smollm2-135m")
    write_own_text(Lab(spec, *load_model(spec)), DATA / "own_text.jsonl.gz")

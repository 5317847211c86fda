"""Text to activations on disk: harvest the residual streams of many layers once, then read them shuffled."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerkit.cpu import native_bfloat16
from steerkit.features import ordinary_positions, residuals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What determines an SAE, apart from the model and the text.

    `tokens` distinct tokens are harvested and seen `epochs` times in batches of `batch` tokens. `k` is the mean
    number of active features per token (batch-top-k). `outlier` drops positions whose norm exceeds that many medians.
    """

    layers: tuple[int, ...]
    d_sae: int = 4096
    k: int = 32
    tokens: int = 1_000_000
    epochs: float = 4.0
    batch: int = 1024
    lr: float = 8e-4
    context: int = 128
    doc_tokens: int = 512
    outlier: float = 10.0
    shard_rows: int = 512
    seed: int = 0

    @property
    def train_tokens(self) -> int:
        """Training tokens, repeats counted, rounded down to whole batches."""
        return int(self.tokens * self.epochs) // self.batch * self.batch


def token_rows(dataset: str, tokenizer, recipe: Recipe, *, split: str = "train") -> Iterator[Int[Tensor, " context"]]:
    """Yield packed rows of `recipe.context` tokens from a hub data set id, a folder, or a .jsonl(.gz)/.parquet file.

    Records hold `text` or `messages` (role, content); each row starts with the beginning-of-text token.
    """
    from datasets import load_dataset
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    kind = {".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet"}.get(Path(dataset).suffix)
    if kind and Path(dataset).is_file():
        records = load_dataset(kind, data_files=dataset, split="train", streaming=True)
    else:
        records = load_dataset(dataset, split=split, streaming=True)

    def documents():
        for record in records:
            if record.get("messages"):
                ids = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
            elif record.get("text"):
                ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
            else:
                continue
            yield torch.tensor(ids[: recipe.doc_tokens])

    bos = tokenizer.bos_token_id
    yield from concat_and_batch_sequences(
        tokens_iterator=documents(),
        context_size=recipe.context,
        begin_batch_token_id=bos,
        begin_sequence_token_id=None,
        sequence_separator_token_id=bos,
    )


@torch.no_grad()
def harvest(model, tokenizer, dataset: str, folder: Path, recipe: Recipe, *, split: str = "train", llm_batch: int = 32) -> Path:
    """Write the residual streams of `recipe.tokens` tokens to float16 safetensors shards; resumes at the first missing shard.

    Rows go through the model once for all layers, in bfloat16 autocast where that is native. Each shard holds `tokens` and one
    `layer_<L>` tensor [n, d_model] of the kept positions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, done, shard = token_rows(dataset, tokenizer, recipe, split=split), 0, 0
    while done < recipe.tokens:
        path = folder / f"shard_{shard:05d}.safetensors"
        chunk = [row for _, row in zip(range(recipe.shard_rows), rows)]
        if not chunk:
            raise ValueError(f"{dataset} ended after {done} tokens; {recipe.tokens} were asked for: lower `tokens`")
        if path.exists():
            with safe_open(path, "pt") as f:
                done += f.get_slice("tokens").get_shape()[0]
            shard += 1
            continue
        parts = []
        for batch in torch.stack(chunk).split(llm_batch):
            batch = batch.to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=native_bfloat16(model.device)):
                resid = residuals(model, batch, layers=recipe.layers)
            keep = ordinary_positions(batch, None, resid, special=tokenizer.all_special_ids, outlier=recipe.outlier)
            parts.append({f"layer_{n}": acts[keep].half().cpu() for n, acts in resid.items()} | {"tokens": batch[keep].int().cpu()})
        temporary = path.with_suffix(".tmp")
        save_file({name: torch.cat([p[name] for p in parts]).contiguous() for name in parts[0]}, temporary)
        os.replace(temporary, path)
        done += sum(len(p["tokens"]) for p in parts)
        shard += 1
        log.info("harvested %d of %d tokens", done, recipe.tokens)
    return folder


class Shards:
    """Endless shuffled batches of harvested activations, one dict {layer name: [batch, d_model]} a step.

    Groups of `group` shards are mixed together; `skip` batches are passed over, so a resumed run sees the same order.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, group: int = 4, skip: int = 0, dtype=torch.float32):
        self.paths = sorted(folder.glob("shard_*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(f"no shards in {folder}: run `harvest` first")
        self.recipe, self.group, self.dtype = recipe, group, dtype
        self._batches = self._run(skip)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch d_model"]]:
        return next(self._batches)

    def _run(self, skip: int):
        rng = torch.Generator().manual_seed(self.recipe.seed)
        names = [f"layer_{layer}" for layer in self.recipe.layers]
        while True:
            order = torch.randperm(len(self.paths), generator=rng).tolist()
            for start in range(0, len(order), self.group):
                files = [safe_open(self.paths[i], "pt") for i in order[start : start + self.group]]
                n = sum(f.get_slice("tokens").get_shape()[0] for f in files)
                steps = list(torch.randperm(n, generator=rng).split(self.recipe.batch))
                steps = [s for s in steps if len(s) == self.recipe.batch]
                if skip >= len(steps):
                    skip -= len(steps)
                    continue
                data = {name: torch.cat([f.get_tensor(name) for f in files]) for name in names}
                for rows in steps[skip:]:
                    yield {name: data[name][rows].to(self.dtype) for name in names}
                skip = 0


def read_shards(folder: Path, layer: int, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return (activations, token ids) of the first `tokens` harvested tokens of a layer, a piece a shard, in reading order."""
    acts, ids = [], []
    for path in sorted(folder.glob("shard_*.safetensors")):
        with safe_open(path, "pt") as f:
            acts.append(f.get_tensor(f"layer_{layer}").float())
            ids.append(f.get_tensor("tokens"))
        if sum(map(len, ids)) >= tokens:
            break
    return acts, ids


def write_own_text(model, tokenizer, path: Path, *, documents: int = 320, max_tokens: int = 127, seed: int = 0) -> Path:
    """Write text that the model itself writes, from the beginning-of-text token alone, as .jsonl.gz: text free to ship."""
    import gzip
    import json

    from steerkit.generate import generate
    from steerkit.paths import write_atomic

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
    from steerkit.models import load_model, preset
    from steerkit.paths import DATA

    write_own_text(*load_model(preset("smollm2-135m")), DATA / "own_text.jsonl.gz")

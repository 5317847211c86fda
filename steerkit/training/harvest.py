"""Text to activations, as a stream: documents -> packed rows -> residual streams of many layers -> shuffled batches.

Nothing is kept on disk. The text is cut into blocks of rows; a block goes through the model once for all layers, is held in
memory and shuffled. Which tokens a batch holds follows from (block, step) alone, so a run resumes by harvesting its block again.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerkit import data
from steerkit.engine.cpu import native_bfloat16
from steerkit.engine.steer import residual_blocks
from steerkit.features import ordinary_positions, residuals


@dataclass(frozen=True)
class Sae:
    """One SAE of a recipe: which layer's output it reads, and how it is trained. `share`: of the text that it sees.

    >>> Sae.parse("13:8192:lr=0.001")
    Sae(layer=13, d_sae=8192, lr=0.001, seed=0, share=1.0)
    """

    layer: int
    d_sae: int = 4096
    lr: float = 8e-4
    seed: int = 0
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Sae":
        """Read LAYER[:FEATURES][:NAME=VALUE ...]."""
        layer, *rest = text.split(":")
        named = [part if "=" in part else f"d_sae={part}" for part in rest]
        types = {"d_sae": int, "lr": float, "seed": int, "share": float}
        return cls(int(layer), **{n: types[n](v) for n, v in (part.split("=") for part in named)})


@dataclass(frozen=True)
class Recipe:
    """What determines SAEs, apart from the model and the text.

    `tokens` distinct tokens are read, in rows of `context`, and seen `epochs` times in batches of `batch`. `k` is the mean
    number of active features a token (batch-top-k). The learning rate rises over `warm_up` steps and falls to a tenth in the
    last third of the text. `outlier` drops positions whose norm exceeds that many medians. At most `block_rows` rows are
    shuffled together.
    """

    saes: tuple[Sae, ...]
    k: int = 32
    tokens: int = 1_000_000
    epochs: float = 1.0
    batch: int = 2048
    warm_up: int = 100
    context: int = 128
    doc_tokens: int = 512
    outlier: float = 10.0
    block_rows: int = 1024
    seed: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read."""
        return tuple(sorted({sae.layer for sae in self.saes}))

    @property
    def named(self) -> dict[str, Sae]:
        """The SAEs by name: `layer_13`, or with whatever is not the default where a layer has several."""
        alone = {layer for layer in self.layers if sum(one.layer == layer for one in self.saes) == 1}
        changed = lambda one: [f for f in fields(one)[1:] if one.layer not in alone and getattr(one, f.name) != f.default]  # noqa: E731
        return {"-".join([f"layer_{one.layer}", *(f"{f.name}{getattr(one, f.name):g}" for f in changed(one))]): one for one in self.saes}

    @property
    def rows(self) -> int:
        """Rows of distinct tokens; each starts with the beginning-of-text token."""
        return -(-self.tokens // (self.context - 1))

    @property
    def blocks(self) -> int:
        """Blocks of rows in one epoch."""
        return -(-self.rows // self.block_rows)


def records(dataset: str, *, split: str = "train") -> Iterator[dict]:
    """Yield the records of a data set (`data.rows`) in order; of .jsonl(.gz) files as they stand, where some hold text, some messages."""
    path = Path(dataset)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)
    else:
        yield from data.rows(dataset, split=split)


def documents(dataset: str, tokenizer, *, doc_tokens: int = 512, split: str = "train") -> Iterator[tuple[int, str, list[int]]]:
    """Yield (number of the record, its source, its first `doc_tokens` token ids) of every record that holds text.

    Records hold `text` or `messages` (role, content) and may name a `source`.
    """

    def ids(part: list[dict]) -> Iterator[list[int]]:
        texts = iter(tokenizer([r["text"] for r in part if not r.get("messages")] or [""], add_special_tokens=False)["input_ids"])
        for r in part:
            yield tokenizer.apply_chat_template(r["messages"], tokenize=True, return_dict=False) if r.get("messages") else next(texts)

    numbered = ((n, r) for n, r in enumerate(records(dataset, split=split)) if r.get("messages") or r.get("text"))
    while part := list(islice(numbered, 256)):
        for (n, r), found in zip(part, ids([r for _, r in part])):
            yield n, r.get("source", ""), found[:doc_tokens]


def packed(docs: Iterable[tuple[int, str, list[int]]], bos: int, context: int = 128) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pack documents into rows of `context` tokens: yield (token ids, record number of each token, -1 at the row's first).

    Each row starts with `bos`, and so does each document within a row.
    """
    ids, owner = [], []
    for number, _, tokens in docs:
        if ids and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        elif not ids and tokens[:1] == [bos]:  # the row's own
            tokens = tokens[1:]
        ids, owner = ids + tokens, owner + [number] * len(tokens)
        while len(ids) >= context - 1:
            yield np.array([bos, *ids[: context - 1]]), np.array([-1, *owner[: context - 1]])
            ids, owner = ids[context - 1 :], owner[context - 1 :]


def token_rows(
    dataset: str, tokenizer, *, context: int = 128, doc_tokens: int = 512, split: str = "train"
) -> Iterator[Int[Tensor, " context"]]:
    """Yield packed rows of `context` tokens of a data set (`records`), each with the beginning-of-text token in front."""
    docs = documents(dataset, tokenizer, doc_tokens=doc_tokens, split=split)
    for ids, _ in packed(docs, tokenizer.bos_token_id, context):
        yield torch.from_numpy(ids)


@contextmanager
def compiled(model) -> Iterator[None]:
    """Run the model's blocks through torch.compile while the context is open: twice the speed in autocast, after a minute.

    Hooks on the blocks stay in force, as only what is inside a block is compiled. Needs a C++ compiler on a CPU.
    """
    with ExitStack() as stack:
        for block in residual_blocks(model):
            block.forward = torch.compile(block.forward, dynamic=False)
            stack.callback(block.__dict__.pop, "forward")
        yield


@dataclass
class Block:
    """Some rows' ordinary positions in reading order: activations by layer (float16), token ids and record numbers."""

    acts: dict[int, Float[Tensor, "n d_model"]]
    ids: Int[Tensor, " n"]
    owner: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.ids)


@torch.no_grad()
def harvest(
    model,
    rows: Int[Tensor, "rows context"],
    owner: Int[Tensor, "rows context"],
    *,
    layers: Sequence[int],
    special: Sequence[int],
    outlier: float,
    batch_size: int = 16,
    exact: bool = False,
) -> Block:
    """Run rows through the model once and return the residual streams of all layers at ordinary positions.

    In bfloat16 autocast where that is native, unless exact: the residual stream itself stays float32. (A model in bfloat16
    would add noise of 1.6 % of the variance at layer 13 of the embedded model; autocast adds 0.2 %, and 0.04 % when compiled.)
    """
    device, parts = model.device, []
    with torch.autocast(
        device.type, torch.bfloat16, enabled=native_bfloat16(device) and not exact
    ):  # left open: it keeps the weights it casts
        for ids, number in zip(rows.to(device).split(batch_size), owner.to(device).split(batch_size)):
            resid = residuals(model, ids, layers=layers)
            keep = ordinary_positions(ids, None, resid, special=special, outlier=outlier)
            parts.append(({layer: x[keep].half() for layer, x in resid.items()}, ids[keep], number[keep]))
    acts = {layer: torch.cat([p[0][layer] for p in parts]) for layer in layers}
    return Block(acts, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]))


@dataclass
class Stream:
    """A data set's activations in blocks; the newest block is kept, so that small texts are harvested once.

    `sources` names the sources met so far and `source_of` gives each record's place in it.
    """

    model: torch.nn.Module
    tokenizer: object
    dataset: str
    recipe: Recipe
    batch_size: int = 16
    exact: bool = False
    sources: list[str] = field(default_factory=list)
    source_of: dict[int, int] = field(default_factory=dict)
    _rows: Iterator | None = None
    _next: int = 0  # the block that _rows gives next
    _kept: tuple[int, Block] | None = None

    def block(self, number: int) -> Block:
        """Return a block, harvested unless it is the newest; ValueError where the text ends before it."""
        r = self.recipe
        if self._kept and self._kept[0] == number:
            return self._kept[1]
        if self._rows is None or number < self._next:
            self._rows, self._next = packed(self._documents(), self.tokenizer.bos_token_id, r.context), 0
        even = -(-r.rows // r.blocks)
        size, skip = min(even, r.rows - number * even), (number - self._next) * even
        self._kept = None  # freed before the next one is filled
        part = list(islice(self._rows, skip, skip + size))
        if len(part) < size:
            found = (number * even + len(part)) * (r.context - 1)
            raise ValueError(f"{self.dataset}: expected {r.tokens} tokens, got at most {found}: lower `tokens` or raise `epochs`")
        rows, owner = (torch.from_numpy(np.stack(x)) for x in zip(*part))
        kept = {"special": self.tokenizer.all_special_ids, "outlier": r.outlier}
        block = harvest(self.model, rows, owner, layers=r.layers, **kept, batch_size=self.batch_size, exact=self.exact)
        self._next, self._kept = number + 1, (number, block)
        return block

    def _documents(self):
        for number, source, ids in documents(self.dataset, self.tokenizer, doc_tokens=self.recipe.doc_tokens):
            if source not in self.sources:
                self.sources.append(source)
            self.source_of[number] = self.sources.index(source)
            yield number, source, ids

    def batches(self, turn: int, step: int = 0) -> Iterator[tuple[float, dict[int, Float[Tensor, "batch d_model"]]]]:
        """Yield (share of the block seen after it, {layer: activations}) of the batches of block `turn` from `step` on.

        `turn` counts on over epochs; each turn is shuffled anew.
        """
        r = self.recipe
        block = self.block(turn % r.blocks)
        order = torch.randperm(len(block), generator=torch.Generator().manual_seed(r.seed * 1_000_003 + turn))
        steps = [rows for rows in order.to(block.ids.device).split(r.batch) if len(rows) == r.batch]
        if not steps:
            raise ValueError(f"expected a block of at least {r.batch} tokens, got {len(block)}: lower `batch` or raise `block_rows`")
        for n, rows in enumerate(steps[step:], step + 1):
            yield n / len(steps), {layer: acts[rows].float() for layer, acts in block.acts.items()}

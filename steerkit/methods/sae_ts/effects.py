"""The effect of a steering vector: what it does to the SAE features of the text that it causes (SAE-TS, section 3).

Generate with and without the vector, read both texts with steering off, and compare the mean activations of all features.
Many vectors are measured in one batch; finished parts stay on disk, and shards on several machines add up.
"""

import json
import lzma
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steerkit.engine.decode import NotFinite, Sampling, Watch, decode
from steerkit.engine.lab import Place
from steerkit.engine.memory import halving
from steerkit.engine.packed import packed_linears
from steerkit.engine.steer import Add
from steerkit.engine.tokens import prompt_ids
from steerkit.features import ordinary_positions, residuals
from steerkit.files import write_atomic
from steerkit.progress import bar
from steerkit.store import Parts, Work, fingerprint

PROMPTS = (
    *("", "", "", "I think", "Breaking news", "Last night", "For sale", "The weather", "Dear Sir/Madam"),
    *("Preheat the oven", "It's interesting that", "Assistant:", "I went up to", "New study suggests"),
)
# Until 20 November 2024 a comma was missing in the released list, and the published effects were measured so.
PROMPTS_13 = (*PROMPTS[:10], "It's interesting thatAssistant:", *PROMPTS[12:])
SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.3)  # as released; no stop token
LEVELS = 31  # of a shipped entry


@dataclass(frozen=True)
class Scheme:
    """How effects are measured: the paper's rollouts by default, with the number of samples a prompt as the budget.

    length: tokens of a rollout in all, beginning-of-text and prompt included. positions: "ordinary" leaves out the first
    token, special tokens and outliers; "all" is the released code. Where nothing else is left out the two differ by the
    factor 32 / 31 on the empty prompt, as both arms have the same first token. baseline_samples: those of the unsteered text.
    """

    prompts: tuple[str, ...] = PROMPTS
    samples: int = 1
    length: int = 32
    sampling: Sampling = SAMPLING
    positions: str = "ordinary"
    baseline_samples: int = 64

    def __post_init__(self) -> None:
        if self.positions not in ("ordinary", "all") or min(self.samples, self.baseline_samples) < 1 or not self.prompts:
            raise ValueError(
                f'expected positions "ordinary" or "all", at least one sample (steered and not) and one prompt, got {self.positions!r}, '
                f"{self.samples}, {self.baseline_samples} and {len(self.prompts)}"
            )


@dataclass(frozen=True)
class Effects:
    """Effects of n vectors of norm 1, each added with its scale. parts: by every other prompt (2), or their mean (1)."""

    vectors: Float[Tensor, "n d_model"]
    scales: Float[Tensor, " n"]
    parts: Float[Tensor, "n parts d_sae"]
    baseline: Float[Tensor, " d_sae"]

    @property
    def effects(self) -> Float[Tensor, "n d_sae"]:
        """The effect, mean over parts."""
        return self.parts.mean(1)


def training_vectors(W_dec: Float[Tensor, "d_sae d_model"], *, n_held: int = 256, seed: int = 0) -> tuple[Tensor, Bool[Tensor, " n"]]:
    """Return unit vectors to measure, [2 d_sae, d_model], and which of them are held out, never to be fitted on.

    Every decoder row once, and as many sums of two rows: steering directions that are not themselves rows. First come the
    held-out ones, n_held rows and n_held sums of such rows; then rows and sums by turns, none of which holds a held-out row.
    """
    rows = nn.functional.normalize(W_dec.detach().float().cpu(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    out = []
    for part in (order[:n_held], order[n_held:]):
        partner = part.roll(1)[torch.randperm(len(part), generator=generator)]
        partner = torch.where(partner == part, part.roll(1), partner)
        sums = nn.functional.normalize(rows[part] + rows[partner], dim=1)
        out.append(torch.stack([rows[part], sums], 1).flatten(0, 1))
    held = torch.zeros(2 * len(rows), dtype=torch.bool)
    held[: 2 * n_held] = True
    return torch.cat(out), held


@torch.inference_mode()
def text_features(
    at: Place,
    vectors: Float[Tensor, "n d_model"] | None,
    scales: Float[Tensor, " n"] | None,
    *,
    scheme: Scheme = Scheme(),
    first: int = 0,
    batch_size: int = 128,
) -> Float[Tensor, "n 2 d_sae"]:
    """Return mean activations over the text that each vector causes, read with steering off, by every other prompt.

    Encode each position, then average over positions and rollouts. Without vectors: one row, of unsteered text.
    first: number of the first vector; it keys the noise, so that a vector's texts do not depend on how work is split.

    There is no second pass: what is added after a block does not reach that block, so the stream there, before the
    addition, is what reading the finished text without steering gives.
    """
    n, device = 1 if vectors is None else len(vectors), next(at.model.parameters()).device
    total = torch.zeros(n, 2, at.sae.W_dec.shape[0], device=device)
    count = torch.zeros(n, 2, 1, device=device)
    starts = [prompt_ids(at.tokenizer, prompt) for prompt in scheme.prompts]
    number = 0 if vectors is None else first + 1  # 0 is the unsteered arm
    for length in sorted({len(start) for start in starts}):  # prompts of one length share batches, without pads
        mine = [p for p, start in enumerate(starts) if len(start) == length]
        plan = [(v, p, s) for v in range(n) for p in mine for s in range(scheme.samples)]
        with packed_linears(at.model):
            ids = torch.tensor([starts[p] for p in mine], device=device)
            head = residuals(at.model, ids, layers=[at.layer])[at.layer][:, :-1]

        def summed(batch: list[tuple[int, int, int]], head=head, mine=mine) -> tuple:
            which = torch.tensor([v for v, _, _ in batch])
            rows = [((number + v) * len(starts) + p) * scheme.samples + s for v, p, s in batch]
            arm = [(v, tuple(starts[p])) for v, p, _ in batch]
            edits = [] if vectors is None else [Add(at.layer, vectors[which], scales[which])]
            try:
                ids, tail = _rollouts(at, [starts[p] for _, p, _ in batch], edits, scheme, rows=rows, arm=arm)
            except NotFinite as error:
                lost = {batch[r][0] for r in error.rows}
                named = ", ".join(f"vector {first + v}" + (f" at scale {float(scales[v]):g}" if edits else "") for v in sorted(lost)[:4])
                raise ValueError(f"{named}: {error.what}: lower the scale, or open the model in float32") from error
            resid = torch.cat([head[[mine.index(p) for _, p, _ in batch]], tail], 1)
            cell = (which.to(device), torch.tensor([p % 2 for _, p, _ in batch], device=device))
            return cell, *_activations(at, ids, resid, scheme)

        for i in range(0, len(plan), batch_size):
            for cell, acts, kept in halving(summed, plan[i : i + batch_size]):
                total.index_put_(cell, acts, accumulate=True)
                count.index_put_(cell, kept, accumulate=True)
    return (total / count.clamp_min(1)).cpu()


def _rollouts(
    at: Place, prompts: list[list[int]], edits: list[Add], scheme: Scheme, **groups
) -> tuple[Int[Tensor, "rows pos"], Float[Tensor, "rows new d_model"]]:
    """Return the token ids of whole rollouts, and the stream at the place before edits, from the last prompt token on."""
    steps = scheme.length - len(prompts[0]) + 1  # the stream of the last token comes with one token more, which is dropped
    parameter = next(at.model.parameters())
    stream = torch.zeros(len(prompts), steps, at.d_model, dtype=parameter.dtype, device=parameter.device)

    def keep(step: int, rows: Tensor, _stopped: Tensor, resid: dict[int, Tensor]) -> None:
        stream[rows, step] = resid[at.layer].to(stream.device)

    sampling, watch = replace(scheme.sampling, max_new_tokens=steps), Watch((at.layer,), keep, steered=False)
    texts = decode(at.model, prompts, edits, sampling=sampling, watch=watch, **groups)
    return torch.tensor([start + text.tokens[:-1] for start, text in zip(prompts, texts)], device=parameter.device), stream


def _activations(
    at: Place, ids: Int[Tensor, "rows pos"], resid: Float[Tensor, "rows pos d_model"], scheme: Scheme
) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows 1"]]:
    """Return each text's summed activations and the number of positions that count."""
    keep = torch.ones_like(ids, dtype=torch.bool)
    if scheme.positions == "ordinary":
        keep = ordinary_positions(ids, None, {at.layer: resid}, special=at.tokenizer.all_special_ids, outlier=at.outlier)
    acts = at.sae.encode(resid.to(at.sae.dtype)).float() * keep[..., None]
    return acts.sum(1), keep.sum(1, keepdim=True).float()


def unsteered(at: Place, scheme: Scheme = Scheme(), work: Work = Work()) -> Float[Tensor, " d_sae"]:
    """Return mean activations over unsteered text, the baseline of every effect: `baseline_samples` rollouts of each prompt.

    Kept in the folder work.out, where given. ValueError for a folder that holds another run.
    """
    scheme, size = replace(scheme, samples=scheme.baseline_samples), work.rows(128)
    store = _parts(at, scheme, work, size)
    if store.get(_name(0)) is None:
        means = text_features(at, None, None, scheme=scheme, batch_size=size)
        if work.out is None:
            return means[0].mean(0)
        store.put(_name(0), {"means": means.half()})
    return store.get(_name(0))["means"].float()[0].mean(0)  # as later calls read it


def measure(
    at: Place,
    vectors: Float[Tensor, "n d_model"],
    scales: Float[Tensor, " n"],
    *,
    scheme: Scheme = Scheme(),
    baseline: Float[Tensor, " d_sae"] | None = None,
    shard: tuple[int, int] = (0, 1),
    work: Work = Work(),
) -> Effects:
    """Measure the effect of every vector, y(v) = mean f(steered text) - mean f(unsteered text) (SAE-TS eq. 2).

    vectors are normalised; the text is generated with scales[i] x vectors[i] added at every position, and read without it.
    With work.out (a folder) finished parts stay there and the same call carries on after an interruption. shard: (which one,
    of how many); shard s of n does every n-th part, and once all are there a call with the same work.out and one shard
    returns all. Batches of 128 rows unless work says so.

    Raises ValueError for scales that are not finite and positive, sizes that do not fit, or a folder that holds another run.

    >>> measure(lab.at(13), vectors, scales, work=Work(out="runs/effects")).effects.shape    # doctest: +SKIP
    torch.Size([100, 4096])
    """
    vectors, scales = (x if isinstance(x, Tensor) else torch.tensor(np.asarray(x)) for x in (vectors, scales))
    if len(scales) != len(vectors) or not (torch.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"scales: expected {len(vectors)} finite numbers above 0, got {scales.tolist()[:8]}...")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard: expected (which one, of how many), counted from 0, got {shard}")
    vectors, size = nn.functional.normalize(vectors.float(), dim=-1), work.rows(128)
    if baseline is None:
        baseline = unsteered(at, scheme, Work(size))
    step = max(1, size // scheme.samples)
    starts = list(range(0, len(vectors), step))[shard[0] :: shard[1]]
    store = _parts(at, scheme, work, size, vectors, scales)
    found = []
    for start in bar(starts, "effects", "part", show=work.progress):
        if (part := store.get(_name(start))) is None:
            of = slice(start, start + step)
            part = {"means": text_features(at, vectors[of], scales[of], scheme=scheme, first=start, batch_size=size)}
            store.put(_name(start), {"means": part["means"].half()})
        found.append(part["means"].float())
    mine = torch.cat([torch.arange(start, min(start + step, len(vectors))) for start in starts])
    return Effects(vectors[mine], scales[mine], torch.cat(found) - baseline, baseline)


def _parts(at: Place, scheme: Scheme, work: Work, size: int, *of: Tensor) -> Parts:
    """Return the store of a run. The batch size counts: it cuts the parts, and rounds the text of half-precision models."""
    if work.out is None:
        return Parts(None, "")
    ids = [prompt_ids(at.tokenizer, prompt) for prompt in scheme.prompts]
    key = fingerprint(at.model, ids, at.tokenizer.all_special_ids, at.sae, at.layer, at.outlier, scheme, size, *of)
    return Parts(work.path(key), key)


def _name(start: int) -> str:
    return f"part-{start:06d}"


def save(effects: Effects, path: str | Path, about: dict) -> Path:
    """Write effects small enough to ship: mean activations of the steered text, five bits an entry, compressed feature by feature.

    An entry is one of `LEVELS` steps on a square-root scale up to its feature's largest mean, so it is off by at most 3.3 % of that; on
    the embedded model this is 0.1 % of a feature's variance. Parts are averaged. Vectors are not kept: `about` says how to make them
    again.
    """
    means = (effects.effects + effects.baseline).clamp_min(0).numpy().T
    top = means.max(1).clip(1e-12)
    codes = np.rint(LEVELS * np.sqrt(means / top[:, None])).astype(np.uint8)
    packed = np.frombuffer(lzma.compress(codes.tobytes()), np.uint8).copy()
    tensors = {"codes": packed, "top": top.astype(np.float32), "scales": effects.scales.numpy(), "baseline": effects.baseline.numpy()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}
    return write_atomic(path, to_bytes(tensors, {"about": json.dumps(about)}))


def load(path: str | Path, vectors: Float[Tensor, "m d_model"]) -> tuple[Effects, dict]:
    """Read effects written by `save`, and what is known about them; `vectors` are made again by the caller.

    A file may hold the first n of them, where measuring was cut short. ValueError when it holds more than are given.
    """
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        codes, top, scales, baseline = (file.get_tensor(name) for name in ("codes", "top", "scales", "baseline"))
    if len(vectors) < len(scales):
        raise ValueError(f"{path}: expected at least {len(scales)} vectors, got {len(vectors)}: make them as its recipe says, {about}")
    values = np.frombuffer(lzma.decompress(codes.numpy().tobytes()), np.uint8).reshape(len(top), -1)
    means = torch.from_numpy((values.T / np.float32(LEVELS)) ** 2) * top
    unit = nn.functional.normalize(vectors[: len(scales)].float(), dim=-1)
    return Effects(unit, scales, (means - baseline)[:, None], baseline), about

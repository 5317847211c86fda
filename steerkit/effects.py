"""The effect of a steering vector: what it does to the SAE features of the text that it causes (SAE-TS, section 3).

Generate with and without the vector, read both texts with steering off, and compare the mean activations of all features.
Many vectors are measured in one batch; finished parts stay on disk, and shards on several machines add up.
"""

import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steerkit.decode import Sampling, decode
from steerkit.features import ordinary_positions, residuals
from steerkit.generate import prompt_ids
from steerkit.hooks import Add
from steerkit.packed import packed_linears
from steerkit.partial import steered_token_losses
from steerkit.paths import write_atomic
from steerkit.progress import bar

PROMPTS = (
    *("", "", "", "I think", "Breaking news", "Last night", "For sale", "The weather", "Dear Sir/Madam"),
    *("Preheat the oven", "It's interesting that", "Assistant:", "I went up to", "New study suggests"),
)
# Until 20 November 2024 a comma was missing in the released list, and the published effects were measured so.
PROMPTS_13 = (*PROMPTS[:10], "It's interesting thatAssistant:", *PROMPTS[12:])
SAMPLING = Sampling(temperature=1.0, top_k=50, top_p=0.3)  # as released; no stop token


@dataclass(frozen=True)
class Scheme:
    """How effects are measured: the paper's rollouts by default, with the number of samples a prompt as the budget.

    length: tokens of a rollout in all, beginning-of-text and prompt included. positions: "ordinary" leaves out the first
    token, special tokens and outliers; "all" is the released code. Where nothing else is left out the two differ by the
    factor 32 / 31 on the empty prompt, as both arms have the same first token.
    """

    prompts: tuple[str, ...] = PROMPTS
    samples: int = 1
    length: int = 32
    sampling: Sampling = SAMPLING
    positions: str = "ordinary"
    outlier: float = 10.0

    def __post_init__(self) -> None:
        if self.positions not in ("ordinary", "all") or self.samples < 1 or not self.prompts:
            raise ValueError(
                f'expected positions "ordinary" or "all", at least one sample and one prompt, got {self.positions!r}, {self.samples}, '
                f"{len(self.prompts)}"
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


def calibration_rows(tokenizer, text: str, *, rows: int, length: int = 32) -> Int[Tensor, "rows length"]:
    """Return rows of `length` tokens cut from a text at even distances, each with the beginning-of-text token in front."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    n = len(ids) // (length - 1)
    if n < rows:
        raise ValueError(f"text: expected at least {rows} rows of {length - 1} tokens, got {n}: give a longer text or fewer rows")
    cut = ids[: n * (length - 1)].view(n, -1)[torch.arange(rows) * n // rows]
    return torch.cat([torch.full((rows, 1), tokenizer.bos_token_id), cut], 1)


def solve_scale(scales: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Return where the straight line through the last two points reaches the target, as released.

    Past the last point this extrapolates; a flat line gives infinity.

    >>> solve_scale([0, 20, 40], [3.5, 3.58, 3.66], 4.0)
    125.0
    """
    (x0, y0), (x1, y1) = zip(scales[-2:], losses[-2:])
    return x0 + (target - y0) * (x1 - x0) / (y1 - y0) if y1 != y0 else float("inf")


@torch.inference_mode()
def calibrate(
    model: nn.Module,
    ids: Int[Tensor, "rows pos"],
    vectors: Float[Tensor, "n d_model"],
    *,
    layer: int,
    target: float | None = None,
    rise: float | None = None,
    grid: Sequence[float] = tuple(range(0, 201, 20)),
    batch_size: int = 64,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"], float]:
    """Return each vector's scale, whether it is an extrapolation, and the unsteered loss (SAE-TS section 4.2).

    The scale is where the mean next-token loss on `ids` reaches `target` nats (the released code: 4.0 for Gemma-2-2B), or
    the unsteered loss plus `rise` (the paper: 0.5): up the grid to the first loss above, then the line through the last two
    points. All vectors climb together, and only the blocks above `layer` run. A vector that never gets there is
    extrapolated from the last two points, as released, and marked.

    Raises ValueError unless exactly one of target and rise is given, and where the unsteered loss is above the target.
    """
    if (target is None) == (rise is None):
        raise ValueError(f"expected either target (absolute loss, nats) or rise (above the unsteered loss), got {target} and {rise}")
    with packed_linears(model):
        resid = residuals(model, ids, layers=[layer])[layer]
        base = steered_losses(model, ids, resid, vectors[:1], torch.zeros(1), layer, batch_size)[0].item()
        goal = base + rise if target is None else target
        if base >= goal:
            raise ValueError(f"target: expected more than the unsteered loss {base:.3f} nats, got {goal:.3f}: raise it or use `rise`")
        scales, found = torch.full((len(vectors),), float("nan")), torch.zeros(len(vectors), dtype=torch.bool)
        before, active = torch.full((len(vectors),), base), torch.arange(len(vectors))
        for low, high in pairwise(grid):
            now = steered_losses(model, ids, resid, vectors[active], torch.full((len(active),), float(high)), layer, batch_size)
            for i, loss in zip(active.tolist(), now.tolist()):
                scales[i], found[i] = solve_scale([low, high], [before[i].item(), loss], goal), loss > goal
            before[active] = now
            active = active[now <= goal]
            if not len(active):
                break
    return scales, ~found, base


@torch.inference_mode()
def steered_losses(
    model: nn.Module,
    ids: Int[Tensor, "rows pos"],
    resid: Float[Tensor, "rows pos d_model"],
    vectors: Float[Tensor, "n d_model"],
    scales: Float[Tensor, " n"],
    layer: int,
    batch_size: int = 64,
) -> Float[Tensor, " n"]:
    """Return the mean next-token loss on `ids`, nats, for each vector with its scale; resid is the stream after `layer`."""
    found = steered_token_losses(model, ids, resid, vectors * scales[:, None], layer=layer, batch_size=batch_size)
    return torch.cat([losses.flatten(1).mean(1).cpu() for _, losses in found])


def _activations(model, sae, ids, layer: int, special, scheme: Scheme) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows 1"]]:
    """Return each text's summed activations and the number of positions that count, read with steering off."""
    with packed_linears(model):
        resid = residuals(model, ids, layers=[layer])
    keep = torch.ones_like(ids, dtype=torch.bool)
    if scheme.positions == "ordinary":
        keep = ordinary_positions(ids, None, resid, special=special, outlier=scheme.outlier)
    acts = sae.encode(resid[layer].to(sae.dtype)).float() * keep[..., None]
    return acts.sum(1), keep.sum(1, keepdim=True).float()


@torch.inference_mode()
def text_features(
    model: nn.Module,
    tokenizer,
    sae,
    vectors: Float[Tensor, "n d_model"] | None,
    scales: Float[Tensor, " n"] | None,
    *,
    layer: int,
    scheme: Scheme = Scheme(),
    first: int = 0,
    batch_size: int = 128,
) -> Float[Tensor, "n 2 d_sae"]:
    """Return mean activations over the text that each vector causes, read with steering off, by every other prompt.

    Encode each position, then average over positions and rollouts. Without vectors: one row, of unsteered text.
    first: number of the first vector; it keys the noise, so that a vector's texts do not depend on how work is split.
    """
    n, device = 1 if vectors is None else len(vectors), next(model.parameters()).device
    total = torch.zeros(n, 2, sae.W_dec.shape[0], device=device)
    count = torch.zeros(n, 2, 1, device=device)
    starts = [prompt_ids(tokenizer, prompt) for prompt in scheme.prompts]
    number = 0 if vectors is None else first + 1  # 0 is the unsteered arm
    for length in sorted({len(start) for start in starts}):  # prompts of one length share batches, without pads
        mine = [p for p, start in enumerate(starts) if len(start) == length]
        plan = [(v, p, s) for v in range(n) for p in mine for s in range(scheme.samples)]
        sampling = replace(scheme.sampling, max_new_tokens=scheme.length - length)
        for at in range(0, len(plan), batch_size):
            batch = plan[at : at + batch_size]
            which = torch.tensor([v for v, _, _ in batch])
            rows = [((number + v) * len(starts) + p) * scheme.samples + s for v, p, s in batch]
            arm = [(v, tuple(starts[p])) for v, p, _ in batch]
            edits = [] if vectors is None else [Add(layer, vectors[which], scales[which])]
            texts = decode(model, [starts[p] for _, p, _ in batch], edits, rows=rows, arm=arm, shared=arm, sampling=sampling)
            ids = torch.tensor([starts[p] + text.tokens for (_, p, _), text in zip(batch, texts)], device=device)
            acts, kept = _activations(model, sae, ids, layer, tokenizer.all_special_ids, scheme)
            cell = (which.to(device), torch.tensor([p % 2 for _, p, _ in batch], device=device))
            total.index_put_(cell, acts, accumulate=True)
            count.index_put_(cell, kept, accumulate=True)
    return (total / count.clamp_min(1)).cpu()


def unsteered(
    model: nn.Module, tokenizer, sae, *, layer: int, scheme: Scheme, batch_size: int = 128, out: str | Path | None = None
) -> Float[Tensor, " d_sae"]:
    """Return mean activations over unsteered text, the baseline of every effect; kept in the folder `out`, where given."""
    store = _Parts(out, _key(model, sae, torch.zeros(1), torch.zeros(1), layer, scheme))
    if store.get(0) is None:
        means = text_features(model, tokenizer, sae, None, None, layer=layer, scheme=scheme, batch_size=batch_size)
        if out is None:
            return means[0].mean(0)
        store.put(0, means)
    return store.get(0)[0].mean(0)  # as later calls read it


def measure(
    model: nn.Module,
    tokenizer,
    sae,
    vectors: Float[Tensor, "n d_model"],
    scales: Float[Tensor, " n"],
    *,
    layer: int,
    baseline: Float[Tensor, " d_sae"] | None = None,
    baseline_samples: int = 64,
    scheme: Scheme = Scheme(),
    batch_size: int = 128,
    out: str | Path | None = None,
    shard: int = 0,
    n_shards: int = 1,
    progress: bool = True,
) -> Effects:
    """Measure the effect of every vector, y(v) = mean f(steered text) - mean f(unsteered text) (SAE-TS eq. 2).

    vectors are normalised; the text is generated with scales[i] x vectors[i] added at every position, and read without it.
    With `out` (a folder) finished parts stay there and the same call carries on after an interruption. Shard s of n does
    every n-th part; once all are there a call with the same `out` and one shard returns all.

    Raises ValueError for scales that are not finite and positive, sizes that do not fit, or an `out` of another run.
    """
    if len(scales) != len(vectors) or not (torch.isfinite(scales) & (scales > 0)).all():
        raise ValueError(f"scales: expected {len(vectors)} finite numbers above 0, got {scales.tolist()[:8]}...")
    vectors = nn.functional.normalize(vectors.float(), dim=-1)
    if baseline is None:
        calm = replace(scheme, samples=baseline_samples)
        baseline = unsteered(model, tokenizer, sae, layer=layer, scheme=calm, batch_size=batch_size)
    size = max(1, batch_size // scheme.samples)
    parts = list(range(0, len(vectors), size))[shard::n_shards]
    store = _Parts(out, _key(model, sae, vectors, scales, layer, scheme))
    found = []
    for start in bar(parts, "effects", "part", show=progress):
        means = store.get(start)
        if means is None:
            of = slice(start, start + size)
            settings = {"layer": layer, "scheme": scheme, "first": start, "batch_size": batch_size}
            means = text_features(model, tokenizer, sae, vectors[of], scales[of], **settings)
            store.put(start, means)
        found.append(means)
    mine = torch.cat([torch.arange(start, min(start + size, len(vectors))) for start in parts])
    return Effects(vectors[mine], scales[mine], torch.cat(found) - baseline, baseline)


class _Parts:
    """Finished parts in a folder, one safetensors file each, with the key of the run."""

    def __init__(self, folder: str | Path | None, key: str):
        self.folder, self.key = Path(folder) if folder else None, key

    def _path(self, start: int) -> Path:
        return self.folder / f"part-{start:06d}.safetensors"

    def get(self, start: int) -> Tensor | None:
        if self.folder is None or not self._path(start).exists():
            return None
        with safe_open(self._path(start), "pt") as file:
            if (file.metadata() or {}).get("key") != self.key:
                raise ValueError(f"{self.folder} holds effects of other vectors, scales or settings: delete it or choose another `out`")
            return file.get_tensor("means").float()

    def put(self, start: int, means: Tensor) -> None:
        if self.folder is not None:
            write_atomic(self._path(start), to_bytes({"means": means.half()}, {"key": self.key}))


def _key(model, sae, vectors, scales, layer: int, scheme: Scheme) -> str:
    digest = hashlib.sha256(json.dumps([layer, repr(scheme)]).encode())
    for tensor in (vectors, scales, sae.W_enc[:8], *(p.flatten()[:64] for p in model.parameters())):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save(effects: Effects, path: str | Path, about: dict) -> Path:
    """Write effects small enough to ship: mean activations of the steered text, one byte an entry, compressed.

    The byte is on a square-root scale up to each row's largest mean, so an entry is off by at most 0.4 % of that; on
    the embedded model this is 0.2 % of the variance of effects. Parts are averaged. Vectors are not kept: `about` says how
    to make them again.
    """
    means = (effects.effects + effects.baseline).clamp_min(0).numpy()
    top = means.max(1).clip(1e-12)
    codes = np.rint(255 * np.sqrt(means / top[:, None])).astype(np.uint8)
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
    means = torch.from_numpy(values.astype(np.float32) / 255).square() * top[:, None]
    unit = nn.functional.normalize(vectors[: len(scales)].float(), dim=-1)
    return Effects(unit, scales, (means - baseline)[:, None], baseline), about


def training_vectors(W_dec: Float[Tensor, "d_sae d_model"], *, n_held: int = 256, seed: int = 0) -> tuple[Tensor, Bool[Tensor, " n"]]:
    """Return unit vectors to measure, [2 d_sae, d_model], and which of them are held out, never to be fitted on.

    Every decoder row once, and as many sums of two rows: steering directions that are not themselves rows. First come the
    held-out ones, n_held rows and n_held sums of such rows; then rows and sums by turns, none of which holds a held-out row.
    """
    rows = nn.functional.normalize(W_dec.detach().float(), dim=1)
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


def main(argv: list[str] | None = None) -> None:
    """Measure the effects of a preset's training vectors in blocks that resume and can be shared out: `python -m steerkit.effects`."""
    import argparse

    from steerkit.models import load_model, preset
    from steerkit.paths import resolve
    from steerkit.saes import load_sae

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--layer", type=int, help="default: the preset's primary layer")
    parser.add_argument("--out", required=True, help="folder of the finished parts")
    parser.add_argument("--text", default="data/check_texts.txt", help="calibration text, plain")
    parser.add_argument("--text-rows", type=int, default=4, help="rows of 32 tokens to calibrate on")
    parser.add_argument("--rise", type=float, default=0.5, help="calibrate to the unsteered loss plus this many nats")
    parser.add_argument("--dtype", default="bfloat16", help="of the model; the SAE runs in float32")
    parser.add_argument("--block", type=int, default=512, help="vectors calibrated and measured together")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="independent measurements of the held-out vectors")
    parser.add_argument("--first", type=int, help="measure this many vectors only, the held-out ones first")
    parser.add_argument("--shard", type=int, default=0)
    parser.add_argument("--n-shards", type=int, default=1)
    parser.add_argument("--ship", help="once all blocks are there, write them to this file")
    args = parser.parse_args(argv)
    spec = preset(args.preset)
    layer = spec.primary_layer if args.layer is None else args.layer
    model, tokenizer = load_model(spec, dtype=args.dtype)
    sae = load_sae(spec, spec.sae_set(), layer, hf=model)
    vectors, held = (t[: args.first] for t in training_vectors(sae.W_dec))
    ids = calibration_rows(tokenizer, resolve(args.text).read_text(encoding="utf-8"), rows=args.text_rows)
    folder, scheme = Path(args.out), Scheme(outlier=spec.outlier)
    blocks = range(0, len(vectors), args.block)
    jobs = [(start, repeat) for start in blocks for repeat in range(args.repeats if start < held.sum() else 1)]
    calm = {"scheme": replace(scheme, samples=64), "batch_size": args.batch_size, "out": folder / "baseline"}
    base = unsteered(model, tokenizer, sae, layer=layer, **calm)
    found: dict[int, list[Effects]] = {}
    for start, repeat in jobs[args.shard :: args.n_shards]:
        block = vectors[start : start + args.block]
        scales = _scales(folder / f"scales-{start:06d}.safetensors", model, ids, block, layer, args)
        noise = replace(scheme, sampling=replace(scheme.sampling, seed=1000 * repeat + start))
        settings = {"layer": layer, "baseline": base, "scheme": noise, "batch_size": args.batch_size}
        measured = measure(model, tokenizer, sae, block, scales, out=folder / f"block-{start:06d}-{repeat}", **settings)
        found.setdefault(repeat, []).append(measured)
    if args.ship and args.n_shards == 1:
        about = {"preset": spec.name, "layer": layer, "vectors": "training_vectors", "rise": args.rise, "text": args.text}
        about |= {"text_rows": args.text_rows, "dtype": args.dtype, "prompts": len(scheme.prompts), "samples": scheme.samples}
        _ship(resolve(args.ship), {repeat: _join(blocks, base) for repeat, blocks in found.items()}, held, about)


def _join(blocks: list[Effects], baseline: Tensor) -> Effects:
    return Effects(*(torch.cat([getattr(e, name) for e in blocks]) for name in ("vectors", "scales", "parts")), baseline)


def _ship(path: Path, found: dict[int, Effects], held: Bool[Tensor, " n"], about: dict) -> None:
    """Write the effects, each repeat beside them, and what a budget of rollouts buys."""
    from steerkit.approximator import budget

    for repeat, effects in found.items():
        save(effects, path if not repeat else path.with_suffix(f".repeat{repeat}.safetensors"), about | {"repeat": repeat})
    first = found[0]
    held = held[: len(first.scales)]
    target = torch.stack([e.effects[held[: len(e.scales)]] for e in found.values()]).mean(0)
    table = budget(first.vectors[~held], first.parts[~held], first.vectors[held], target, rollouts=about["prompts"] * about["samples"])
    write_atomic(path.parent / "budget.csv", table.to_csv(index=False, float_format="%.4f"))


def _scales(path: Path, model, ids, vectors, layer: int, args) -> Float[Tensor, " n"]:
    """Return calibrated scales, extrapolated ones cut at twice the grid's end; kept in a file."""
    if not path.exists():
        grid = tuple(range(0, 201, 40))
        scales, beyond, _ = calibrate(model, ids, vectors, layer=layer, rise=args.rise, grid=grid, batch_size=args.batch_size)
        scales = torch.where(scales > 0, scales, float("inf")).clamp(1.0, 2.0 * grid[-1])
        write_atomic(path, to_bytes({"scales": scales, "beyond": beyond}))
    with safe_open(path, "pt") as file:
        return file.get_tensor("scales")


if __name__ == "__main__":
    main()

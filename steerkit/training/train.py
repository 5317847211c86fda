"""Train sparse autoencoders of many layers in one pass over the text, and save them for use (`recipes.saes`)."""

import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from steerkit.engine.cpu import native_bfloat16
from steerkit.feature_cards import describe
from steerkit.files import write_atomic
from steerkit.models.jumprelu import JumpReLU
from steerkit.training.batch_topk import BatchTopK
from steerkit.training.harvest import Recipe, Stream, compiled

log = logging.getLogger(__name__)


def learning_rate(warm_up: int, step: int, progress: float) -> float:
    """Return the factor of the learning rate: up over the warm-up, level, down to a tenth in the last third of the text.

    >>> [round(learning_rate(10, *at), 3) for at in ((4, 0.0), (99, 0.5), (999, 1.0))]
    [0.5, 1.0, 0.1]
    """
    return min(1.0, (step + 1) / warm_up) * min(1.0, 0.1 + 2.7 * (1 - progress))


def train(
    stream: Stream,
    checkpoint: Path | None = None,
    *,
    every: float = 300.0,
    dtype: torch.dtype | None = None,
    report: float = 60.0,
) -> dict[str, dict[str, Tensor]]:
    """Train the SAEs of `stream.recipe`, all in one pass; return their weights for unscaled activations, by name.

    With a `checkpoint` file the state is written there every `every` seconds, and the same call goes on from it to the same
    weights. dtype of the products: bfloat16 where that is native. Raises ValueError for a checkpoint of another recipe.
    """
    recipe, device = stream.recipe, stream.model.device
    dtype = dtype or (torch.bfloat16 if native_bfloat16(device) else torch.float32)
    d_model = stream.model.get_input_embeddings().weight.shape[1]
    plan = recipe.named
    saes = {name: BatchTopK(d_model, one.d_sae, recipe.k, seed=one.seed, device=device, dtype=dtype) for name, one in plan.items()}
    about = {"recipe": json.dumps(asdict(recipe)), "dataset": Path(stream.dataset).name}
    where = _resume(checkpoint, saes, about)
    if where is None:
        where = 0, 0, 0, 0
        for name, sae in saes.items():
            sae.start(stream.block(0).acts[plan[name].layer][:20_000].float())
    turn, step, within, tokens = where
    end, began = recipe.blocks * recipe.epochs, tokens
    clock = saved = told = time.monotonic()
    losses: dict[str, Tensor] = {}
    while turn < end:
        for share, batch in stream.batches(turn, within):
            if (progress := (turn + share) / end) > 1:
                break
            for name, one in plan.items():
                if (own := progress / one.share) <= 1:
                    losses[name] = saes[name].step(batch[one.layer], one.lr * learning_rate(recipe.warm_up, step, own))
            step, within, tokens, now = step + 1, within + 1, tokens + recipe.batch, time.monotonic()
            if now - told > report:
                told, rate = now, (tokens - began) / (now - clock)
                left = tokens * (1 / progress - 1) / rate / 60
                shown = " ".join(f"{name.removeprefix('layer_')}: {float(loss):.1f}" for name, loss in losses.items())
                log.info("%.1f %%, %d tokens, %.0f tokens/s, %.0f min left, loss %s", 100 * progress, tokens, rate, left, shown)
            if checkpoint and now - saved > every:
                _save(checkpoint, saes, (turn, step, within, tokens), about)
                saved = time.monotonic()
        turn, within = turn + 1, 0
    if checkpoint and tokens > began:
        _save(checkpoint, saes, (turn, step, within, tokens), about)
    return {name: sae.weights() for name, sae in saes.items()}


def _save(path: Path, saes: dict[str, BatchTopK], where: tuple[int, ...], about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"{name}/{key}": value for name, sae in saes.items() for key, value in sae.state().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state | {"where": torch.tensor(where)}, temporary, about)
    os.replace(temporary, path)


def _resume(path: Path | None, saes: dict[str, BatchTopK], about: dict[str, str]) -> tuple[int, ...] | None:
    """Load a checkpoint into the SAEs and return (block, step, step within the block, tokens); None where there is none."""
    if path is None or not path.exists():
        return None
    with safe_open(path, "pt") as file:
        found = file.metadata()
    if found != about:
        raise ValueError(f"{path}: expected a checkpoint of {about}, got one of {found}; give another work folder or delete the file")
    state = load_file(path, device=str(next(iter(saes.values())).idle.device))
    for name, sae in saes.items():
        sae.load({key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{name}/")})
    where = tuple(state["where"].tolist())
    log.info("resumed: block %d, %d steps, step %d within the block, %d tokens", *where)
    return where


@torch.no_grad()
def export(
    weights: dict[str, Tensor],
    path: Path,
    *,
    layer: int,
    recipe: Recipe,
    acts: Float[Tensor, "tokens d_model"],
    metadata: dict | None = None,
) -> Path:
    """Save for inference as a float16 JumpReLU SAE with unit decoder rows, in sae_lens's own disk format.

    The threshold is one number, such that `recipe.k` features a token are active on `acts`, a sample of activations.
    """
    state = {name: tensor.half().cpu().contiguous() for name, tensor in weights.items()}
    d_sae, d_in = state["W_dec"].shape
    state["threshold"] = torch.full((d_sae,), l0_threshold(weights, acts, recipe.k)).half()
    cfg = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    about = {
        "sae_lens_version": "6.54.12",
        "training_architecture": "batchtopk",
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "recipe": asdict(recipe),
    }
    write_atomic(path / "sae_weights.safetensors", to_bytes(state))
    write_atomic(path / "cfg.json", json.dumps(cfg | {"metadata": about | (metadata or {})}, indent=1) + "\n")
    return path


def l0_threshold(state: dict[str, Tensor], acts: Float[Tensor, "tokens d_model"], k: float) -> float:
    """Return the pre-activation that `k` features a token exceed on average: the k n-th largest of n tokens."""
    W_enc, b_enc, b_dec = (state[name].float() for name in ("W_enc", "b_enc", "b_dec"))
    need, best = int(k * len(acts)), torch.empty(0, device=acts.device)
    for x in acts.float().split(2048):
        pre = ((x - b_dec) @ W_enc + b_enc).flatten()
        best = torch.cat([best, pre.topk(min(len(pre), 4 * int(k * len(x)))).values])  # a batch may hold more than its share
        best = best.topk(min(need, len(best))).values
    return float(best[-1])


def make(stream: Stream, checkpoint: Path, out: Path, *, fast: bool = False) -> list[Path]:
    """Run the whole recipe of `stream`: train, save, describe; goes on from `checkpoint`. Returns one folder an SAE. fast: compile."""
    recipe, model = stream.recipe, stream.model
    with compiled(model) if fast else nullcontext():
        weights = train(stream, checkpoint)
        first = stream.block(0)
    folders, about = [], {"dataset": Path(stream.dataset).name, "sources": stream.sources}
    for name, one in recipe.named.items():
        acts = first.acts[one.layer]
        folder = export(weights[name], out / name, layer=one.layer, recipe=recipe, acts=acts[:20_000], metadata=about)
        pieces, ids, owners = (x.split(16384) for x in (acts, first.ids, first.owner))
        sae = JumpReLU(folder, model.device)
        describe(sae, pieces, ids, folder / "features.safetensors", owners=owners, source_of=stream.source_of)
        folders.append(folder)
    return folders

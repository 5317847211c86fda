"""Train sparse autoencoders for a preset, all layers in one pass over the text: `python -m steerkit.train`."""

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

from steerkit.cpu import native_bfloat16
from steerkit.harvest import Recipe, Sae, Stream, compiled
from steerkit.paths import cache_dir, write_atomic

log = logging.getLogger(__name__)
DEAD_AFTER = 300_000  # tokens without firing, after which a feature gets the auxiliary loss


class BatchTopK:
    r"""One SAE in training: unit decoder rows d_i, the k n largest pre-activations of a batch of n tokens active.

    $\hat x = b_{dec} + \sum_i z_i d_i$, $z$ = the k n largest positive entries of $(x - b_{dec}) W_{enc} + b_{enc}$; the loss is
    $\|x - \hat x\|^2$ per token, plus, where features are dead, $\|x - \hat x - \sum_{i\,dead} a_i d_i\|^2$ over their strongest
    pre-activations, scaled by their share (arXiv 2412.06410; 2406.04093, appendix A.2). Gradients are written out, so that
    only active entries cost more than the four matrix products. x is scaled so that its mean norm is sqrt(d).
    """

    PARAMS = ("W_enc", "W_dec", "b_enc", "b_dec")

    def __init__(self, d_in: int, d_sae: int, k: float, *, seed: int = 0, device="cpu", dtype: torch.dtype = torch.float32):
        rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)), dim=1).to(device)
        start = (rows.T.contiguous(), rows, torch.zeros(d_sae, device=device), torch.zeros(d_in, device=device))
        self.params = [torch.nn.Parameter(value) for value in start]
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (p.detach() for p in self.params)  # the same memory
        self.adam = torch.optim.Adam(self.params, lr=0.0, fused=True)
        self.idle = torch.zeros(d_sae, device=device)  # tokens since each feature fired
        self.k, self.dtype, self.scale, self.cut = k, dtype, 1.0, 0.0

    def start(self, x: Float[Tensor, "n d_model"]) -> None:
        """Set the scale, the decoder's bias, and the encoder's length so that the first reconstructions fit best."""
        self.scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).mean())
        self.b_dec.copy_(x.mean(0) * self.scale)
        centred = x[:2048] * self.scale - self.b_dec
        pre = centred @ self.W_enc
        z = torch.zeros_like(pre)
        where = self.active(pre)
        z.view(-1)[where] = pre.view(-1)[where]
        guess = z @ self.W_dec
        self.W_enc *= (centred * guess).sum() / guess.square().sum()

    def active(self, pre: Float[Tensor, "n d_sae"]) -> Tensor:
        """Return the flat indices of the k n largest positive entries, searched near the last cut first."""
        flat, need = pre.flatten(), int(self.k * len(pre))
        where = (flat > 0.9 * self.cut).nonzero()[:, 0]
        if len(where) < need:  # the cut fell: look everywhere
            where = (flat > 0).nonzero()[:, 0]
        values = flat[where].float()
        if len(where) > need:
            values, order = values.topk(need, sorted=False)
            where = where[order]
        self.cut = float(values.min()) if len(values) else 0.0
        return where

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_model"]) -> tuple[list[Tensor], Tensor]:
        """Return the gradients of the loss at scaled x, in the order of PARAMS, and the loss without its auxiliary part."""
        n, f = len(x), len(self.b_enc)
        W_enc, W_dec = self.W_enc.to(self.dtype), self.W_dec.to(self.dtype)
        centred = (x - self.b_dec).to(self.dtype)
        pre = torch.addmm(self.b_enc.to(self.dtype), centred, W_enc)
        where = self.active(pre)
        column = where % f
        z = torch.zeros_like(pre)
        z.view(-1)[where] = pre.view(-1)[where]
        error = (z @ W_dec).float() + self.b_dec - x
        g = (2 / n * error).to(self.dtype)  # d loss / d x_hat
        slope = (g @ W_dec.T).view(-1)[where]  # d loss / d z, needed at active entries alone
        back = torch.zeros_like(pre)
        back.view(-1)[where] = slope
        b_enc = torch.zeros_like(self.b_enc).index_add_(0, column, slope.float())
        W_enc_grad, W_dec_grad = (centred.T @ back).float(), (z.T @ g).float()
        dead = (self.idle > DEAD_AFTER).nonzero()[:, 0]
        if len(dead):
            self._revive(dead, pre, centred, error, W_enc_grad, W_dec_grad, b_enc)
        b_dec = 2 / n * error.sum(0) - self.W_enc @ b_enc
        self.idle += n
        self.idle[column] = 0
        return [W_enc_grad, W_dec_grad, b_enc, b_dec], error.square().sum() / n

    def _revive(self, dead: Tensor, pre: Tensor, centred: Tensor, error: Tensor, W_enc_grad: Tensor, W_dec_grad: Tensor, b_enc: Tensor):
        """Add the gradients of the auxiliary loss: dead features learn what the live ones miss."""
        n, k_aux = len(pre), error.shape[1] // 2
        rows, a = self.W_dec[dead].to(self.dtype), pre[:, dead]
        if len(dead) > k_aux:
            top = a.topk(k_aux, dim=1)
            a = torch.zeros_like(a).scatter(1, top.indices, top.values)
        miss = (a @ rows).float() + error
        g = (2 / n * min(len(dead) / k_aux, 1.0) * miss).to(self.dtype)
        back = (g @ rows.T) * (a != 0)
        W_dec_grad[dead] += (a.T @ g).float()
        W_enc_grad[:, dead] += (centred.T @ back).float()
        b_enc[dead] += back.float().sum(0)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "n d_model"], lr: float) -> Tensor:
        """Take one Adam step on a batch of unscaled activations; decoder rows keep length one. Returns the loss a token."""
        grads, loss = self.gradients(x * self.scale)
        grads[1] -= (grads[1] * self.W_dec).sum(1, keepdim=True) * self.W_dec  # along the row there is nothing to learn
        for p, grad in zip(self.params, grads):
            p.grad = grad
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return everything that a later step depends on."""
        found = {name: p.detach() for name, p in zip(self.PARAMS, self.params)}
        for name, p in zip(self.PARAMS, self.params):
            found |= {f"adam.{name}.{key}": value for key, value in self.adam.state[p].items()}
        return found | {"idle": self.idle, "numbers": torch.tensor([self.scale, self.cut], dtype=torch.float64)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state`."""
        for name, p in zip(self.PARAMS, self.params):
            p.copy_(state[name])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.adam.state[p] = {key: state[f"adam.{name}.{key}"].clone() for key in keys if f"adam.{name}.{key}" in state}
        self.idle.copy_(state["idle"])
        self.scale, self.cut = state["numbers"].tolist()

    def weights(self) -> dict[str, Float[Tensor, "..."]]:
        """Return W_enc, W_dec, b_enc, b_dec for unscaled activations; decoder rows have length one."""
        scaled = {"b_enc": self.b_enc / self.scale, "b_dec": self.b_dec / self.scale}
        return {"W_enc": self.W_enc, "W_dec": self.W_dec} | scaled


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


def make(model, tokenizer, dataset: str, recipe: Recipe, work: Path, out: Path, *, fast: bool = False, batch_size: int = 16) -> list[Path]:
    """Run the whole recipe: train, save, describe; resumes from `work`. Returns one folder a layer. fast: compile the model."""
    from sae_lens import SAE

    from steerkit.quality import describe

    stream = Stream(model, tokenizer, dataset, recipe, batch_size)
    with compiled(model) if fast else nullcontext():
        weights = train(stream, work / "checkpoint.safetensors")
        first = stream.block(0)
    folders = []
    for name, one in recipe.named.items():
        acts, about = first.acts[one.layer], {"dataset": Path(dataset).name}
        folder = export(weights[name], out / name, layer=one.layer, recipe=recipe, acts=acts[:20_000], metadata=about)
        sae = SAE.load_from_disk(folder, device=str(model.device), dtype="float32")
        pieces, ids, owners = (x.split(16384) for x in (acts, first.ids, first.owner))
        describe(sae, pieces, ids, folder / "features.safetensors", owners=owners)
        folders.append(folder)
    return folders


def main(argv: list[str] | None = None) -> None:
    """Train SAEs for a preset: `python -m steerkit.train smollm2-135m --dataset PATH_OR_HUB_ID --out FOLDER --saes 3 13:8192`."""
    import argparse

    from steerkit.models import load_model, preset

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset")
    parser.add_argument("--dataset", required=True, help="hub data set id, folder, or .jsonl(.gz)/.parquet file with text or messages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=cache_dir() / "train", help="the checkpoint; a second call resumes from it")
    parser.add_argument(
        "--saes", type=Sae.parse, nargs="+", default=[Sae(n) for n in (3, 8, 13, 18, 23, 28)], help="LAYER[:FEATURES][:lr=...] ..."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="twice the speed after a minute; needs a C++ compiler on a CPU")
    parser.add_argument("--llm-batch", type=int, default=16, help="rows in a forward pass")
    names = ("tokens", "epochs", "k", "batch", "warm_up", "doc_tokens", "block_rows", "seed")
    for name in names:
        default = Recipe.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(tuple(args.saes), **{name: getattr(args, name) for name in names})
    model, tokenizer = load_model(preset(args.preset), device=args.device)
    make(model, tokenizer, args.dataset, recipe, args.work, args.out, fast=args.compile, batch_size=args.llm_batch)


if __name__ == "__main__":
    main()

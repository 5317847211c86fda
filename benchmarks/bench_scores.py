"""Output scores in features a second, against one forward pass a feature, and the products of the layers above: `make bench`."""

import argparse
import statistics

import torch
from bench_generate import device_line, rates_by_round, write_table

from steerkit.engine.generate import prompt_ids
from steerkit.engine.packed import packed_linears
from steerkit.engine.steer import residual_blocks
from steerkit.methods.output_scores.score import PROMPT, lens_tokens, output_scores
from steerkit.models import lab as models


def released_loop(loaded, sae, lens, *, layer: int, slow: int):
    """One full forward pass for each feature: encode, raise the feature, decode, add the error back; then sort all probabilities."""
    ids = torch.tensor([prompt_ids(loaded.tokenizer, PROMPT)], device=loaded.hf.device)
    for feature in range(slow):

        def push(_module, _args, output, feature=feature):
            x = output[0] if isinstance(output, tuple) else output
            acts = sae.encode(x)
            error = x.double() - sae.decode(acts).double()
            acts[:, -1, feature] += 10 * acts[:, -1].max()
            new = (sae.decode(acts).double() + error).to(x)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = residual_blocks(loaded.hf)[layer].register_forward_hook(push)
        with torch.inference_mode():
            p = loaded.hf(input_ids=ids).logits[0, -1].float().softmax(-1)
        handle.remove()
        order = p.argsort(descending=True)
        rank = min(int((order == token).nonzero()) for token in lens[feature])
        (1 - rank / len(p)) * p[order[rank]]


def products(loaded, *, layer: int, batch: int):
    """The ceiling: the matrix products of the upper blocks and the head for a batch of features, and nothing else."""
    blocks, head = residual_blocks(loaded.hf)[layer + 1 :], loaded.hf.get_output_embeddings()
    linears = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)] + [head]
    inputs = {n: torch.randn(batch, n, device=loaded.hf.device, dtype=loaded.hf.dtype) for n in {m.in_features for m in linears}}

    @torch.inference_mode()
    def run(times: int):
        with packed_linears(loaded.hf):
            for _ in range(times):
                for linear in linears:
                    linear(inputs[linear.in_features])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, nargs="*", default=[13, 28])
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--slow", type=int, default=24, help="features that the loop does in a round")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    loaded = models.open(args.preset, layers=args.layers, device=args.device)
    rows = ["| layer | what | features/s | steerkit / this, median (lowest to highest) |", "|---|---|---|---|"]
    for layer in args.layers:
        sae = loaded.sae(layer)
        lens = lens_tokens(loaded.hf, sae.W_dec[: args.features])
        settings = {"layer": layer, "lens": lens, "batch_size": args.batch}
        ceiling = products(loaded, layer=layer, batch=args.batch)
        calls = {
            "steerkit.methods.output_scores.score": lambda s=settings, e=sae: output_scores(
                loaded.hf, loaded.tokenizer, e, range(args.features), **s
            ),
            "one forward pass a feature": lambda e=sae, t=lens, at=layer: released_loop(loaded, e, t.tolist(), layer=at, slow=args.slow),
            "matrix products of the layers above alone": lambda run=ceiling: run(args.features // args.batch),
        }  # fmt: skip
        synchronize = torch.cuda.synchronize if loaded.hf.device.type == "cuda" else lambda: None
        found = rates_by_round(calls, 1, rounds=args.rounds, synchronize=synchronize)
        done = {name: args.slow if "pass" in name else args.features for name in calls}
        rates = {name: [r * done[name] for r in each] for name, each in found.items()}
        ours = rates["steerkit.methods.output_scores.score"]
        for name, each in rates.items():
            ratios = [a / b for a, b in zip(ours, each)]
            ratio = "" if each is ours else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(f"| {layer} | {name} | {statistics.median(each):,.0f} | {ratio} |")
    about = f"{args.preset}, batch {args.batch}, prompt of five tokens, 20 lens tokens. {device_line()}."
    write_table(f"output scores, {args.preset}", [about, "", *rows, "", f"Agreement: {_agreement(loaded, args.layers[0])}"])


def _agreement(loaded, layer: int) -> str:
    """Return how far the scores are from those of a plain steered pass, so that the speed is that of the right numbers."""
    from steerkit.engine.steer import Boost, steering
    from steerkit.methods.output_scores.score import rank_weighted

    sae, worst = loaded.sae(layer), 0.0
    lens = lens_tokens(loaded.hf, sae.W_dec[:16])
    found = output_scores(loaded.hf, loaded.tokenizer, sae, range(16), layer=layer, lens=lens)
    ids = torch.tensor([prompt_ids(loaded.tokenizer, PROMPT)], device=loaded.hf.device)
    for i in range(16):
        with torch.inference_mode(), steering(loaded.hf, Boost(layer, sae, i, 10.0), window="last", record=False):
            logits = loaded.hf(input_ids=ids).logits[:, -1].float()
        worst = max(worst, abs(float(rank_weighted(logits, lens[i : i + 1].to(logits.device))[0]) - float(found.score[i])))
    return f"largest difference from a hooked pass over 16 features {worst:.1g}"


if __name__ == "__main__":
    main()

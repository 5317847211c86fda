"""Output scores in features a second, against one forward pass a feature, and the products of the layers above: `make bench`."""

import argparse
import statistics

import torch
from bench_generate import device_line, rates_by_round, write_table

import steerkit as sk
from steerkit.engine.lab import Place
from steerkit.engine.packed import packed_linears
from steerkit.engine.steer import Boost, residual_blocks, steering
from steerkit.methods.output_scores.score import PROMPT, lens_tokens, output_scores, rank_weighted

OURS = "steerkit.methods.output_scores.score"


def released_loop(at: Place, lens, *, slow: int):
    """One full forward pass for each feature: encode, raise the feature, decode, add the error back; then sort all probabilities."""
    sae, (ids, _) = at.sae, at.lab.tokens([PROMPT])
    for feature in range(slow):

        def push(_module, _args, output, feature=feature):
            x = output[0] if isinstance(output, tuple) else output
            acts = sae.encode(x)
            error = x.double() - sae.decode(acts).double()
            acts[:, -1, feature] += 10 * acts[:, -1].max()
            new = (sae.decode(acts).double() + error).to(x)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = at.lab.block(at.layer).register_forward_hook(push)
        with torch.inference_mode():
            p = at.model(input_ids=ids).logits[0, -1].float().softmax(-1)
        handle.remove()
        order = p.argsort(descending=True)
        rank = min(int((order == token).nonzero()) for token in lens[feature])
        (1 - rank / len(p)) * p[order[rank]]


def products(at: Place, *, batch: int):
    """The ceiling: the matrix products of the upper blocks and the head for a batch of features, and nothing else."""
    blocks, head = residual_blocks(at.model)[at.layer + 1 :], at.model.get_output_embeddings()
    linears = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)] + [head]
    inputs = {n: torch.randn(batch, n, device=at.model.device, dtype=at.model.dtype) for n in {m.in_features for m in linears}}

    @torch.inference_mode()
    def run(times: int):
        with packed_linears(at.model):
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
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lab = sk.open(args.preset, layers=args.layers, device=args.device)
    rows = ["| layer | what | features/s | steerkit / this, median (lowest to highest) |", "|---|---|---|---|"]
    for at in map(lab.at, args.layers):
        lens = lens_tokens(lab.hf, at.sae.W_dec[: args.features])
        ceiling = products(at, batch=args.batch)
        calls = {
            OURS: lambda at=at, t=lens: output_scores(at, range(args.features), lens=t, batch_size=args.batch),
            "one forward pass a feature": lambda at=at, t=lens: released_loop(at, t.tolist(), slow=args.slow),
            "matrix products of the layers above alone": lambda run=ceiling: run(args.features // args.batch),
        }
        synchronize = torch.cuda.synchronize if lab.hf.device.type == "cuda" else lambda: None
        found = rates_by_round(calls, 1, rounds=args.rounds, synchronize=synchronize)
        done = {name: args.slow if "pass" in name else args.features for name in calls}
        rates = {name: [r * done[name] for r in each] for name, each in found.items()}
        ours = rates[OURS]
        for name, each in rates.items():
            ratios = [a / b for a, b in zip(ours, each)]
            ratio = "" if each is ours else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append(f"| {at.layer} | {name} | {statistics.median(each):,.0f} | {ratio} |")
    about = f"{args.preset}, batch {args.batch}, prompt of five tokens, 20 lens tokens. {device_line()}."
    write_table(f"output scores, {args.preset}", [about, "", *rows, "", f"Agreement: {_agreement(lab.at(args.layers[0]))}"])


def _agreement(at: Place) -> str:
    """Return how far the scores are from those of a plain steered pass, so that the speed is that of the right numbers."""
    worst, lens, (ids, _) = 0.0, lens_tokens(at.model, at.sae.W_dec[:16]), at.lab.tokens([PROMPT])
    found = output_scores(at, range(16), lens=lens)
    for i in range(16):
        with torch.inference_mode(), steering(at.lab, Boost(at.layer, at.sae, i, 10.0), window="last", record=False):
            logits = at.model(input_ids=ids).logits[:, -1].float()
        worst = max(worst, abs(float(rank_weighted(logits, lens[i : i + 1].to(logits.device))[0]) - float(found.score[i])))
    return f"largest difference from a hooked pass over 16 features {worst:.1g}"


if __name__ == "__main__":
    main()

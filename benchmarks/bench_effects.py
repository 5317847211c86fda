"""Effects of steering vectors in vectors a second, and the two fits of the approximator: `make bench`."""

import argparse
import time

import torch
from bench_generate import device_line, rates_by_round, write_table

import steerkit as sk
from steerkit.features import residuals
from steerkit.files import DATA
from steerkit.methods.sae_ts.approximator import agreement, fit_adam, fit_ridge
from steerkit.methods.sae_ts.effects import PROMPTS, Scheme, load, text_features, training_vectors
from steerkit.models.load import bridge


def released_scheme(at, lensed, vectors, scale: float, *, samples: int):
    """One vector at a time, one TransformerBridge.generate call a prompt, then a second pass without the vector."""
    means = []
    for vector in vectors:

        def add(resid, hook=None, vector=vector):
            return resid + scale * vector

        total, count = 0, 0
        for prompt in PROMPTS:
            ids, _ = at.lab.tokens([prompt])
            with lensed.hooks(fwd_hooks=[(f"blocks.{at.layer}.hook_resid_post", add)]):
                new = 32 - ids.shape[1]
                settings = {"max_new_tokens": new, "do_sample": True, "top_k": 50, "top_p": 0.3, "stop_at_eos": False, "verbose": False}
                texts = lensed.generate(ids.repeat(samples, 1), **settings)
            with torch.inference_mode():
                acts = at.sae.encode(residuals(at.model, texts, layers=[at.layer])[at.layer])
            total, count = total + acts[:, 1:].sum((0, 1)), count + acts[:, 1:].shape[:2].numel()
        means.append(total / count)
    return torch.stack(means)


def table(at, lensed, *, n: int, slow: int, samples: int, rounds: int) -> list[str]:
    """Return the rows for one number of samples a prompt: ours with n vectors at once, theirs with `slow` of them."""
    device = at.model.device
    vectors = training_vectors(at.sae.W_dec)[0][:n].to(device)
    scales, scheme = torch.full((n,), 60.0), Scheme(samples=samples)
    calls = {
        "ours": lambda: text_features(at, vectors, scales, scheme=scheme, batch_size=256),
        "theirs": lambda: released_scheme(at, lensed, vectors[:slow], 60.0, samples=samples),
    }
    found = rates_by_round(calls, 1, rounds=rounds, synchronize=torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    ours, theirs = ([rate * k for rate in found[name]] for name, k in (("ours", n), ("theirs", slow)))
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    middle, low, high = len(ratios) // 2, ratios[0], ratios[-1]
    return [
        f"| steerkit.methods.sae_ts.effects, {samples} a prompt | {sorted(ours)[middle]:.3g} | |",
        f"| released scheme, {samples} a prompt | {sorted(theirs)[middle]:.3g} | {ratios[middle]:.1f} ({low:.1f} to {high:.1f}) |",
    ]


def fits(path, W_dec) -> list[str]:
    """Return the rows that compare the closed form with Adam: seconds, and error on held-out vectors."""
    vectors, held = training_vectors(W_dec)
    shipped, _ = load(path, vectors)
    x, y, rows = shipped.vectors, shipped.effects, []
    for name, fit in (
        ("closed form, penalty by 5-fold cross-validation", lambda: fit_ridge(x[~held], y[~held])[0]),
        ("Adam, 11,700 steps (the paper's)", lambda: fit_adam(x[~held], y[~held])),
    ):
        start = time.perf_counter()
        fitted = fit()
        took, found = time.perf_counter() - start, agreement(fitted(x[held]), y[held], y[~held].mean(0))
        rows.append(f"| {name} | {took:.1f} | {found['r2']:.3f} | {found['cosine'].mean():.3f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=int, default=32, help="vectors at once, ours")
    parser.add_argument("--samples", type=int, default=8, help="texts a prompt in the second pair of rows; the paper: 64")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    at = sk.open(args.preset, device=args.device).at()
    lensed = bridge(at.lab)
    rows = ["| what | vectors/s | steerkit / this, median (lowest to highest) |", "|---|---|---|"]
    rows += table(at, lensed, n=args.vectors, slow=1, samples=1, rounds=args.rounds)
    rows += table(at, lensed, n=4, slow=1, samples=args.samples, rounds=1)
    shipped = DATA / "effects" / args.preset / f"layer_{at.layer}.safetensors"
    if shipped.exists():
        rows += ["", "| fit of the approximator | seconds | held-out R2 | held-out cosine |", "|---|---|---|---|"]
        rows += fits(shipped, at.sae.W_dec)
    about = f"{args.preset}, 14 prompts, 32 tokens, SAE of layer {at.layer}. {device_line()}."
    write_table(f"effects, {args.preset}", [about, "", *rows])


if __name__ == "__main__":
    main()

"""CorrSteer's selection pass: what pooling six layers costs, against the released loop, and memory by samples: `make bench`."""

import argparse
import resource
import statistics

import torch
from bench_generate import device_line, rates_by_round, write_table

import steerkit as sk
from steerkit.engine.decode import Sampling, decode
from steerkit.engine.generate import generate
from steerkit.engine.tokens import prompt_ids
from steerkit.methods.corrsteer.correlation import Correlation
from steerkit.methods.corrsteer.pooling import Reading, pool_answers
from steerkit.store import Work


def select(lab, prompts: list[str], sampling: Sampling, batch: int = 64):
    """The selection pass: texts, and their pooled features."""
    work = Work(batch, progress=False)
    tokens = generate(lab, prompts, sampling=sampling, work=work).tokens.tolist()
    return pool_answers(lab, prompts, tokens, [Reading(lab.saes, "post")], work=work)[0]


def questions(n: int) -> list[str]:
    return [f"What is {i % 97} plus {i % 89}? Answer in a sentence." for i in range(n)]


def released_loop(lab, prompts: list[str], *, new: int, batch: int = 8):
    """Hugging Face generate in batches of 8; a hook keeps each step's last position; each layer then encodes its steps one by one."""
    model, tokenizer, saes = lab.hf, lab.tokenizer, lab.saes
    for at in range(0, len(prompts), batch):
        ids = [prompt_ids(tokenizer, p) for p in prompts[at : at + batch]]
        width = max(map(len, ids))
        rows = torch.tensor([[tokenizer.pad_token_id or 0] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        kept: dict[int, list] = {layer: [] for layer in saes}
        handles = [
            lab.block(layer).register_forward_hook(
                lambda _m, _a, out, mine=kept[layer]: mine.append((out[0] if isinstance(out, tuple) else out)[:, -1:].clone())
            )
            for layer in saes
        ]
        with torch.inference_mode():
            model.generate(input_ids=rows, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new)
            for layer, steps in kept.items():
                acts = torch.stack([saes[layer].encode(step)[:, 0] for step in steps])  # [steps, batch, d_sae]
                found, y = Correlation.empty(acts.shape[-1], edges=None), torch.arange(acts.shape[1]) % 2
                found.update(acts.amax(0), y)
        for handle in handles:
            handle.remove()


def memory(lab, n: int, *, new: int) -> float:
    """Return how much the process's peak memory grows over a pass of n samples that only keeps sums, MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sums = {layer: Correlation.empty(sae.W_dec.shape[0], edges=None) for layer, sae in lab.saes.items()}
    sampling = Sampling(temperature=0.0, max_new_tokens=new)
    for at in range(0, n, 64):
        pooled = select(lab, questions(n)[at : at + 64], sampling)
        for layer, found in sums.items():
            found.update(pooled.z(layer), torch.arange(len(pooled)) % 2)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs=2, default=[200, 2000])
    args = parser.parse_args()
    chosen = sk.preset(args.preset).sae_set().layers
    layers = chosen if len(chosen) <= 6 else chosen[:: len(chosen) // 6][:6]
    lab = sk.open(args.preset, layers=layers, device=args.device)
    prompts = questions(args.batch)
    ids = sorted((prompt_ids(lab.tokenizer, p) for p in prompts), key=len)
    sampling = Sampling(temperature=0.0, max_new_tokens=args.new)
    keys = [tuple(i) for i in ids]

    calls = {
        "steerkit, generate and pool six layers": lambda: select(lab, prompts, sampling, args.batch),
        "the same generation without pooling": lambda: decode(lab.hf, ids, [], rows=range(len(ids)), arm=keys, sampling=sampling),
        "released loop": lambda: released_loop(lab, prompts, new=args.new),
    }
    synchronize = torch.cuda.synchronize if lab.hf.device.type == "cuda" else lambda: None
    rates = rates_by_round(calls, args.batch, rounds=args.rounds, synchronize=synchronize)
    ours = rates["steerkit, generate and pool six layers"]
    rows = ["| what | samples/s | steerkit / this, median (lowest to highest) |", "|---|---|---|"]
    for name, each in rates.items():
        ratios = [a / b for a, b in zip(ours, each)]
        ratio = "" if each is ours else f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(f"| {name} | {statistics.median(each):.2f} | {ratio} |")
    grown = {n: memory(lab, n, new=4) for n in args.samples}
    about = f"{args.preset}, greedy, {args.new} new tokens, batch {args.batch}, layers {layers}. {device_line()}."
    grew = ", ".join(f"{n:,} samples {mb:.0f} MB" for n, mb in grown.items())
    write_table(f"selection pass, {args.preset}", [about, "", *rows, "", f"Growth of peak memory, sums only, in this order: {grew}."])


if __name__ == "__main__":
    main()

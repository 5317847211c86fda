"""Steered sampling in tokens a second, as ratios in one run: `make bench`, or with --preset/--device for another machine."""

import argparse
import platform
import re
import statistics
import time

import torch

import steerkit as sk
from steerkit.book.report import device
from steerkit.engine.generate import Arm, Sampling, Work, generate
from steerkit.engine.steer import Add, steering
from steerkit.files import ROOT, write_atomic
from steerkit.models.load import bridge

MARK = "<!-- table: {} -->"


def rates_by_round(calls: dict, tokens: int, *, rounds: int, synchronize) -> dict[str, list[float]]:
    """Tokens a second of each call in each round; the calls take turns, so that a slow minute of the machine meets all."""
    rates = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    return rates


def contenders(lab, *, batch: int, new: int):
    """Return name -> call: the same model, vector, scale, prompt and number of new tokens for each."""
    model, layer, lensed = lab.hf, lab.at().layer, bridge(lab)
    unit = torch.nn.functional.normalize(torch.randn(lab.at().d_model, generator=torch.Generator().manual_seed(0)), dim=0)
    scale, prompt = 40.0, "I think"
    ids, mask = (t.repeat(batch, 1) for t in lab.tokens([prompt]))
    device_unit = unit.to(model.device, model.dtype)
    plain = torch.randint(100, 1000, (batch, new), device=model.device)

    def ours():
        sampling, work = Sampling(max_new_tokens=new, top_k=50), Work(batch, progress=False)
        generate(lab, [prompt], [Arm("v", (Add(layer, unit, scale),), scale)], samples=batch, sampling=sampling, work=work)

    def hf_generate():
        """Hugging Face generate with the shortest forward hook that adds the vector everywhere."""
        handle = lab.block(layer).register_forward_hook(
            lambda _m, _i, out: (out[0] + scale * device_unit, *out[1:]) if isinstance(out, tuple) else out + scale * device_unit
        )
        try:
            model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=50, max_new_tokens=new, min_new_tokens=new)
        finally:
            handle.remove()

    def bridge_generate(rows: int = batch):
        """TransformerBridge.generate with a run-time hook."""

        def add(resid, hook=None):
            return resid + scale * device_unit

        with lensed.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            lensed.generate(ids[:rows], max_new_tokens=new, do_sample=True, top_k=50, stop_at_eos=False, verbose=False)

    def bridge_by_vector():
        """The same for eight vectors: a hook that adds one vector to the batch takes a call for each."""
        for _ in range(8):
            bridge_generate(batch // 8)

    @torch.inference_mode()
    def forward():
        """The ceiling of decoding without packed weights: one plain forward pass over as many tokens."""
        model(input_ids=plain, use_cache=False)

    return {
        "steerkit.engine.generate": ours,
        "(a) TransformerBridge.generate, run-time hook": bridge_generate,
        "(a) the same, 8 vectors and an eighth of the batch for each": bridge_by_vector,
        "(b) Hugging Face generate, plain hook": hf_generate,
        "(c) plain forward pass, same number of tokens": forward,
    }


def table(lab, *, batch: int, new: int, rounds: int) -> list[str]:
    """Return the rows of the table; a ratio is the median over rounds of the ratio within a round."""
    synchronize = torch.cuda.synchronize if lab.hf.device.type == "cuda" else lambda: None
    rates = rates_by_round(contenders(lab, batch=batch, new=new), batch * new, rounds=rounds, synchronize=synchronize)
    ours = rates["steerkit.engine.generate"]
    rows = ["| what | tokens/s | steerkit / this, median (lowest to highest) |", "|---|---|---|"]
    for name, rate in rates.items():
        ratios = [a / b for a, b in zip(ours, rate)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(f"| {name} | {statistics.median(rate):,.0f} | {'' if rate is ours else ratio} |")
    return rows


def with_receipt(lab) -> str:
    """Return the receipt of a short steered call, so that the numbers above are known to be of steered text."""
    (ids, mask), at = lab.tokens(["I think"]), lab.at()
    with steering(lab, Add(at.layer, torch.ones(at.d_model), 1.0)) as receipt, torch.inference_mode():
        lab.hf(input_ids=ids, attention_mask=mask)
    return receipt.summary(0)


def device_line() -> str:
    """Return the machine and versions in words."""
    return f"{device()}, torch {torch.__version__}, {platform.system()} {platform.machine()}"


def write_table(name: str, lines: list[str]) -> None:
    """Print a table and put it into benchmarks/README.md, in place of the last one of that name."""
    text = "\n".join([MARK.format(name), "", *lines, "", MARK.format("end")])
    print(text)
    readme = ROOT / "benchmarks" / "README.md"
    pattern = re.compile(re.escape(MARK.format(name)) + ".*?" + re.escape(MARK.format("end")), re.DOTALL)
    old = readme.read_text()
    write_atomic(readme, pattern.sub(lambda _: text, old) if pattern.search(old) else old.rstrip() + "\n\n" + text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lab = sk.open(args.preset, device=args.device, dtype=args.dtype)
    rows = table(lab, batch=args.batch, new=args.new, rounds=args.rounds)
    settings = f"{args.preset}, {args.dtype}, batch {args.batch}, {args.new} new tokens, top-k 50, vector at layer {lab.at().layer}"
    about = f"{settings}. {device_line()}. Medians of {args.rounds} rounds, in which all take turns."
    write_table(args.preset, [about, "", *rows, "", f"Proof of steering: {with_receipt(lab)}"])


if __name__ == "__main__":
    main()

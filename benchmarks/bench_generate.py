"""Steered sampling in tokens a second, as ratios in one run: `make bench`, or with --preset/--device for another machine."""

import argparse
import platform
import re
import statistics
import time

import torch

from steerkit import models
from steerkit.generate import Arm, generate
from steerkit.hooks import Add, steering
from steerkit.paths import ROOT, write_atomic
from steerkit.report import _device

MARK = "<!-- table: {} -->"


def tokens_per_second(run, tokens: int, *, rounds: int, synchronize) -> float:
    """Median over rounds, after one round to warm up."""
    run()
    rates = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def contenders(loaded, *, batch: int, new: int):
    """Yield (name, call, rounds): the same model, vector, scale, prompt and number of new tokens for each."""
    model, tokenizer, layer = loaded.hf, loaded.tokenizer, loaded.preset.primary_layer
    unit = torch.nn.functional.normalize(torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0)), dim=0)
    scale, prompt = 40.0, "I think"
    ids, mask = (t.repeat(batch, 1) for t in loaded.tokens([prompt]))
    device_unit = unit.to(model.device, model.dtype)
    plain = torch.randint(100, 1000, (batch, new), device=model.device)

    def ours():
        generate(
            model,
            tokenizer,
            [prompt],
            [Arm("v", (Add(layer, unit, scale),), scale)],
            samples=batch,
            max_new_tokens=new,
            top_k=50,
            batch_size=batch,
            progress=False,
        )

    def hf_generate():
        """Hugging Face generate with the shortest forward hook that adds the vector everywhere."""
        handle = loaded.block(layer).register_forward_hook(
            lambda _m, _i, out: (out[0] + scale * device_unit, *out[1:]) if isinstance(out, tuple) else out + scale * device_unit
        )
        try:
            model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=50, max_new_tokens=new, min_new_tokens=new)
        finally:
            handle.remove()

    def bridge_generate():
        """TransformerBridge.generate with a run-time hook."""

        def add(resid, hook=None):
            return resid + scale * device_unit

        with loaded.model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
            loaded.model.generate(ids, max_new_tokens=new, do_sample=True, top_k=50, stop_at_eos=False, verbose=False)

    @torch.inference_mode()
    def forward():
        """The ceiling of decoding without packed weights: one plain forward pass over as many tokens."""
        model(input_ids=plain, use_cache=False)

    return [
        ("steerkit.generate", ours, 5),
        ("(a) TransformerBridge.generate, run-time hook", bridge_generate, 1),
        ("(b) Hugging Face generate, plain hook", hf_generate, 3),
        ("(c) plain forward pass, same number of tokens", forward, 5),
    ]


def table(loaded, *, batch: int, new: int) -> list[str]:
    """Return the rows of the table, fastest claims checked against their targets."""
    cuda = loaded.hf.device.type == "cuda"
    rates, notes = {}, {"(a)": "target 5", "(b)": "target 1.6", "(c)": "target 0.7"}
    for name, call, rounds in contenders(loaded, batch=batch, new=new):
        rates[name] = tokens_per_second(call, batch * new, rounds=rounds, synchronize=torch.cuda.synchronize if cuda else lambda: None)
    ours = rates["steerkit.generate"]
    rows = ["| what | tokens/s | steerkit is faster by |", "|---|---|---|"]
    for name, rate in rates.items():
        rows.append(f"| {name} | {rate:,.0f} | {'' if rate == ours else f'{ours / rate:.2f} x ({notes[name[:3]]})'} |")
    return rows


def with_receipt(loaded) -> str:
    """Return the receipt of a short steered call, so that the numbers above are known to be of steered text."""
    ids, mask = loaded.tokens(["I think"])
    with (
        steering(loaded.hf, Add(loaded.preset.primary_layer, torch.ones(loaded.hf.config.hidden_size), 1.0)) as receipt,
        torch.inference_mode(),
    ):
        loaded.hf(input_ids=ids, attention_mask=mask)
    return receipt.summary(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    loaded = models.open(args.preset, device=args.device, dtype=args.dtype)
    rows = table(loaded, batch=args.batch, new=args.new)
    settings = (
        f"{args.preset}, {args.dtype}, batch {args.batch}, {args.new} new tokens, top-k 50, vector at layer {loaded.preset.primary_layer}"
    )
    machine = f"{_device()}; torch {torch.__version__}, {platform.system()} {platform.machine()}"
    text = "\n".join(
        [
            MARK.format(args.preset),
            "",
            f"{settings}. {machine}. Medians of one run.",
            "",
            *rows,
            "",
            f"Proof of steering: {with_receipt(loaded)}",
            "",
            MARK.format("end"),
        ]
    )
    print(text)
    readme = ROOT / "benchmarks" / "README.md"
    pattern = re.compile(re.escape(MARK.format(args.preset)) + ".*?" + re.escape(MARK.format("end")), re.DOTALL)
    old = readme.read_text()
    write_atomic(readme, pattern.sub(lambda _: text, old) if pattern.search(old) else old.rstrip() + "\n\n" + text + "\n")


if __name__ == "__main__":
    main()

"""How good an SAE is on text it was not trained on, and what each of its features fires on."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steerkit.engine.losses import forward_losses
from steerkit.engine.steer import eager, residual_blocks
from steerkit.features import ordinary_positions, residuals, top_contexts
from steerkit.files import DATA, resolve, write_atomic
from steerkit.stats import bootstrap


@torch.inference_mode()
def fit(
    model: nn.Module,
    tokenizer,
    saes: Mapping[int, nn.Module],
    rows: Int[Tensor, "rows context"],
    *,
    outlier: float = 10.0,
    batch_size: int = 16,
) -> tuple[pd.DataFrame, dict[int, Float[Tensor, " d_sae"]]]:
    """Return (a row per layer: FVU, L0, dead latents, with intervals and n) and each feature's density.

    FVU = sum |x - x_hat|^2 / sum |x - mean x|^2 over ordinary positions; 0 is perfect, 1 is no better than the mean.
    L0 is the mean number of active features a token. Dead: never active in these tokens. Intervals resample rows.
    """
    sums = {layer: [] for layer in saes}  # per row of text: n, squared error, |x|^2, active features, sum of x
    fires = {layer: torch.zeros(sae.W_dec.shape[0]) for layer, sae in saes.items()}
    for _, resid, keep in _read(model, tokenizer, saes, rows, outlier, batch_size):
        for layer, sae in saes.items():
            for x in (acts[k].to(sae.W_dec) for acts, k in zip(resid[layer], keep) if k.any()):  # an SAE from disk may lie elsewhere
                f = sae.encode(x)
                error = (x - sae.decode(f)).double().square().sum()
                fires[layer] += (f > 0).sum(0).cpu()
                x = x.double()
                sums[layer].append([len(x), error.item(), x.square().sum().item(), (f > 0).sum().item(), x.sum(0).cpu().numpy()])
    table = []
    for layer, values in sums.items():
        n, error, square, active = (np.array([v[i] for v in values], dtype=float) for i in range(4))
        total = np.stack([v[4] for v in values])
        mean = total.sum(0) / n.sum()
        spread = square - 2 * total @ mean + n * (mean @ mean)  # squared distance from the overall mean, a row each
        fvu = bootstrap(np.stack([error, spread], 1), lambda v: v[:, 0].sum() / v[:, 1].sum())
        l0 = bootstrap(np.stack([active, n], 1), lambda v: v[:, 0].sum() / v[:, 1].sum())
        table.append(
            {
                "layer": layer,
                "fvu": fvu.value,
                "fvu_low": fvu.low,
                "fvu_high": fvu.high,
                "l0": l0.value,
                "l0_low": l0.low,
                "l0_high": l0.high,
                "dead": float((fires[layer] == 0).float().mean()),
                "tokens": int(n.sum()),
                "rows": len(n),
            }
        )
    return pd.DataFrame(table), {layer: fires[layer] / row["tokens"] for (layer, _), row in zip(sums.items(), table)}


@torch.inference_mode()
def loss_recovered(
    model: nn.Module,
    tokenizer,
    saes: Mapping[int, nn.Module],
    rows: Int[Tensor, "rows context"],
    *,
    outlier: float = 10.0,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Return, per layer, the next-token loss with the SAE's reconstruction in place of the residual stream.

    recovered = (loss_ablated - loss_sae) / (loss_ablated - loss_clean), with the residual stream of ordinary positions
    set to zero ("zero") or to its mean ("mean", the harder test) as the ablation. Losses in nats; intervals resample rows.
    """
    losses: dict[tuple, list] = {}
    for ids, resid, keep in _read(model, tokenizer, saes, rows, outlier, batch_size):
        clean = _loss(model, ids)
        for layer, sae in saes.items():
            x = resid[layer]
            kinds = {
                "sae": sae.decode(sae.encode(x.to(sae.dtype))).to(x),
                "zero": torch.zeros_like(x),
                "mean": x[keep].mean(0).expand_as(x),
            }
            losses.setdefault((layer, "clean"), []).append(clean)
            for kind, other in kinds.items():
                with _replaced(model, layer, other, keep):
                    losses.setdefault((layer, kind), []).append(_loss(model, ids))
    table = []
    for layer in saes:
        by_kind = {kind: torch.cat(losses[layer, kind]).numpy() for kind in ("clean", "sae", "zero", "mean")}
        row = {"layer": layer, "rows": len(by_kind["clean"])} | {f"loss_{k}": float(v.mean()) for k, v in by_kind.items()}
        for kind in ("zero", "mean"):
            stacked = np.stack([by_kind[kind], by_kind["sae"], by_kind["clean"]], 1)
            found = bootstrap(stacked, lambda v: (v[:, 0].mean() - v[:, 1].mean()) / (v[:, 0].mean() - v[:, 2].mean()))
            row |= {
                f"recovered_{kind}": found.value,
                f"recovered_{kind}_low": found.low,
                f"recovered_{kind}_high": found.high,
            }
        table.append(row)
    return pd.DataFrame(table)


def _read(model, tokenizer, saes, rows, outlier: float, batch_size: int) -> Iterator[tuple]:
    """Yield (ids, residual streams by layer, ordinary positions) of each batch of rows."""
    for ids in rows.split(batch_size):
        ids = ids.to(model.device)
        resid = residuals(model, ids, layers=list(saes))
        yield ids, resid, ordinary_positions(ids, None, resid, special=tokenizer.all_special_ids, outlier=outlier)


def _loss(model: nn.Module, ids: Int[Tensor, "rows context"]) -> Float[Tensor, " rows"]:
    return forward_losses(model, ids).mean(1).cpu()


@contextmanager
def _replaced(model: nn.Module, layer: int, other: Tensor, keep: Bool[Tensor, "rows context"]):
    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        new = torch.where(keep[..., None], other, x)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = residual_blocks(model)[layer].register_forward_hook(hook)
    try:
        with eager():
            yield
    finally:
        handle.remove()


@torch.inference_mode()
def describe(
    sae: nn.Module,
    acts: Sequence[Tensor],
    tokens: Sequence[Tensor],
    path: str | Path,
    *,
    owners: Sequence[Tensor] | None = None,
    source_of: Mapping[int, int] | None = None,
    k: int = 5,
) -> Path:
    """Write each feature's density and its k top-activating contexts (token ids and peak value) to a safetensors file.

    acts ([tokens, d_model]), tokens ([tokens]) and owners (the number of each token's document) come in the same pieces, in
    reading order; source_of gives each document's source. Both are stored beside each context where they are known, -1 for none.
    Ids are stored as uint16 where they fit; the last id value marks a place beyond the text.
    """
    fired, n, best = torch.zeros(sae.W_dec.shape[0]), 0, None
    for x, t, owner in zip(acts, tokens, owners or [torch.full_like(t, -1) for t in tokens]):
        f = torch.cat([sae.encode(part.to(sae.dtype)) for part in x.split(4096)])
        fired, n = fired + (f > 0).sum(0).cpu(), n + len(t)
        where, value, place = top_contexts(f, t, k=k)
        found = [value.cpu(), where.cpu(), owner[place].cpu()]
        best = found if best is None else [torch.cat(pair, 1) for pair in zip(best, found)]
        order = best[0].topk(k, dim=1).indices
        best = [part.gather(1, order if part.ndim == 2 else order[..., None].expand(-1, -1, part.shape[2])) for part in best]
    peaks, ids, documents = best
    small = int(ids.max()) < 65535
    ids = torch.where(ids < 0, 65535 if small else -1, ids).to(torch.uint16 if small else torch.int32)
    card = {"density": fired / n, "contexts": ids, "peaks": peaks.half()} | ({"documents": documents.int()} if owners else {})
    if source_of:
        card["sources"] = torch.tensor([source_of.get(d, -1) for d in documents.flatten().tolist()]).view_as(documents).short()
    return write_atomic(path, to_bytes(card, {"tokens": str(n)}))


def contexts(path: str | Path, feature: int, tokenizer) -> list[tuple[str, float]]:
    """Return a feature's top contexts as (text with the peak token in guillemets, peak activation)."""
    card = load_file(path)
    shown = []
    for ids, peak in zip(card["contexts"][feature].to(torch.int64).tolist(), card["peaks"][feature].tolist()):
        words = [("" if i in (65535, -1) else tokenizer.decode([i])) for i in ids]
        at = len(words) - 3  # two tokens follow the peak
        shown.append(("".join(words[:at]) + f"«{words[at]}»" + "".join(words[at + 1 :]), peak))
    return shown


def peak_tokens(path: str | Path) -> Int[Tensor, "d_sae k"]:
    """Return the peak token of each of a feature's top contexts, -1 where there is none."""
    ids = load_file(path)["contexts"].to(torch.int64)[:, :, -3]  # two tokens follow the peak
    return torch.where(ids == 65535, -1, ids)


def density(loaded, layer: int, dataset: str, *, rows: int = 500) -> Float[Tensor, " d_sae"]:
    """Return the share of tokens on which each feature is active: from the shipped feature cards, else counted on a data set."""
    from steerkit.training.harvest import token_rows

    card = card_path(loaded.preset.name, layer)
    if card.exists():
        return load_file(card)["density"].float()
    source = resolve(dataset) if resolve(dataset).exists() else dataset
    texts = torch.stack([row for _, row in zip(range(rows), token_rows(str(source), loaded.tokenizer))])
    found = fit(loaded.hf, loaded.tokenizer, {layer: loaded.sae(layer)}, texts, outlier=loaded.preset.outlier)
    return found[1][layer].float().cpu()


def density_source(preset: str, layer: int, dataset: str) -> str:
    """Say where `density` takes its numbers from."""
    if card_path(preset, layer).exists():
        return "of the shipped feature cards, counted on validation text"
    whose = ", which the embedded model wrote: give this preset plain text" if dataset.endswith("own_text.jsonl.gz") else ""
    return f"counted here, on {dataset}{whose}"


def card_path(preset: str, layer: int) -> Path:
    """Return where a preset's feature cards are, if it ships any."""
    return DATA / "saes" / preset / f"layer_{layer}" / "features.safetensors"


def top_context(path: str | Path, feature: int, tokenizer) -> str:
    """Return a feature's strongest context on one line, or nothing where a preset ships no feature cards."""
    return contexts(path, feature, tokenizer)[0][0].replace("\n", " ") if Path(path).exists() else ""


def main(argv: list[str] | None = None) -> None:
    """Measure a preset's SAEs on a data set's text: `python -m steerkit.training.quality smollm2-135m --dataset PATH_OR_HUB_ID`."""
    import argparse
    import re

    from steerkit.engine.packed import packed_linears
    from steerkit.models.lab import load_model, preset
    from steerkit.models.saes import load_sae
    from steerkit.training.harvest import token_rows

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("preset")
    parser.add_argument("--dataset", required=True, help="text that the SAEs did not see")
    parser.add_argument("--rows", type=int, default=500, help="rows of 128 tokens for FVU, L0, dead")
    parser.add_argument("--loss-rows", type=int, default=32, help="rows for the loss recovered")
    args = parser.parse_args(argv)
    spec = preset(args.preset)
    model, tokenizer = load_model(spec)
    chosen = spec.sae_set()
    saes = {layer: load_sae(spec, chosen, layer, hf=model) for layer in chosen.layers}
    rows = torch.stack([row for _, row in zip(range(args.rows), token_rows(args.dataset, tokenizer))])
    with packed_linears(model):
        table, _ = fit(model, tokenizer, saes, rows, outlier=spec.outlier)
        losses = loss_recovered(model, tokenizer, saes, rows[: args.loss_rows], outlier=spec.outlier)
    table = table.merge(losses.rename(columns={"rows": "loss_rows"}), on="layer")
    write_atomic(
        resolve(chosen.folder or DATA / "saes" / spec.name) / "quality.csv",
        table.to_csv(index=False, float_format="%.5g"),
    )
    shown = [
        "| layer | FVU | L0 | dead | loss recovered (zero) | loss recovered (mean) | tokens; rows for the loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in table.to_dict("records"):
        fvu, zero, mean = (f"{r[k]:.3f} [{r[k + '_low']:.3f}, {r[k + '_high']:.3f}]" for k in ("fvu", "recovered_zero", "recovered_mean"))
        shown.append(f"| {r['layer']} | {fvu} | {r['l0']:.1f} | {r['dead']:.2%} | {zero} | {mean} | {r['tokens']:,}; {r['loss_rows']} |")
    card, table_text = DATA / "README.md", "\n".join(shown)
    block = f"<!-- quality -->\n\n{table_text}\n\n<!-- end of quality -->"
    write_atomic(
        card,
        re.sub(
            r"<!-- quality -->(.*?<!-- end of quality -->)?",
            lambda _: block,
            card.read_text(),
            count=1,
            flags=re.DOTALL,
        ),
    )


if __name__ == "__main__":
    main()

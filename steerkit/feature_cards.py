"""Feature cards: how often each feature of an SAE fires, and the places of a text where it fires hardest; written, found, read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from steerkit.engine.lab import Place
from steerkit.features import read, token_batches, top_contexts
from steerkit.files import DATA, write_atomic
from steerkit.inputs import Whole

AFTER = 2  # tokens of a context behind its peak
NOWHERE = 65535  # the id of a place beyond the text, where ids are uint16; elsewhere -1


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
        where, value, place = top_contexts(f, t, k=k, after=AFTER)
        found = [value.cpu(), where.cpu(), owner[place].cpu()]
        best = found if best is None else [torch.cat(pair, 1) for pair in zip(best, found)]
        order = best[0].topk(k, dim=1).indices
        best = [part.gather(1, order if part.ndim == 2 else order[..., None].expand(-1, -1, part.shape[2])) for part in best]
    peaks, ids, documents = best
    small = int(ids.max()) < NOWHERE
    ids = torch.where(ids < 0, NOWHERE if small else -1, ids).to(torch.uint16 if small else torch.int32)
    card = {"density": fired / n, "contexts": ids, "peaks": peaks.half()} | ({"documents": documents.int()} if owners else {})
    if source_of:
        card["sources"] = torch.tensor([source_of.get(d, -1) for d in documents.flatten().tolist()]).view_as(documents).short()
    return write_atomic(path, to_bytes(card, {"tokens": str(n)}))


def card_path(preset: str, layer: int) -> Path:
    """Return where a preset's feature cards are, if it ships any."""
    return DATA / "saes" / preset / f"layer_{layer}" / "features.safetensors"


@torch.inference_mode()
def describe_on(at: Place, texts: Iterable[str], path: str | Path, *, k: int = 16) -> Path:
    """Write the card of a place's SAE on these texts, ordinary positions only: for SAEs without one, or for other places of a feature."""
    acts, tokens = [], []
    for ids, mask in token_batches(at.tokenizer, texts):
        resid, keep = read(at, ids, mask)
        acts.append(resid[keep].to(at.sae.W_dec.device))
        tokens.append(ids.to(keep.device)[keep].to(acts[-1].device))
    return describe(at.sae, [torch.cat(acts)], [torch.cat(tokens)], path, k=k)


def contexts(path: str | Path, feature: int, tokenizer) -> list[tuple[str, float]]:
    """Return a feature's top contexts as (text with the peak token in guillemets, peak activation)."""
    return [(f"{before}«{peak}»{after}", value) for before, peak, after, value in passages(path, [feature], tokenizer)[0]]


def passages(path: str | Path, features: Iterable[Whole], tokenizer) -> list[list[tuple[str, str, str, float]]]:
    """Return each feature's top contexts, strongest first: text before the peak token, the token, text after it, peak activation."""
    card = load_file(path)

    def text(ids: list[int]) -> str:
        return "".join("" if i in (NOWHERE, -1) else tokenizer.decode([i]) for i in ids)

    def of(feature: int) -> list[tuple[str, str, str, float]]:
        rows = zip(card["contexts"][feature].to(torch.int64).tolist(), card["peaks"][feature].tolist())
        return [(text(ids[: -1 - AFTER]), text(ids[-1 - AFTER : -AFTER]), text(ids[-AFTER:]), value) for ids, value in rows]

    return [of(int(feature)) for feature in features]


def top_context(path: str | Path, feature: int, tokenizer) -> str:
    """Return a feature's strongest context on one line, or nothing where a preset ships no feature cards."""
    return contexts(path, feature, tokenizer)[0][0].replace("\n", " ") if Path(path).exists() else ""


def peak_tokens(path: str | Path) -> Int[Tensor, "d_sae k"]:
    """Return the peak token of each of a feature's top contexts, -1 where there is none."""
    ids = load_file(path)["contexts"].to(torch.int64)[:, :, -1 - AFTER]
    return torch.where(ids == NOWHERE, -1, ids)

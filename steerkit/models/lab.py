"""Open a model and its SAEs from a preset (data/models.yaml); refuse a mismatch."""

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from steerkit.engine.cpu import choose_dtype
from steerkit.engine.steer import residual_blocks
from steerkit.engine.tokens import prompt_ids, text_ids
from steerkit.inputs import strings
from steerkit.models import fetch
from steerkit.models.check import record, self_check
from steerkit.models.presets import Preset, SaeSet, preset, presets
from steerkit.models.saes import centre_writing_weights, explain, load_sae, wants_centring
from steerkit.progress import quiet

__all__ = ["Loaded", "Preset", "SaeSet", "open", "preset", "presets", "self_check"]


class LazySaes(Mapping):
    """SAEs by layer, each loaded and checked on first use."""

    def __init__(self, layers: Iterable[int], load: Callable[[int], object], where: str, ready: dict[int, object]):
        self._layers, self._load, self._where, self._ready = tuple(layers), load, where, ready

    def __getitem__(self, layer: int):
        if layer not in self._layers:
            raise KeyError(f"{self._where}: no SAE for layer {layer}; layers with an SAE: {list(self._layers)}")
        if layer not in self._ready:
            self._ready[layer] = self._load(layer)
        return self._ready[layer]

    def __contains__(self, layer) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True)
class Loaded:
    """An open model.

    `hf`: the causal LM. `model`: a TransformerBridge that runs the same weights and the same torch hooks. `saes`: layer
    -> sae_lens SAE, loaded on first use. `checks`: one row per SAE checked so far (see `self_check`).
    """

    preset: Preset
    model: object
    hf: nn.Module
    tokenizer: object
    saes: Mapping[int, object]
    checks: list[dict]

    def sae(self, layer: int):
        """Return the SAE that reads the output of block `layer`; ValueError lists the layers that have one."""
        if layer not in self.saes:
            raise ValueError(f"{self.preset.name}: no SAE for layer {layer!r}; layers with an SAE: {list(self.saes)}")
        return self.saes[layer]

    def block(self, layer: int) -> nn.Module:
        """Return decoder block `layer` of `hf`; its output is `blocks.<layer>.hook_resid_post`."""
        blocks = residual_blocks(self.hf)
        if not 0 <= layer < len(blocks):
            raise ValueError(f"{self.preset.name}: expected a layer from 0 to {len(blocks) - 1}, got {layer}")
        return blocks[layer]

    def tokens(
        self, texts: Iterable[str], *, chat: bool = False, bos: bool = True
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Return (input_ids, attention_mask), left padded, on the model's device.

        bos puts the preset's beginning-of-text token in front, once. chat wraps each text as a user turn in the model's chat
        template, which sets its own first token. ValueError for an empty row or a model without a chat template.

        Example: `ids, mask = loaded.tokens(["I think", "Last night"])`.
        """
        tok, texts = self.tokenizer, strings("texts", texts)
        if chat and not tok.chat_template:
            raise ValueError(f"{self.preset.name}: expected a model with a chat template, got none; use chat=False")
        if chat:
            rows = [prompt_ids(tok, text, chat=True) for text in texts]
        else:
            rows = [text_ids(tok, text) if bos else list(tok(text, add_special_tokens=False)["input_ids"]) for text in texts]
        if not rows or not all(rows):
            raise ValueError("texts: expected at least one token in every row, got an empty one; add text or bos=True")
        width = max(map(len, rows))
        ids = torch.tensor([[tok.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self.hf.device), mask.to(self.hf.device)


def open(
    name: str | Preset,
    *,
    layers: Iterable[int] | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    check: bool = True,
    saes: str | None = None,
) -> Loaded:
    """Open a preset's model, tokenizer and SAEs.

    layers restricts the SAEs and loads them now; by default the primary layer's is loaded and the others on first use.
    device: "auto" is a GPU where there is one. dtype: the preset's by default; what "auto" and bfloat16 become is
    `choose_dtype`'s to say. saes picks a named SAE set. check compares each SAE, when it is loaded, with the recorded
    FVU and L0 (`self_check`).

    Raises ValueError for an unknown preset or set, a layer without an SAE, a damaged, non-finite or mismatched SAE;
    PermissionError or ConnectionError when the hub does not give the files.

    Example: `loaded = open("smollm2-135m"); resid = loaded.sae(13).W_dec`.
    """
    spec = name if isinstance(name, Preset) else preset(name)
    chosen = spec.sae_set(saes)
    primary = spec.primary_layer if spec.primary_layer in chosen.layers else chosen.layers[0]
    first = [primary] if layers is None else list(layers)
    if wrong := [layer for layer in first if layer not in chosen.layers]:
        raise ValueError(f"{spec.name}: no SAE for layer {wrong[0]!r}; layers with an SAE: {chosen.layers}")
    hf, tokenizer = load_model(spec, device=device, dtype=dtype)
    ready = {layer: load_sae(spec, chosen, layer, hf=hf) for layer in first}
    centred = {wants_centring(sae) for sae in ready.values()}
    if len(centred) > 1:
        raise ValueError(f"{spec.name}: SAEs of layers {first} disagree on centred weights; open them one by one")
    if True in centred:
        centre_writing_weights(hf)

    def load(layer: int):
        sae = load_sae(spec, chosen, layer, hf=hf)
        if centred and wants_centring(sae) not in centred:
            raise ValueError(f"{spec.name}: layer {layer}'s SAE wants other weights; use open(..., layers=[{layer}])")
        if check:
            loaded.checks.extend(self_check(loaded, {layer: sae}, chosen))
        return sae

    some = LazySaes(chosen.layers if layers is None else first, load, spec.name, ready)
    loaded = Loaded(spec, _bridge(spec, hf, tokenizer), hf, tokenizer, some, [])
    if check and ready:
        loaded.checks.extend(self_check(loaded, ready, chosen))
    return loaded


def load_model(spec: Preset, *, device: str = "auto", dtype: str | torch.dtype | None = None) -> tuple[nn.Module, object]:
    """Return (causal LM in eval mode, tokenizer with the preset's first token, a pad token and left padding)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    path = str(fetch.embedded(spec.package)) if spec.package else spec.hub
    dtype = choose_dtype(dtype or spec.dtype, device)
    for local in (True, False):  # what is on disk first, then the hub
        try:
            with quiet(local):  # the bar of a download stays
                hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=local)
                tok = AutoTokenizer.from_pretrained(path, local_files_only=local)
            break
        except Exception as error:
            if not (local and isinstance(error, OSError)):
                raise explain(error, f"the model {path}", spec) from error
    bos = {"own": tok.bos_token, "none": None}.get(spec.bos, spec.bos)
    if (bos is None and spec.bos == "own") or (bos is not None and bos not in tok.get_vocab()):
        raise ValueError(f"{spec.name}.bos: expected a token of this tokenizer, got {spec.bos!r}; see data/models.yaml")
    tok.bos_token, tok.padding_side = bos, "left"
    tok.pad_token = tok.pad_token or tok.eos_token
    return hf.to(device).eval(), tok


def _bridge(spec: Preset, hf: nn.Module, tokenizer):
    """Wrap `hf` in a TransformerBridge without slowing `hf` itself.

    The bridge replaces the modules it wraps, so it gets a copy of the module tree over the very same parameters.
    Model and blocks share their torch hooks with the copy: what is hooked on `hf` also acts in the bridge.
    """
    from transformer_lens.model_bridge import TransformerBridge

    twin = copy.deepcopy(hf, {id(t): t for t in (*hf.parameters(), *hf.buffers())})
    tok = copy.deepcopy(tokenizer)
    tok.init_kwargs |= {"add_bos_token": True, "name_or_path": spec.name}  # else the bridge loads another tokenizer
    bridge = TransformerBridge.boot_transformers(spec.hub or spec.name, hf_model=twin, tokenizer=tok, device=str(hf.device), dtype=hf.dtype)
    bridge.cfg.default_prepend_bos = tokenizer.bos_token is not None
    blocks = zip(residual_blocks(hf), residual_blocks(twin), strict=True)
    for ours, theirs in ((hf, twin), (hf.base_model, twin.base_model), *blocks):
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for table in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                if table in vars(ours):
                    vars(theirs)[table] = vars(ours)[table]
    return bridge


def main(argv: list[str]) -> None:
    """Run `python -m steerkit.models.lab record NAME [SET]`: measure every layer's FVU and L0, write data/models.yaml."""
    if len(argv) not in (2, 3) or argv[0] != "record":
        raise SystemExit("usage: python -m steerkit.models.lab record NAME [SAE_SET]")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_name = argv[2] if len(argv) == 3 else None
    spec = preset(argv[1])
    record(open(spec, layers=spec.sae_set(set_name).layers, check=False, saes=set_name), set_name)


if __name__ == "__main__":
    main(sys.argv[1:])

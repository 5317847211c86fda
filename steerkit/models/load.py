"""Open a model and its SAEs from a preset (data/models.yaml); refuse a mismatch."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from steerkit.engine.cpu import choose_dtype
from steerkit.engine.lab import Lab
from steerkit.engine.steer import residual_blocks
from steerkit.models import fetch
from steerkit.models.check import self_check
from steerkit.models.jumprelu import JumpReLU
from steerkit.models.presets import Preset, SaeSet, preset, presets
from steerkit.models.saes import centre_writing_weights, explain, load_sae, wants_centring
from steerkit.progress import quiet

__all__ = ["Lab", "Preset", "SaeSet", "bridge", "open", "preset", "presets", "self_check"]


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


def open(
    name: str | Preset,
    *,
    layers: Iterable[int] | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    check: bool = True,
    saes: str | Path | None = None,
) -> Lab:
    """Open a preset's model, tokenizer and SAEs.

    layers restricts the SAEs and loads them now; by default the primary layer's is loaded and the others on first use.
    device: "auto" is a GPU where there is one. dtype: the preset's by default; what "auto" and bfloat16 become is
    `choose_dtype`'s to say. saes picks a named SAE set, or as a Path a folder of your own (layer_N, JumpReLU in sae_lens's disk
    format, which is then not needed to read them). check compares each SAE, when it is loaded, with the recorded
    FVU and L0 (`self_check`).

    Raises ValueError for an unknown preset or set, a layer without an SAE, a damaged, non-finite or mismatched SAE;
    PermissionError or ConnectionError when the hub does not give the files.

    Example: `lab = open("smollm2-135m"); at = lab.at(13)`.
    """
    spec = name if isinstance(name, Preset) else preset(name)
    chosen = spec.sae_set(saes)
    primary = spec.primary_layer if spec.primary_layer in chosen.layers else chosen.layers[0]
    first = [primary] if layers is None else list(layers)
    if wrong := [layer for layer in first if layer not in chosen.layers]:
        raise ValueError(f"{spec.name}: no SAE for layer {wrong[0]!r}; layers with an SAE: {chosen.layers}")
    hf, tokenizer = load_model(spec, device=device, dtype=dtype)

    def read(layer: int):
        return JumpReLU(saes / chosen.sae_id(layer), hf.device) if isinstance(saes, Path) else load_sae(spec, chosen, layer, hf=hf)

    ready = {layer: read(layer) for layer in first}
    centred = {wants_centring(sae) for sae in ready.values()}
    if len(centred) > 1:
        raise ValueError(f"{spec.name}: SAEs of layers {first} disagree on centred weights; open them one by one")
    if True in centred:
        centre_writing_weights(hf)

    def load(layer: int):
        sae = read(layer)
        if centred and wants_centring(sae) not in centred:
            raise ValueError(f"{spec.name}: layer {layer}'s SAE wants other weights; use open(..., layers=[{layer}])")
        if check:
            lab.checks.extend(self_check(lab, {layer: sae}, chosen))
        return sae

    some = LazySaes(chosen.layers if layers is None else first, load, spec.name, ready)
    lab = Lab(spec, hf, tokenizer, some)
    if check and ready:
        lab.checks.extend(self_check(lab, ready, chosen))
    return lab


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
    if torch.device(device).type == "cuda":
        # From torch 2.11 on a Hopper GPU's first choice; it plans anew for every shape, and each step of a decode has its own.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return hf.to(device).eval(), tok


def bridge(lab: Lab):
    """Return a TransformerBridge over the weights of an open model, for those who think in TransformerLens's hook names.

    The bridge replaces the modules it wraps, so it gets a copy of the module tree over the very same parameters.
    Model and blocks share their torch hooks with the copy: what is hooked on `hf` also acts in the bridge.
    """
    from transformer_lens.model_bridge import TransformerBridge

    spec, hf, tokenizer = lab.preset, lab.hf, lab.tokenizer
    twin = copy.deepcopy(hf, {id(t): t for t in (*hf.parameters(), *hf.buffers())})
    tok = copy.deepcopy(tokenizer)
    tok.init_kwargs |= {"add_bos_token": True, "name_or_path": spec.name}  # else the bridge loads another tokenizer
    found = TransformerBridge.boot_transformers(spec.hub or spec.name, hf_model=twin, tokenizer=tok, device=str(hf.device), dtype=hf.dtype)
    found.cfg.default_prepend_bos = tokenizer.bos_token is not None
    blocks = zip(residual_blocks(hf), residual_blocks(twin), strict=True)
    for ours, theirs in ((hf, twin), (hf.base_model, twin.base_model), *blocks):
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            for table in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                if table in vars(ours):
                    vars(theirs)[table] = vars(ours)[table]
    return found

"""Load one SAE of a preset, and make the model's weights what the SAE was trained on."""

import torch
from torch import nn

from steerkit.files import resolve
from steerkit.models.presets import Preset, SaeSet

NO_LICENCE = "smollm2-135m (embedded), gpt2-small, pythia-70m, qwen3-1.7b"
REFUSED = {"GatedRepoError", "RepositoryNotFoundError", "DisabledRepoError"}
UNREACHABLE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
    "HfHubHTTPError",
}


def load_sae(spec: Preset, chosen: SaeSet, layer: int, *, hf: nn.Module):
    """Return one layer's SAE in float32 on the model's device; ValueError unless whole, finite and for this place."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    name, device = chosen.sae_id(layer), str(hf.device)
    what = f"the SAE of layer {layer} ({chosen.release or chosen.folder}, {name})"
    try:
        if chosen.folder:
            sae = SAE.load_from_disk(resolve(chosen.folder) / name, device=device, dtype="float32")
        else:
            gemma_3 = get_pretrained_saes_directory()[chosen.release].conversion_func == "gemma_3"
            sae = SAE.from_pretrained(chosen.release, name, device=device, converter=_gemma_3 if gemma_3 else None)
    except Exception as error:
        raise explain(error, what, spec) from error
    what = f"{spec.name}: {what}"
    if bad := [n for n, w in sae.named_parameters() if not torch.isfinite(w).all()]:
        raise ValueError(f"{what}: expected finite weights, got NaN or infinity in {', '.join(bad)}; fetch it again")
    d_model = hf.get_input_embeddings().weight.shape[1]
    if sae.cfg.d_in != d_model:
        raise ValueError(f"{what}: expected width {d_model} (d_model), got {sae.cfg.d_in}: it belongs to another model")
    hook = sae.cfg.metadata.hook_name
    if hook not in (f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre"):
        raise ValueError(f"{what}: expected one for blocks.{layer}.hook_resid_post, got {hook}; correct its id")
    return sae.eval().requires_grad_(False)


def _gemma_3(repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: dict) -> tuple:
    """Read a Gemma Scope 2 residual SAE. sae_lens's own reader asks the hub for shapes, so it cannot work offline."""
    from huggingface_hub import hf_hub_download
    from sae_lens.loading.pretrained_sae_loaders import load_safetensors_weights

    path = hf_hub_download(repo_id, f"{folder_name}/params.safetensors", force_download=force_download)
    state = load_safetensors_weights(path, device=device, dtype="float32")
    state = {key.replace("w_", "W_"): value for key, value in state.items()}
    layer = folder_name.split("layer_")[1].split("_")[0]
    cfg = {
        "architecture": "jumprelu",
        "d_in": state["W_enc"].shape[0],
        "d_sae": state["W_enc"].shape[1],
        "model_name": repo_id.replace("gemma-scope-2", "gemma-3").removesuffix("-pt"),
        "prepend_bos": True,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    return cfg | cfg_overrides, state, None


def explain(error: Exception, what: str, spec: Preset) -> Exception:
    """Turn a loader's error into one that says what was expected, what happened and what to do."""
    chain, link = [], error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds, text = {type(e).__name__ for e in chain}, " ".join(map(str, chain)).lower()
    got = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else '(no message)'}"
    if kinds & REFUSED or "gated repo" in text or "unauthorized" in text:
        return PermissionError(
            f"{spec.name}: expected to read {what} from the model hub, got refused ({got}). Accept its licence on its "
            f"hub page, then run `hf auth login` or set HF_TOKEN. Presets that need no licence: {NO_LICENCE}."
        )
    if kinds & UNREACHABLE:
        gated = " It also needs an accepted licence and HF_TOKEN." if spec.needs.gated else ""
        return ConnectionError(
            f"{spec.name}: expected {what} in the local hub cache or on the model hub, got neither ({got}). Check the "
            f"network and HF_HUB_OFFLINE, or copy a filled hub cache here and set HF_HOME.{gated} "
            "Works without the hub: smollm2-135m."
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{spec.name}: expected {what}, got no file ({got}). Restore data/ from version control or train it.")
    return ValueError(
        f"{spec.name}: expected {what} to be whole, got {got}. The file is damaged or of another format: delete it "
        "from the hub cache so that it is fetched again, or restore data/ from version control."
    )


def wants_centring(sae) -> bool:
    """Say whether the SAE was trained on centred writing weights; any other demand on the weights is a ValueError."""
    kwargs = sae.cfg.metadata.model_from_pretrained_kwargs if hasattr(sae, "cfg") else {}
    wants = {k: v for k, v in (kwargs or {}).items() if v and "dtype" not in k}
    if unknown := set(wants) - {"center_writing_weights"}:
        raise ValueError(
            "weight processing: expected at most center_writing_weights, got an SAE that demands "
            f"{', '.join(sorted(unknown))}; use another SAE set"
        )
    return bool(wants)


@torch.no_grad()
def centre_writing_weights(hf: nn.Module) -> None:
    r"""Centre all that GPT-2 writes to the residual stream: $W \leftarrow W - \mathrm{mean}_{d_{model}} W$.

    Embeddings, attention and MLP output weights and biases change in place. The LayerNorms remove that mean anyway, so
    logits stay; the unembedding, tied to the embedding in GPT-2, is untied first. ValueError for other architectures.
    """
    if hf.config.model_type != "gpt2":
        raise ValueError(f"centred weights: expected a GPT-2 model, got {hf.config.model_type}; use another SAE set")
    hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())
    hf.config.tie_word_embeddings = False
    outputs = [out for block in hf.transformer.h for out in (block.attn.c_proj, block.mlp.c_proj)]
    written = [hf.transformer.wte.weight, hf.transformer.wpe.weight, *(w for m in outputs for w in (m.weight, m.bias))]
    for weight in written:
        weight -= weight.mean(-1, keepdim=True)

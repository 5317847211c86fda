"""Small random models, a small offline tokenizer, and SAE files in every public format, in a local hub cache."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

D_MODEL = 64
VOCAB = 260
ARCHITECTURES = {  # preset -> (kind of tiny model, blocks so that the primary layer exists)
    "gemma-2-2b": ("gemma2", 13),
    "gemma-3-270m": ("gemma3", 10),
    "llama-3.1-8b": ("llama", 16),
    "qwen3-1.7b": ("qwen3", 14),
    "gpt2-small": ("gpt2", 8),
    "pythia-70m": ("gptneox", 5),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def tokenizer(*, bos: bool = True):
    """Return a byte-level fast tokenizer (259 tokens) with <bos>, <eos>, <pad>, left padding and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>"]
    vocab = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in special])
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE if bos else CHAT_TEMPLATE.replace("{{ bos_token }}", ""),
    )
    return tok


def config(kind: str, *, n_layers: int = 3, d_model: int = D_MODEL, vocab: int = VOCAB):
    """Return the transformers config of a small model: gemma2, gemma3, llama, qwen3, gpt2 or gptneox."""
    import transformers as tf

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": vocab}
    heads = {"num_attention_heads": 4, "num_hidden_layers": n_layers, "hidden_size": d_model}
    heads["max_position_embeddings"] = 512
    grouped = {**tokens, **heads, "num_key_value_heads": 2, "intermediate_size": 2 * d_model}
    match kind:
        case "gemma2":
            return tf.Gemma2Config(**grouped, head_dim=16, sliding_window=16, query_pre_attn_scalar=16)
        case "gemma3":
            return tf.Gemma3TextConfig(**grouped, head_dim=16, sliding_window=16, query_pre_attn_scalar=16)
        case "llama":
            return tf.LlamaConfig(**grouped)
        case "qwen3":
            return tf.Qwen3Config(**grouped, head_dim=16)
        case "gpt2":
            return tf.GPT2Config(**tokens, n_layer=n_layers, n_embd=d_model, n_head=4, n_positions=512)
        case "gptneox":
            return tf.GPTNeoXConfig(**tokens, **heads, intermediate_size=2 * d_model)
    raise ValueError(f"no tiny model of kind {kind!r}: gemma2, gemma3, llama, qwen3, gpt2, gptneox")


def model(kind: str, *, seed: int = 0, **sizes):
    """Return a small random causal LM in float32 and eval mode; weights large enough that tokens matter."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config(kind, **sizes), dtype=torch.float32).eval()
    hf.config.architectures = [type(hf).__name__]
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.ndim == 2:
                size = 0.5 if "emb" in name or "wte" in name else 0.15
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
            elif "bias" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return hf


def planted(d_model: int = D_MODEL) -> dict[str, torch.Tensor]:
    """Return SAE weights that rebuild any input: one feature for each sign of each coordinate (L0 = d_model)."""
    eye = torch.eye(d_model)
    return {
        "W_enc": torch.cat([eye, -eye], dim=1),
        "W_dec": torch.cat([eye, -eye]),
        "b_enc": torch.zeros(2 * d_model),
        "b_dec": torch.zeros(d_model),
        "threshold": torch.zeros(2 * d_model),
    }


def snapshot(cache: Path, repo: str) -> Path:
    """Return the folder of a repository's files in a local hub cache, with its ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text("0" * 40)
    return folder


def put_model(cache: Path, repo: str, kind: str, *, bos: bool = True, **sizes):
    """Put a tiny model and its tokenizer into the cache under a real model's name; return the model."""
    hf = model(kind, **sizes)
    hf.save_pretrained(snapshot(cache, repo))
    tokenizer(bos=bos).save_pretrained(snapshot(cache, repo))
    return hf


def put_sae(cache: Path, release: str, sae_id: str, weights: dict[str, torch.Tensor], **cfg) -> Path:
    """Write SAE weights in the format of a sae_lens release, where its loader looks; return the weights file."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory()[release]
    folder = snapshot(cache, entry.repo_id) / entry.saes_map[sae_id]
    d_in, d_sae = weights["W_enc"].shape
    (folder.parent if entry.conversion_func == "qwen_scope" else folder).mkdir(parents=True, exist_ok=True)
    match entry.conversion_func:
        case "gemma_2":
            np.savez(folder / "params.npz", **{name: w.numpy() for name, w in weights.items()})
            return folder / "params.npz"
        case "gemma_3":
            layer = int(sae_id.split("_")[1])
            about = {"architecture": "jump_relu", "model_name": entry.model}
            about["hf_hook_point_in"] = f"model.layers.{layer}.output"
            (folder / "config.json").write_text(json.dumps(about | cfg))
            save_file({name.lower(): w for name, w in weights.items()}, folder / "params.safetensors")
            return folder / "params.safetensors"
        case "llama_scope":
            layer = int(sae_id[1:].split("r_")[0])
            about = {
                "d_model": d_in,
                "d_sae": d_sae,
                "jump_relu_threshold": float(weights["threshold"][0]),
                "dataset_average_activation_norm": {"in": 10.0},
                "hook_point_in": f"blocks.{layer}.hook_resid_post",
            }
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "hyperparams.json").write_text(json.dumps(about | cfg))
            state = {"encoder.weight": weights["W_enc"].T, "encoder.bias": weights["b_enc"]}
            state |= {"decoder.weight": weights["W_dec"].T, "decoder.bias": weights["b_dec"]}
            save_file({name: w.contiguous() for name, w in state.items()}, folder / "checkpoints" / "final.safetensors")
            return folder / "checkpoints" / "final.safetensors"
        case "qwen_scope":
            state = {n: w.T.contiguous() if w.ndim == 2 else w for n, w in weights.items() if n != "threshold"}
            torch.save(state, folder)  # the format these SAEs are published in
            return folder
        case None:  # sae_lens before version 6, as gpt2-small-res-jb and the Pythia SAEs are published
            about = {
                "model_name": entry.model,
                "hook_point": sae_id,
                "hook_point_layer": 0,
                "d_in": d_in,
                "d_sae": d_sae,
                "dtype": "torch.float32",
                "device": "cpu",
                "activation_fn_str": "relu",
                "prepend_bos": True,
            }
            (folder / "cfg.json").write_text(json.dumps(about | cfg))
            save_file({n: w for n, w in weights.items() if n != "threshold"}, folder / "sae_weights.safetensors")
            return folder / "sae_weights.safetensors"
    raise ValueError(f"no writer for the format {entry.conversion_func!r}")


def put_disk_sae(folder: Path, layer: int, weights: dict[str, torch.Tensor], *, metadata: dict | None = None) -> Path:
    """Write a JumpReLU SAE in sae_lens's disk format with float16 weights, as the embedded SAEs are kept."""
    d_in, d_sae = weights["W_enc"].shape
    folder.mkdir(parents=True, exist_ok=True)
    about = {"hook_name": f"blocks.{layer}.hook_resid_post", "sae_lens_version": "6.54.12"} | (metadata or {})
    cfg = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": about,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({name: w.half() for name, w in weights.items()}, folder / "sae_weights.safetensors")
    return folder / "sae_weights.safetensors"


def offline_hub(monkeypatch, cache: Path) -> Path:
    """Point huggingface_hub at `cache` and cut it off from the network for one test."""
    import huggingface_hub.constants as constants

    cache.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def shrink(monkeypatch, release: str, d_in: int = D_MODEL, d_sae: int = 2 * D_MODEL) -> None:
    """Tell sae_lens's registry the small sizes, for the releases whose loaders know only the published ones."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory()[release]
    sizes = {"d_in": d_in, "d_sae": d_sae}
    if entry.conversion_func == "qwen_scope":
        sizes["activation_fn_kwargs"] = {"k": d_in}
    monkeypatch.setattr(entry, "config_overrides", (entry.config_overrides or {}) | sizes)


def plant(monkeypatch, hub: Path, name: str, *, layers=None, weights=None, **cfg):
    """Fill the cache for a preset with a tiny model and SAEs that rebuild anything; return the preset and the model."""
    from steerkit.models.presets import preset

    spec, (kind, depth) = preset(name), ARCHITECTURES[name]
    chosen = spec.sae_set()
    hf = put_model(hub, spec.hub, kind, n_layers=depth, bos=spec.bos == "own")
    shrink(monkeypatch, chosen.release)
    for layer in layers or [spec.primary_layer]:
        put_sae(hub, chosen.release, chosen.sae_id(layer), weights or planted(), **cfg)
    return spec, hf


def local_preset(hub: Path, folder: Path, *, layers=(0, 1, 2), weights=None, metadata=None, **change):
    """Return a preset over a tiny Llama with SAEs in sae_lens's disk format."""
    from steerkit.models.presets import SaeSet, preset

    put_model(hub, "tiny/llama", "llama", n_layers=3)
    for layer in layers:
        put_disk_sae(folder / "saes" / f"layer_{layer}", layer, weights or planted(), metadata=metadata)
    chosen = SaeSet(id="layer_{layer}", layers=list(layers), folder=str(folder / "saes"))
    change |= {"name": "tiny", "hub": "tiny/llama", "primary_layer": layers[0], "saes": {"own": chosen}}
    return dataclasses.replace(preset("pythia-70m"), **change)


def planted_sae(d_model: int = D_MODEL):
    """Return a sae_lens SAE with the planted weights."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_model, d_sae=2 * d_model, dtype="float32", device="cpu"))
    sae.load_state_dict(planted(d_model))
    return sae.eval()


def lab(kind: str = "llama", *, saes: dict | None = None, hf=None, tok=None, outlier: float = 10.0, **sizes):
    """Return an open tiny model with a planted SAE at layer 1, or with the SAEs, model and tokenizer given."""
    from steerkit.engine.lab import Lab

    spec = SimpleNamespace(name="tiny", primary_layer=1, outlier=outlier)
    return Lab(spec, hf or model(kind, **sizes), tok or tokenizer(), {1: planted_sae()} if saes is None else saes)

"""SAEs against sae_lens and TransformerLens, and those that do not belong to the model."""

import shutil

import pytest
import tiny
import torch

from steerkit.features import residuals
from steerkit.models import load
from steerkit.models.saes import centre_writing_weights


def test_gemma_3_reader_agrees_with_sae_lens(hub, monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(w.shape, generator=generator) for name, w in tiny.planted().items()}
    spec, _ = tiny.plant(monkeypatch, hub, "gemma-3-270m", weights=weights)
    ours = load.open("gemma-3-270m", check=False).sae(9)

    def shapes(repo, filename):
        with safe_open(tiny.snapshot(hub, repo) / filename, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    theirs = SAE.from_pretrained(spec.sae_set().release, spec.sae_set().sae_id(9))
    x = torch.randn(5, tiny.D_MODEL)
    assert torch.equal(ours.encode(x), theirs.encode(x)) and torch.equal(ours(x), theirs(x))
    for key in ("hook_name", "model_name", "prepend_bos"):
        assert getattr(ours.cfg.metadata, key) == getattr(theirs.cfg.metadata, key)


def test_centred_gpt2_equals_transformer_lens(hub, monkeypatch):
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    source = tiny.model("gpt2", n_layers=8)
    cfg = HookedTransformerConfig(
        n_layers=8,
        d_model=tiny.D_MODEL,
        n_ctx=512,
        d_head=16,
        n_heads=4,
        d_mlp=4 * tiny.D_MODEL,
        act_fn="gelu_new",
        d_vocab=tiny.VOCAB,
        normalization_type="LN",
        eps=1e-5,
        device="cpu",
        original_architecture="GPT2LMHeadModel",
    )
    oracle = HookedTransformer(cfg)
    oracle.load_and_process_state_dict(
        convert_gpt2_weights(source, cfg),
        fold_ln=False,
        center_writing_weights=True,
        center_unembed=False,
        fold_value_biases=False,
    )
    tiny.plant(monkeypatch, hub, "gpt2-small")
    lab = load.open("gpt2-small")
    assert lab.sae(7).cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    ids, _ = lab.tokens(["Centred weights change nothing that is read."])
    with torch.no_grad():
        _, expected = oracle.run_with_cache(ids)
        _, cache = load.bridge(lab).run_with_cache(ids)
        mine = residuals(lab.hf, ids, torch.ones_like(ids), layers=list(range(8)))
        log_probs = [m(ids).logits.log_softmax(-1) for m in (lab.hf, source)]
        uncentred = source(ids, output_hidden_states=True).hidden_states[1:]
    for layer in range(8):
        want = expected[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(mine[layer], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], want, atol=1e-4, rtol=1e-4)
        assert mine[layer].mean(-1).abs().max() < 1e-4 < uncentred[layer].mean(-1).abs().max()
    torch.testing.assert_close(*log_probs, atol=1e-4, rtol=1e-4)


def test_other_demands_are_refused(hub, tmp_path):
    fold = {"model_from_pretrained_kwargs": {"fold_ln": True}}
    with pytest.raises(ValueError, match="demands fold_ln"):
        load.open(tiny.local_preset(hub, tmp_path, metadata=fold))
    centre = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with pytest.raises(ValueError, match="expected a GPT-2 model, got llama"):
        load.open(tiny.local_preset(hub, tmp_path, metadata=centre))
    off = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    assert load.open(tiny.local_preset(hub, tmp_path, metadata=off)).checks
    with pytest.raises(ValueError, match="expected a GPT-2 model"):
        centre_writing_weights(tiny.model("gptneox"))


def test_width_mismatch(hub, tmp_path):
    with pytest.raises(ValueError, match=r"expected width 64 \(d_model\), got 32"):
        load.open(tiny.local_preset(hub, tmp_path, weights=tiny.planted(32)))


def test_nan_weights(hub, tmp_path):
    weights = tiny.planted()
    weights["W_dec"][3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in W_dec"):
        load.open(tiny.local_preset(hub, tmp_path, weights=weights), check=False)


def test_sae_of_another_hook(hub, tmp_path):
    with pytest.raises(ValueError, match=r"expected one for blocks.0.hook_resid_post, got blocks.2.hook_mlp_out"):
        load.open(tiny.local_preset(hub, tmp_path, metadata={"hook_name": "blocks.2.hook_mlp_out"}))


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-270m", "llama-3.1-8b", "qwen3-1.7b", "gpt2-small"])
def test_truncated_sae_file(name, hub, monkeypatch):
    spec, _ = tiny.plant(monkeypatch, hub, name)
    chosen = spec.sae_set()
    path = tiny.put_sae(hub, chosen.release, chosen.sae_id(spec.primary_layer), tiny.planted())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}: expected the SAE of layer {spec.primary_layer}.*damaged or of"):
        load.open(name)


def test_missing_embedded_sae(hub, tmp_path):
    spec = tiny.local_preset(hub, tmp_path)
    shutil.rmtree(tmp_path / "saes" / "layer_0")
    with pytest.raises(FileNotFoundError, match="Restore data/ from version control"):
        load.open(spec)

"""Opening a preset against plain transformers, planted SAEs and TransformerLens; what cannot be opened says why."""

import pytest
import tiny
import torch

from steerkit.files import DATA
from steerkit.models import load

torch.set_num_threads(1)
TEXTS = ["The ferry leaves at seven.", "Rain"]


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_open_from_local_hub_cache(name, hub, monkeypatch):
    spec, source = tiny.plant(monkeypatch, hub, name)
    lab = load.open(name, dtype="float32")
    bridge = load.bridge(lab)
    layer = spec.primary_layer
    row = lab.checks[0]
    assert row["layer"] == layer and row["fvu"] < 1e-6 and row["l0"] == pytest.approx(tiny.D_MODEL, abs=0.01)
    sae = lab.sae(layer)
    assert tuple(sae.W_dec.shape) == (2 * tiny.D_MODEL, tiny.D_MODEL) and sae.W_dec.dtype == torch.float32

    ids, mask = lab.tokens(TEXTS)
    seen = {}
    handles = [
        lab.block(at).register_forward_hook(lambda _m, _i, out, at=at: seen.__setitem__(at, out[0] if isinstance(out, tuple) else out))
        for at in range(tiny.ARCHITECTURES[name][1])
    ]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = lab.hf(input_ids=ids, attention_mask=mask, position_ids=position).logits
        plain = dict(seen)
        bridged, cache = bridge.run_with_cache(ids, attention_mask=mask)
        expected = source(input_ids=ids, attention_mask=mask, position_ids=position).logits
    for handle in handles:
        handle.remove()
    real = mask.bool()
    for at, resid in plain.items():
        torch.testing.assert_close(cache[f"blocks.{at}.hook_resid_post"][real], resid[real], atol=1e-4, rtol=1e-4)
        assert torch.equal(cache[f"blocks.{at}.hook_resid_post"], seen[at])  # the same torch hook, run by the bridge
    torch.testing.assert_close(logits[real], expected[real], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(bridged[real], logits[real], atol=1e-3, rtol=1e-4)
    assert lab.tokenizer.padding_side == "left"
    assert lab.tokenizer.bos_token == (None if spec.bos == "none" else "<bos>")
    embedding = lab.hf.get_input_embeddings().weight
    assert any(p is embedding for p in bridge.original_model.parameters())


def test_a_hook_on_the_model_also_acts_in_the_bridge(hub, tmp_path):
    lab = load.open(tiny.local_preset(hub, tmp_path), check=False)
    bridge = load.bridge(lab)
    ids, _ = lab.tokens(["one row"])
    before = bridge(ids)
    handle = lab.block(1).register_forward_hook(lambda _m, _i, out: out + 1.0 if torch.is_tensor(out) else (out[0] + 1.0, *out[1:]))
    steered, through_hf = bridge(ids), lab.hf(ids).logits
    handle.remove()
    assert (steered - before).abs().max() > 0.01
    torch.testing.assert_close(steered, through_hf, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bridge(ids), before)


def test_saes_load_when_first_used(hub, monkeypatch):
    spec, _ = tiny.plant(monkeypatch, hub, "gemma-2-2b", layers=[12, 3])
    lab = load.open("gemma-2-2b")
    assert [row["layer"] for row in lab.checks] == [12] and list(lab.saes) == spec.layers
    lab.sae(3)
    assert [row["layer"] for row in lab.checks] == [12, 3]
    assert lab.sae(3) is lab.saes[3]
    restricted = load.open("gemma-2-2b", layers=[3])
    assert list(restricted.saes) == [3] and [row["layer"] for row in restricted.checks] == [3]
    with pytest.raises(ValueError, match=r"no SAE for layer 12; layers with an SAE: \[3\]"):
        restricted.sae(12)
    with pytest.raises(ValueError, match="no SAE for layer 40"):
        load.open("gemma-2-2b", layers=[40])
    with pytest.raises(ValueError, match="expected a layer from 0 to 12, got 13"):
        lab.block(13)


def test_hub_out_of_reach(hub):
    with pytest.raises(ConnectionError, match=r"gemma-2-2b.*neither.*HF_TOKEN.*Works without the hub: smollm2-135m"):
        load.open("gemma-2-2b")
    tiny.put_model(hub, load.preset("gpt2-small").hub, "gpt2", n_layers=8)
    with pytest.raises(ConnectionError, match="SAE of layer 7"):
        load.open("gpt2-small")


def test_gated_repository(hub, monkeypatch):
    import transformers

    def refuse(*_args, **_kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(PermissionError, match=r"Accept its licence.*HF_TOKEN.*gpt2-small"):
        load.open("llama-3.1-8b")


def test_unknown_dtype(hub, tmp_path):
    with pytest.raises(ValueError, match=r"expected auto or a floating dtype of torch such as float32 or bfloat16, got 'fp99'"):
        load.open(tiny.local_preset(hub, tmp_path), dtype="fp99")


def test_bos_token_of_the_preset_must_exist(hub, tmp_path):
    with pytest.raises(ValueError, match=r"bos: expected a token of this tokenizer, got '<\|endoftext\|>'"):
        load.open(tiny.local_preset(hub, tmp_path, bos="<|endoftext|>"))


@pytest.mark.embedded
def test_embedded_model():
    """SmolLM2-135M as the design states it; the recorded first token lowers the loss; hf and bridge agree."""
    spec = load.preset("smollm2-135m")
    hf, tok = load.load_model(spec)
    c = hf.config
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.vocab_size) == (576, 30, 9, 49152)
    assert tok.bos_token == "<|endoftext|>" and next(hf.parameters()).dtype == torch.float32
    text = (DATA / "check_texts.txt").read_text().splitlines()[0]
    ids = tok(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    losses = {}
    heads = {"none": [], "bos": [tok.bos_token_id], "chat": [tok.convert_tokens_to_ids("<|im_start|>")]}
    for name, head in heads.items():
        row = torch.cat([torch.tensor([head], dtype=torch.long).reshape(1, -1), ids], dim=1)
        with torch.no_grad():
            log_probs = hf(row).logits[0].log_softmax(-1)
        start = row.shape[1] - ids.shape[1] + 1  # score the same tokens in all three
        losses[name] = -float(log_probs[start - 1 : -1].gather(1, row[0, start:, None]).mean())
    assert 2.0 < losses["bos"] < 4.0 and losses["bos"] < losses["chat"], losses


@pytest.mark.embedded
def test_a_folder_of_ones_own_saes_opens_in_place_of_the_presets(tmp_path):
    own = DATA / "saes" / "smollm2-135m"
    theirs, ours = (load.open("smollm2-135m", layers=[3, 28], saes=saes) for saes in (None, own))
    assert list(ours.saes) == [3, 28] and [row["layer"] for row in ours.checks] == [3, 28]
    x = torch.randn(5, ours.at(3).d_model, generator=torch.Generator().manual_seed(0))
    for layer in (3, 28):
        torch.testing.assert_close(ours.sae(layer).encode(x), theirs.sae(layer).encode(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected a folder of SAEs named layer_<number>"):
        load.open("smollm2-135m", saes=tmp_path)

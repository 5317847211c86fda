"""Presets against sae_lens's registry and the papers' numbers; opening against plain transformers and planted SAEs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
import yaml

from steerkit.features import ordinary_positions, residuals
from steerkit.files import DATA, ROOT
from steerkit.models import check as selfcheck
from steerkit.models import lab as models
from steerkit.models.presets import presets
from steerkit.models.saes import centre_writing_weights

torch.set_num_threads(1)
ARCHITECTURES = {  # preset -> (kind of tiny model, blocks so that the primary layer exists)
    "gemma-2-2b": ("gemma2", 13),
    "gemma-3-270m": ("gemma3", 10),
    "llama-3.1-8b": ("llama", 16),
    "qwen3-1.7b": ("qwen3", 14),
    "gpt2-small": ("gpt2", 8),
    "pythia-70m": ("gptneox", 5),
}
TEXTS = ["The ferry leaves at seven.", "Rain"]


def registry():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return tiny.offline_hub(monkeypatch, tmp_path / "hub")


def plant(monkeypatch, hub, name, *, layers=None, weights=None, n_layers=None, **cfg):
    """Fill the cache for a preset with a tiny model and SAEs that rebuild anything; return the preset and the model."""
    spec = models.preset(name)
    kind, depth = ARCHITECTURES[name]
    chosen = spec.sae_set()
    hf = tiny.put_model(hub, spec.hub, kind, n_layers=n_layers or depth, bos=spec.bos == "own")
    tiny.shrink(monkeypatch, chosen.release)
    for layer in layers or [spec.primary_layer]:
        tiny.put_sae(hub, chosen.release, chosen.sae_id(layer), weights or tiny.planted(), **cfg)
    return spec, hf


def local_preset(tmp_path, monkeypatch, hub, *, layers=(0, 1, 2), weights=None, metadata=None, **change):
    """Return a preset over a tiny Llama with SAEs in sae_lens's disk format."""
    tiny.put_model(hub, "tiny/llama", "llama", n_layers=3)
    for layer in layers:
        tiny.put_disk_sae(tmp_path / "saes" / f"layer_{layer}", layer, weights or tiny.planted(), metadata=metadata)
    chosen = models.SaeSet(id="layer_{layer}", layers=list(layers), folder=str(tmp_path / "saes"))
    change |= {"name": "tiny", "hub": "tiny/llama", "primary_layer": layers[0], "saes": {"own": chosen}}
    return dataclasses.replace(models.preset("pythia-70m"), **change)


# --- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets())
def test_sae_ids_exist_in_sae_lens_registry(name):
    for chosen in models.preset(name).saes.values():
        if chosen.folder:
            continue
        entry = registry()[chosen.release]
        for layer in chosen.layers:
            assert chosen.sae_id(layer) in entry.saes_map, (name, chosen.release, layer)


def test_layers_cover_the_release():
    """A preset that lists all layers lists all that the release has: counted from the registry, not from the preset."""
    for name, count in {"gemma-2-2b": 26, "gemma-2-9b": 42, "llama-3.1-8b": 32, "qwen3-1.7b": 28}.items():
        chosen = models.preset(name).sae_set()
        width = "width_16k" if "gemma" in name else ""
        assert len(chosen.layers) == count == sum(width in sae_id for sae_id in registry()[chosen.release].saes_map)


def test_papers_published_sparsity():
    """L0 in the papers: SAE-TS 82 (2B) and 130 (9B) at layer 12; Concept500 SAEs of 9B-it 81 and 109."""
    known = [("gemma-2-2b", 12, 82), ("gemma-2-9b", 12, 130), ("gemma-2-9b-it", 20, 81), ("gemma-2-9b-it", 31, 109)]
    for name, layer, l0 in known:
        assert models.preset(name).sae_set().published_l0(layer) == l0
    for name, l0 in [("gemma-2-2b", 82), ("gemma-2-9b", 130)]:
        assert models.preset(name).sae_set("sae_ts").published_l0(12) == l0


def test_sae_hooks_are_block_outputs():
    assert models.preset("gpt2-small").sae_set().sae_id(7) == "blocks.8.hook_resid_pre"
    assert models.preset("gpt2-small").sae_set().sae_id(11) == "blocks.11.hook_resid_post"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(colour="red"), "unknown key colour"),
        (lambda p: p["needs"].pop("vram_gb"), "missing key vram_gb"),
        (lambda p: p.update(primary_layer=True), "primary_layer: expected .*int.*got True"),
        (lambda p: p.update(primary_layer=99), "primary_layer: expected one of"),
        (lambda p: p["saes"]["res_jb"].update(layers="0..11"), "layers: expected a list or a range"),
        (lambda p: p["saes"]["res_jb"].update(layers=[0, "1"]), "layers: expected .*list"),
        (lambda p: p["saes"]["res_jb"].update(folder="x"), "either `release` or `folder`"),
        (lambda p: p["saes"]["res_jb"].update(expect={7: {"fvu": 0.1}}), "expected fvu and l0"),
        (lambda p: p.update(package={"name": "x"}), "missing key"),
        (lambda p: p.pop("hub"), "either `hub` or `package`"),
        (lambda p: p.update(saes={}), "at least one SAE set"),
    ],
)
def test_presets_file_is_read_strictly(tmp_path, change, message):
    raw = {"gpt2-small": yaml.safe_load((DATA / "models.yaml").read_text())["gpt2-small"]}
    (tmp_path / "ok.yaml").write_text(yaml.safe_dump(raw))
    assert list(presets(tmp_path / "ok.yaml")) == ["gpt2-small"]
    change(raw["gpt2-small"])
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=message):
        presets(tmp_path / "bad.yaml")


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean 'gemma-2-2b'.*smollm2-135m"):
        models.preset("gema-2-2b")
    with pytest.raises(ValueError, match="SAE set of canonical, sae_ts"):
        models.preset("gemma-2-2b").sae_set("jb")


# --- opening every architecture from a local hub cache -------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_open_from_local_hub_cache(name, hub, monkeypatch):
    spec, source = plant(monkeypatch, hub, name)
    loaded = models.open(name, dtype="float32")
    layer = spec.primary_layer
    row = loaded.checks[0]
    assert row["layer"] == layer and row["fvu"] < 1e-6 and row["l0"] == pytest.approx(tiny.D_MODEL, abs=0.01)
    sae = loaded.sae(layer)
    assert tuple(sae.W_dec.shape) == (2 * tiny.D_MODEL, tiny.D_MODEL) and sae.W_dec.dtype == torch.float32

    ids, mask = loaded.tokens(TEXTS)
    seen = {}
    handles = [
        loaded.block(at).register_forward_hook(lambda _m, _i, out, at=at: seen.__setitem__(at, out[0] if isinstance(out, tuple) else out))
        for at in range(ARCHITECTURES[name][1])
    ]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = loaded.hf(input_ids=ids, attention_mask=mask, position_ids=position).logits
        plain = dict(seen)
        _, cache = loaded.model.run_with_cache(ids, attention_mask=mask)
        expected = source(input_ids=ids, attention_mask=mask, position_ids=position).logits
    for handle in handles:
        handle.remove()
    real = mask.bool()
    for at, resid in plain.items():
        torch.testing.assert_close(cache[f"blocks.{at}.hook_resid_post"][real], resid[real], atol=1e-4, rtol=1e-4)
        assert torch.equal(cache[f"blocks.{at}.hook_resid_post"], seen[at])  # the same torch hook, run by the bridge
    torch.testing.assert_close(logits[real], expected[real], atol=1e-3, rtol=1e-4)
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.bos_token == (None if spec.bos == "none" else "<bos>")
    embedding = loaded.hf.get_input_embeddings().weight
    assert any(p is embedding for p in loaded.model.original_model.parameters())


def test_a_hook_on_the_model_also_acts_in_the_bridge(hub, monkeypatch, tmp_path):
    spec = local_preset(tmp_path, monkeypatch, hub)
    loaded = models.open(spec, check=False)
    ids, _ = loaded.tokens(["one row"])
    before = loaded.model(ids)
    handle = loaded.block(1).register_forward_hook(lambda _m, _i, out: out + 1.0 if torch.is_tensor(out) else (out[0] + 1.0, *out[1:]))
    steered, through_hf = loaded.model(ids), loaded.hf(ids).logits
    handle.remove()
    assert (steered - before).abs().max() > 0.01
    torch.testing.assert_close(steered, through_hf, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loaded.model(ids), before)


def test_saes_load_when_first_used(hub, monkeypatch):
    spec, _ = plant(monkeypatch, hub, "gemma-2-2b", layers=[12, 3])
    loaded = models.open("gemma-2-2b")
    assert [row["layer"] for row in loaded.checks] == [12] and list(loaded.saes) == spec.layers
    loaded.sae(3)
    assert [row["layer"] for row in loaded.checks] == [12, 3]
    assert loaded.sae(3) is loaded.saes[3]
    restricted = models.open("gemma-2-2b", layers=[3])
    assert list(restricted.saes) == [3] and [row["layer"] for row in restricted.checks] == [3]
    with pytest.raises(ValueError, match=r"no SAE for layer 12; layers with an SAE: \[3\]"):
        restricted.sae(12)
    with pytest.raises(ValueError, match="no SAE for layer 40"):
        models.open("gemma-2-2b", layers=[40])
    with pytest.raises(ValueError, match="expected a layer from 0 to 12, got 13"):
        loaded.block(13)


def test_gemma_3_reader_agrees_with_sae_lens(hub, monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors import safe_open

    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(w.shape, generator=generator) for name, w in tiny.planted().items()}
    spec, _ = plant(monkeypatch, hub, "gemma-3-270m", weights=weights)
    ours = models.open("gemma-3-270m", check=False).sae(9)

    def shapes(repo, filename):
        with safe_open(tiny.snapshot(hub, repo) / filename, "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    theirs = SAE.from_pretrained(spec.sae_set().release, spec.sae_set().sae_id(9))
    x = torch.randn(5, tiny.D_MODEL)
    assert torch.equal(ours.encode(x), theirs.encode(x)) and torch.equal(ours(x), theirs(x))
    for key in ("hook_name", "model_name", "prepend_bos"):
        assert getattr(ours.cfg.metadata, key) == getattr(theirs.cfg.metadata, key)


# --- GPT-2: centred writing weights --------------------------------------------------------------------------------


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
    _, _ = plant(monkeypatch, hub, "gpt2-small")
    loaded = models.open("gpt2-small")
    assert loaded.sae(7).cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    ids, _ = loaded.tokens(["Centred weights change nothing that is read."])
    with torch.no_grad():
        _, expected = oracle.run_with_cache(ids)
        _, cache = loaded.model.run_with_cache(ids)
        mine = residuals(loaded.hf, ids, torch.ones_like(ids), layers=list(range(8)))
        log_probs = [m(ids).logits.log_softmax(-1) for m in (loaded.hf, source)]
        uncentred = source(ids, output_hidden_states=True).hidden_states[1:]
    for layer in range(8):
        want = expected[f"blocks.{layer}.hook_resid_post"]
        torch.testing.assert_close(mine[layer], want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache[f"blocks.{layer}.hook_resid_post"], want, atol=1e-4, rtol=1e-4)
        assert mine[layer].mean(-1).abs().max() < 1e-4 < uncentred[layer].mean(-1).abs().max()
    torch.testing.assert_close(*log_probs, atol=1e-4, rtol=1e-4)


def test_other_demands_are_refused(hub, monkeypatch, tmp_path):
    fold = {"model_from_pretrained_kwargs": {"fold_ln": True}}
    with pytest.raises(ValueError, match="demands fold_ln"):
        models.open(local_preset(tmp_path, monkeypatch, hub, metadata=fold))
    centre = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    with pytest.raises(ValueError, match="expected a GPT-2 model, got llama"):
        models.open(local_preset(tmp_path, monkeypatch, hub, metadata=centre))
    off = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    assert models.open(local_preset(tmp_path, monkeypatch, hub, metadata=off)).checks
    with pytest.raises(ValueError, match="expected a GPT-2 model"):
        centre_writing_weights(tiny.model("gptneox"))


# --- what must be refused ------------------------------------------------------------------------------------------


def test_width_mismatch(hub, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"expected width 64 \(d_model\), got 32"):
        models.open(local_preset(tmp_path, monkeypatch, hub, weights=tiny.planted(32)))


def test_nan_weights(hub, monkeypatch, tmp_path):
    weights = tiny.planted()
    weights["W_dec"][3, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in W_dec"):
        models.open(local_preset(tmp_path, monkeypatch, hub, weights=weights), check=False)


def test_sae_of_another_hook(hub, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"expected one for blocks.0.hook_resid_post, got blocks.2.hook_mlp_out"):
        models.open(local_preset(tmp_path, monkeypatch, hub, metadata={"hook_name": "blocks.2.hook_mlp_out"}))


@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-270m", "llama-3.1-8b", "qwen3-1.7b", "gpt2-small"])
def test_truncated_sae_file(name, hub, monkeypatch):
    spec, _ = plant(monkeypatch, hub, name)
    chosen = spec.sae_set()
    path = tiny.put_sae(hub, chosen.release, chosen.sae_id(spec.primary_layer), tiny.planted())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name}: expected the SAE of layer {spec.primary_layer}.*damaged or of"):
        models.open(name)


def test_missing_embedded_sae(hub, monkeypatch, tmp_path):
    spec = local_preset(tmp_path, monkeypatch, hub)
    shutil.rmtree(tmp_path / "saes" / "layer_0")
    with pytest.raises(FileNotFoundError, match="Restore data/ from version control"):
        models.open(spec)


def test_hub_out_of_reach(hub, monkeypatch):
    with pytest.raises(ConnectionError, match=r"gemma-2-2b.*neither.*HF_TOKEN.*Works without the hub: smollm2-135m"):
        models.open("gemma-2-2b")
    tiny.put_model(hub, models.preset("gpt2-small").hub, "gpt2", n_layers=8)
    with pytest.raises(ConnectionError, match="SAE of layer 7"):
        models.open("gpt2-small")


def test_gated_repository(hub, monkeypatch):
    import transformers

    def refuse(*_args, **_kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(PermissionError, match=r"Accept its licence.*HF_TOKEN.*gpt2-small"):
        models.open("llama-3.1-8b")


def test_unknown_dtype(hub, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"expected auto or a floating dtype of torch such as float32 or bfloat16, got 'fp99'"):
        models.open(local_preset(tmp_path, monkeypatch, hub), dtype="fp99")


def test_bos_token_of_the_preset_must_exist(hub, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"bos: expected a token of this tokenizer, got '<\|endoftext\|>'"):
        models.open(local_preset(tmp_path, monkeypatch, hub, bos="<|endoftext|>"))


# --- the self-check ------------------------------------------------------------------------------------------------


def lossy(hf, layer, ids, mask, keep):
    """Return SAE weights fitted to one layer: its `keep` strongest principal directions around its mean, both signs."""
    resid = residuals(hf, ids, mask, layers=[layer])[layer]
    x = resid[ordinary_positions(ids, mask, {0: resid}, special=[0, 1, 2], outlier=10.0)].double()
    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:keep].float()
    both = torch.cat([directions, -directions])
    mean = x.mean(0).float()
    weights = {"W_enc": both.T.contiguous(), "W_dec": both, "b_enc": -(both @ mean), "b_dec": mean}
    return weights | {"threshold": torch.zeros(2 * keep)}


def test_an_sae_of_another_layer_is_caught(hub, monkeypatch, tmp_path):
    """SAEs of layers 1 and 2, recorded, then swapped: the check must stop, with numbers and what to do."""
    spec = local_preset(tmp_path, monkeypatch, hub)
    loaded = models.open(spec, check=False)
    ids, mask = loaded.tokens((DATA / "check_texts.txt").read_text().splitlines())
    weights = {layer: lossy(loaded.hf, layer, ids, mask, 24) for layer in (1, 2)}
    for layer in (1, 2):
        tiny.put_disk_sae(tmp_path / "saes" / f"layer_{layer}", layer, weights[layer])
    measured = selfcheck.measure(loaded, dict(models.open(spec, layers=[1, 2], check=False).saes))
    expect = {layer: {"fvu": row["fvu"], "l0": row["l0"]} for layer, row in measured.items()}
    chosen = dataclasses.replace(spec.sae_set(), expect=expect)
    spec = dataclasses.replace(spec, saes={"own": chosen})
    assert [row["layer"] for row in models.open(spec, layers=[1, 2]).checks] == [1, 2]
    tiny.put_disk_sae(tmp_path / "saes" / "layer_2", 2, weights[1])  # claims to be layer 2
    with pytest.raises(ValueError, match=r"layer 2: the SAE does not fit.*Expected FVU .*\(recorded\); got FVU .*tiny"):
        models.open(spec, layers=[1, 2])
    assert models.open(spec, layers=[2], check=False).checks == []


def test_bounds_where_nothing_is_recorded(hub, monkeypatch):
    """Gemma Scope names its L0: 64 active features pass beside 82, 16 do not; nor does an SAE that rebuilds nothing."""
    spec, _ = plant(monkeypatch, hub, "gemma-2-2b")
    chosen, weights = spec.sae_set(), tiny.planted()
    assert "factor 3 of 82 (published)" in models.open("gemma-2-2b").checks[0]["expected"]
    few = weights | {"W_enc": weights["W_enc"] * (torch.arange(128) % 64 < 16)}
    tiny.put_sae(hub, chosen.release, chosen.sae_id(12), few)
    with pytest.raises(ValueError, match="L0 within a factor 3 of 82"):
        models.open("gemma-2-2b")
    tiny.put_sae(hub, chosen.release, chosen.sae_id(12), weights | {"W_dec": torch.zeros(128, 64)})
    with pytest.raises(ValueError, match=r"Expected FVU below 0.5.*got FVU 1\."):
        models.open("gemma-2-2b")


def test_quality_against_float64(hub):
    generator = torch.Generator().manual_seed(0)
    w_enc, w_dec = torch.randn(8, 20, generator=generator), torch.randn(20, 8, generator=generator) / 8
    b_enc, b_dec = torch.randn(20, generator=generator), torch.randn(8, generator=generator)
    theta, x = torch.rand(20, generator=generator), torch.randn(50, 8, generator=generator)
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=20, apply_b_dec_to_input=False))
    sae.load_state_dict({"W_enc": w_enc, "W_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": theta})
    a, h, d = (t.double().numpy() for t in (w_enc, x, w_dec))
    z = h @ a + b_enc.double().numpy()
    f = z * (z > np.maximum(theta.double().numpy(), 0))
    missed = h - f @ d - b_dec.double().numpy()
    got = selfcheck.quality(sae, x)
    assert got["fvu"] == pytest.approx((missed**2).sum() / ((h - h.mean(0)) ** 2).sum(), rel=1e-5)
    assert got["l0"] == pytest.approx((f > 0).sum(1).mean()) and got["positions"] == 50


def test_usual_leaves_out_pads_first_special_and_outliers():
    ids = torch.tensor([[0, 0, 1, 9, 9, 9], [1, 9, 2, 9, 9, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    resid = torch.ones(2, 6, 4)
    resid[1, 4] = 100.0
    keep = ordinary_positions(ids, mask, {0: resid}, special=[0, 1, 2], outlier=10.0)
    assert keep.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]]


def test_record_writes_one_line(hub, monkeypatch, tmp_path):
    spec = local_preset(tmp_path, monkeypatch, hub)
    path = tmp_path / "models.yaml"
    before = (DATA / "models.yaml").read_text() + (
        "\ntiny:\n  hub: tiny/llama\n  primary_layer: 0\n  dtype: float32\n  bos: own\n  outlier: 10\n"
        "  saes:\n    own:  # a note\n"
        f"      folder: {tmp_path / 'saes'}\n      id: layer_{{layer}}\n      layers: 0-2\n      expect: {{}}\n"
        "  needs: {vram_gb: 1, disk_gb: 1, gated: false}\n"
    )
    path.write_text(before)
    expect = selfcheck.record(models.open(spec, check=False), path=path)
    assert set(expect) == {0, 1, 2} and all(row["l0"] == pytest.approx(64, abs=0.1) for row in expect.values())
    old, new = before.splitlines(), path.read_text().splitlines()
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    assert len(changed) == 1 and old[changed[0]].strip() == "expect: {}" and changed[0] > len(old) - 4
    assert presets(path)["tiny"].sae_set().expect == expect
    with pytest.raises(ValueError, match="got 0; add"):
        selfcheck.record(models.open(spec, check=False), "other", path=path)


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_left_padded(hub, monkeypatch, tmp_path):
    loaded = models.open(local_preset(tmp_path, monkeypatch, hub), check=False)
    ids, mask = loaded.tokens(["abc", "a<eos>"])
    plain = [loaded.tokenizer.convert_tokens_to_ids(list("abc")), [loaded.tokenizer.convert_tokens_to_ids("a"), 2]]
    assert ids.tolist() == [[1, *plain[0]], [0, 1, *plain[1]]] and mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    ids, mask = loaded.tokens(["abc"], bos=False)
    assert ids.tolist() == [plain[0]] and mask.tolist() == [[1, 1, 1]]
    chat, _ = loaded.tokens(["Hi"], chat=True)
    assert loaded.tokenizer.decode(chat[0]) == "<bos>[user] Hi\n[assistant] "
    assert torch.equal(loaded.model.to_tokens("abc"), loaded.tokens(["abc"])[0])
    for wrong in ([], [""]):
        with pytest.raises(ValueError, match="at least one token"):
            loaded.tokens(wrong, bos=False)
    with pytest.raises(ValueError, match="expected a list of strings"):
        loaded.tokens("abc")
    loaded.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        loaded.tokens(["Hi"], chat=True)


# --- the embedded model --------------------------------------------------------------------------------------------


@pytest.mark.embedded
def test_embedded_model():
    """SmolLM2-135M as the design states it; the recorded first token lowers the loss; hf and bridge agree."""
    spec = models.preset("smollm2-135m")
    hf, tok = models.load_model(spec)
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
def test_embedded_sae_on_the_wrong_layer(tmp_path):
    """The shipped SAE of layer 8, renamed to layer 13, is refused."""
    spec = models.preset("smollm2-135m")
    folder = ROOT / spec.sae_set().folder
    if not (folder / "layer_8" / "cfg.json").exists() or not spec.sae_set().expect:
        pytest.skip("the embedded SAEs are not trained and recorded yet")
    shutil.copytree(folder / "layer_8", tmp_path / "layer_13")
    cfg = json.loads((tmp_path / "layer_13" / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.13.hook_resid_post"
    (tmp_path / "layer_13" / "cfg.json").write_text(json.dumps(cfg))
    wrong = dataclasses.replace(spec.sae_set(), folder=str(tmp_path))
    with pytest.raises(ValueError, match="layer 13: the SAE does not fit the activations"):
        models.open(dataclasses.replace(spec, saes={"own": wrong}))
    assert models.open("smollm2-135m").checks[0]["layer"] == 13

"""An SAE is compared with the activations it is about to read: against float64, with planted faults, and recorded."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
import torch

from steerkit.features import ordinary_positions, residuals
from steerkit.files import DATA, ROOT
from steerkit.models import check as selfcheck
from steerkit.models import load
from steerkit.models.presets import presets


def lossy(hf, layer, ids, mask, keep):
    """Return SAE weights fitted to one layer: its `keep` strongest principal directions around its mean, both signs."""
    resid = residuals(hf, ids, mask, layers=[layer])[layer]
    x = resid[ordinary_positions(ids, mask, {0: resid}, special=[0, 1, 2], outlier=10.0)].double()
    directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:keep].float()
    both = torch.cat([directions, -directions])
    mean = x.mean(0).float()
    weights = {"W_enc": both.T.contiguous(), "W_dec": both, "b_enc": -(both @ mean), "b_dec": mean}
    return weights | {"threshold": torch.zeros(2 * keep)}


def test_an_sae_of_another_layer_is_caught(hub, tmp_path):
    """SAEs of layers 1 and 2, recorded, then swapped: the check must stop, with numbers and what to do."""
    spec = tiny.local_preset(hub, tmp_path)
    lab = load.open(spec, check=False)
    ids, mask = lab.tokens((DATA / "check_texts.txt").read_text().splitlines())
    weights = {layer: lossy(lab.hf, layer, ids, mask, 24) for layer in (1, 2)}
    for layer in (1, 2):
        tiny.put_disk_sae(tmp_path / "saes" / f"layer_{layer}", layer, weights[layer])
    measured = selfcheck.measure(lab, dict(load.open(spec, layers=[1, 2], check=False).saes))
    expect = {layer: {"fvu": row["fvu"], "l0": row["l0"]} for layer, row in measured.items()}
    chosen = dataclasses.replace(spec.sae_set(), expect=expect)
    spec = dataclasses.replace(spec, saes={"own": chosen})
    assert [row["layer"] for row in load.open(spec, layers=[1, 2]).checks] == [1, 2]
    tiny.put_disk_sae(tmp_path / "saes" / "layer_2", 2, weights[1])  # claims to be layer 2
    with pytest.raises(ValueError, match=r"layer 2: the SAE does not fit.*Expected FVU .*\(recorded\); got FVU .*tiny"):
        load.open(spec, layers=[1, 2])
    assert load.open(spec, layers=[2], check=False).checks == []


def test_bounds_where_nothing_is_recorded(hub, monkeypatch):
    """Gemma Scope names its L0: 64 active features pass beside 82, 16 do not; nor does an SAE that rebuilds nothing."""
    spec, _ = tiny.plant(monkeypatch, hub, "gemma-2-2b")
    chosen, weights = spec.sae_set(), tiny.planted()
    assert "factor 3 of 82 (published)" in load.open("gemma-2-2b").checks[0]["expected"]
    few = weights | {"W_enc": weights["W_enc"] * (torch.arange(128) % 64 < 16)}
    tiny.put_sae(hub, chosen.release, chosen.sae_id(12), few)
    with pytest.raises(ValueError, match="L0 within a factor 3 of 82"):
        load.open("gemma-2-2b")
    tiny.put_sae(hub, chosen.release, chosen.sae_id(12), weights | {"W_dec": torch.zeros(128, 64)})
    with pytest.raises(ValueError, match=r"Expected FVU below 0.5.*got FVU 1\."):
        load.open("gemma-2-2b")


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


def test_record_writes_one_line(hub, tmp_path):
    spec = tiny.local_preset(hub, tmp_path)
    path = tmp_path / "models.yaml"
    before = (DATA / "models.yaml").read_text() + (
        "\ntiny:\n  hub: tiny/llama\n  primary_layer: 0\n  dtype: float32\n  bos: own\n  outlier: 10\n"
        "  saes:\n    own:  # a note\n"
        f"      folder: {tmp_path / 'saes'}\n      id: layer_{{layer}}\n      layers: 0-2\n      expect: {{}}\n"
        "  needs: {vram_gb: 1, disk_gb: 1, gated: false}\n"
    )
    path.write_text(before)
    expect = selfcheck.record(load.open(spec, check=False), path=path)
    assert set(expect) == {0, 1, 2} and all(row["l0"] == pytest.approx(64, abs=0.1) for row in expect.values())
    old, new = before.splitlines(), path.read_text().splitlines()
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    assert len(changed) == 1 and old[changed[0]].strip() == "expect: {}" and changed[0] > len(old) - 4
    assert presets(path)["tiny"].sae_set().expect == expect
    with pytest.raises(ValueError, match="got 0; add"):
        selfcheck.record(load.open(spec, check=False), "other", path=path)


@pytest.mark.embedded
def test_embedded_sae_on_the_wrong_layer(tmp_path):
    """The shipped SAE of layer 8, renamed to layer 13, is refused."""
    spec = load.preset("smollm2-135m")
    folder = ROOT / spec.sae_set().folder
    if not (folder / "layer_8" / "cfg.json").exists() or not spec.sae_set().expect:
        pytest.skip("the embedded SAEs are not trained and recorded yet")
    shutil.copytree(folder / "layer_8", tmp_path / "layer_13")
    cfg = json.loads((tmp_path / "layer_13" / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "blocks.13.hook_resid_post"
    (tmp_path / "layer_13" / "cfg.json").write_text(json.dumps(cfg))
    wrong = dataclasses.replace(spec.sae_set(), folder=str(tmp_path))
    with pytest.raises(ValueError, match="layer 13: the SAE does not fit the activations"):
        load.open(dataclasses.replace(spec, saes={"own": wrong}))
    assert load.open("smollm2-135m").checks[0]["layer"] == 13

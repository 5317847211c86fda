"""Presets against sae_lens's registry and the papers' numbers; the file of presets is read strictly."""

import pytest
import yaml

from steerkit.files import DATA
from steerkit.models.presets import preset, presets


def registry():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


@pytest.mark.parametrize("name", presets())
def test_sae_ids_exist_in_sae_lens_registry(name):
    for chosen in preset(name).saes.values():
        if chosen.folder:
            continue
        entry = registry()[chosen.release]
        for layer in chosen.layers:
            assert chosen.sae_id(layer) in entry.saes_map, (name, chosen.release, layer)


def test_layers_cover_the_release():
    """A preset that lists all layers lists all that the release has: counted from the registry, not from the preset."""
    for name, count in {"gemma-2-2b": 26, "gemma-2-9b": 42, "llama-3.1-8b": 32, "qwen3-1.7b": 28}.items():
        chosen = preset(name).sae_set()
        width = "width_16k" if "gemma" in name else ""
        assert len(chosen.layers) == count == sum(width in sae_id for sae_id in registry()[chosen.release].saes_map)


def test_papers_published_sparsity():
    """L0 in the papers: SAE-TS 82 (2B) and 130 (9B) at layer 12; Concept500 SAEs of 9B-it 81 and 109."""
    known = [("gemma-2-2b", 12, 82), ("gemma-2-9b", 12, 130), ("gemma-2-9b-it", 20, 81), ("gemma-2-9b-it", 31, 109)]
    for name, layer, l0 in known:
        assert preset(name).sae_set().published_l0(layer) == l0
    for name, l0 in [("gemma-2-2b", 82), ("gemma-2-9b", 130)]:
        assert preset(name).sae_set("sae_ts").published_l0(12) == l0


def test_sae_hooks_are_block_outputs():
    assert preset("gpt2-small").sae_set().sae_id(7) == "blocks.8.hook_resid_pre"
    assert preset("gpt2-small").sae_set().sae_id(11) == "blocks.11.hook_resid_post"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(colour="red"), "bad.yaml: gpt2-small: unknown key colour; known keys: primary_layer, dtype"),
        (lambda p: p["needs"].pop("vram_gb"), "gpt2-small.needs: missing key vram_gb; known keys: vram_gb, disk_gb, gated"),
        (lambda p: p.update(primary_layer=True), "gpt2-small.primary_layer: expected a whole number, got True"),
        (lambda p: p.update(outlier="10"), "gpt2-small.outlier: expected a number, got '10'"),
        (lambda p: p.update(dtype=32), "gpt2-small.dtype: expected text in quotes, got 32"),
        (lambda p: p["needs"].update(gated=0), "gpt2-small.needs.gated: expected true or false, got 0"),
        (lambda p: p.update(primary_layer=99), "primary_layer: expected one of"),
        (lambda p: p["saes"]["res_jb"].update(layers="0..11"), "layers: expected a list or a range"),
        (lambda p: p["saes"]["res_jb"].update(layers=[0, "1"]), "gpt2-small.saes.res_jb.layers.1: expected a whole number, got '1'"),
        (lambda p: p["saes"]["res_jb"].update(layers=3), "layers: expected a list, got 3"),
        (lambda p: p["saes"]["res_jb"].update(ids={"first": "x"}), "ids.first: expected a whole number, got 'first'"),
        (lambda p: p["saes"]["res_jb"].update(folder="x"), "either `release` or `folder`"),
        (lambda p: p["saes"]["res_jb"].update(expect={7: {"fvu": 0.1}}), "expected fvu and l0"),
        (lambda p: p.update(package={"name": "x"}), "gpt2-small.package: missing key version; .*: missing key sha256"),
        (lambda p: p.pop("hub"), "either `hub` or `package`"),
        (lambda p: p.update(saes={}), "gpt2-small.saes: expected at least 1 entries, got 0"),
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
        preset("gema-2-2b")
    with pytest.raises(ValueError, match="SAE set of canonical, sae_ts"):
        preset("gemma-2-2b").sae_set("jb")

"""Published effects: read from a hub cache laid out as the hub's own; golden values where the hub can be reached."""

import types

import pytest
import tiny
import torch

from steerkit.engine.lab import Lab, Place
from steerkit.methods.sae_ts import published
from steerkit.methods.sae_ts.approximator import aim, rotation, unit
from steerkit.models.presets import preset

REPO = "datasets--schalnev--sae-ts-effects"


def place(name, layer, W_dec=None):
    """A place of a preset whose model is not opened: what is read here are its names, and the SAE's decoder."""
    return Place(Lab(preset(name), torch.nn.Identity(), None, {layer: types.SimpleNamespace(W_dec=W_dec)}), layer)


def put(cache, name, content):
    root = cache / REPO
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text("0" * 40)
    torch.save(content, folder / name)


def test_adapter_and_effects_are_read_as_ours(tmp_path, monkeypatch):
    cache = tiny.offline_hub(monkeypatch, tmp_path)
    W, b = torch.randn(8, 20), torch.randn(20)
    put(cache, "adapter_2b_layer_12.pt", {"W": W.half(), "b": b.half()})
    unit = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    scales, y = torch.tensor([40.0, 60.0, 80.0, 100.0, 200.0]), torch.randn(5, 20)
    put(cache, "effects_2b.pt", {"features": unit * scales[:, None], "effects": y})
    found = published.adapter(preset("gemma-2-2b"))
    torch.testing.assert_close(found(unit), unit @ W + b, rtol=1e-2, atol=1e-2)
    effects, held, repeat, _ = published.measured(place("gemma-2-2b", 12), "hub", n_held=2)
    torch.testing.assert_close(effects.vectors, unit)
    torch.testing.assert_close(effects.scales, scales)
    assert torch.equal(effects.effects, y) and held.tolist() == [False] * 3 + [True] * 2 and repeat is None
    assert torch.equal(published.approximator(place("gemma-2-2b", 12), "hub", effects, held).M, found.M)
    with pytest.raises(ValueError, match="expected ridge, adam or hub, got 'lasso'"):
        published.approximator(place("gemma-2-2b", 12), "lasso", effects, held)


def test_shipped_effects_belong_to_their_vectors():
    """Decoder rows and sums are made again from any W_dec of the right size; which of them are held out is known."""
    at = place("smollm2-135m", 13, torch.randn(8192, 8, generator=torch.Generator().manual_seed(0)))
    found, held, repeat, about = published.measured(at)
    assert len(found.vectors) == len(held) == len(found.scales) and found.effects.shape[1] == 8192
    assert held.sum() == len(repeat.scales) and torch.equal(found.vectors[held], repeat.vectors)
    assert (about["preset"], about["layer"]) == ("smollm2-135m", 13)


class Evil:
    def __reduce__(self):
        return (print, ("code from a file was run",))


def test_a_tampered_file_runs_no_code_and_a_wrong_one_is_named(tmp_path, monkeypatch, capsys):
    cache = tiny.offline_hub(monkeypatch, tmp_path)
    put(cache, "adapter_2b_layer_12.pt", {"W": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        published.adapter(preset("gemma-2-2b"))
    assert "code from a file" not in capsys.readouterr().out
    put(cache, "adapter_2b_layer_12.pt", {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="expected tensors"):
        published.adapter(preset("gemma-2-2b"))
    put(cache, "adapter_2b_layer_12.pt", {"W": torch.zeros(2, 3), "b": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"got \[2, 3\], \[4\]"):
        published.adapter(preset("gemma-2-2b"))


def test_presets_without_published_effects_say_so():
    with pytest.raises(ValueError, match="measure your own"):
        published.adapter(preset("gpt2-small"))


def online(size: str):
    try:
        return published.adapter(preset(f"gemma-2-{size}"))
    except (ConnectionError, PermissionError) as error:
        pytest.skip(f"needs the hub: {str(error)[:80]}")


def decoder(size: str):
    from sae_lens import SAE

    spec = preset(f"gemma-2-{size}")
    chosen = spec.sae_set("sae_ts")
    try:
        sae = SAE.from_pretrained(chosen.release, chosen.sae_id(12), device="cpu")
    except OSError as error:
        pytest.skip(f"needs the hub: {str(error)[:80]}")
    return torch.nn.functional.normalize(sae.W_dec.detach().float(), dim=1)


@pytest.mark.hub
def test_bias_of_the_published_2b_adapter():
    """SAE-TS Table 4."""
    b = online("2b").b
    values = {1041: -0.9743, 7507: 0.8529, 2291: -0.6471, 12342: -0.4107, 7541: -0.4065, 1322: -0.3745, 2620: 0.3522, 6810: 0.3368}
    for feature, value in (values | {2514: 0.3116}).items():
        assert b[feature].item() == pytest.approx(value, abs=1e-3)


@pytest.mark.hub
def test_anger_9b_has_the_cosine_of_fgaa_table_d1():
    vector = aim(online("9b"), place("gemma-2-9b", 12), 441)
    row = decoder("9b")[441]
    assert float(vector.direction @ row) == pytest.approx(0.4123, abs=1e-3)


@pytest.mark.hub
def test_the_right_rotation_is_the_one_that_maps_rows_to_columns():
    found = online("2b")
    D = decoder("2b")
    R, wrong = rotation(found, D), rotation(found, D, published=True)
    both = [torch.stack([unit(m @ D[i]) @ unit(found.M[:, i]) for i in range(0, 16384, 512)]).mean() for m in (R, wrong)]
    assert both[0] > both[1]


def test_effects_of_another_preset_or_layer_are_refused_by_name(tmp_path):
    """Wrong effects would fail later, as a product of matrices that do not fit, or not at all where the sizes agree."""
    embedded, small = preset("smollm2-135m"), preset("gpt2-small")
    own = published.source("", embedded, 13)
    with pytest.raises(ValueError, match=r"effects of gpt2-small, layer 7, got those of smollm2-135m, layer 13: .*--preset gpt2-small"):
        published.measured(place("gpt2-small", 7), own)
    with pytest.raises(ValueError, match=r"effects of smollm2-135m, layer 8, got those of smollm2-135m, layer 13"):
        published.source(own, embedded, 8)
    with pytest.raises(ValueError, match=r"gpt2-small, layer 7: expected measured effects, got none: python -m recipes\.effects"):
        published.source("", small, 7)
    with pytest.raises(ValueError, match=r"got no file nowhere\.safetensors"):
        published.source("nowhere.safetensors", embedded, 13)
    with pytest.raises(ValueError, match="gpt2-small, layer 7: expected a preset and layer with published effects"):
        published.source("hub", small, 7)
    assert published.source("", preset("gemma-2-2b"), 12) == "hub"
    with pytest.raises(ValueError, match="gemma-2-2b, layer 5: expected measured effects"):
        published.source("", preset("gemma-2-2b"), 5)

"""Every notebook, cell by cell, on a machine with a GPU: what lies on the GPU never meets what lies on the CPU."""

import copy
import dataclasses
import functools
from pathlib import Path

import cells
import devices
import jaxtyping
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import nn

from recipes import effects as measure_effects
from steerkit.book import run
from steerkit.engine.lab import Lab
from steerkit.judges import coherence
from steerkit.methods.corrsteer import trial
from steerkit.methods.sae_ts import approximator, effects, published
from steerkit.models import load

PROJECT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
KEPT = (0, 1, 13, 14, 29)  # blocks that still compute: enough for every path, a sixth of the time


# --- the emulation follows torch's rules -----------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["plain", "inference"])
def gpu(request):
    with devices.gpu(), torch.inference_mode(request.param):
        yield torch.arange(6.0, device="cuda").view(2, 3)


def test_a_tensor_says_where_it_is_and_what_is_made_of_it_stays_there(gpu):
    assert torch.cuda.is_available() and gpu.is_cuda and gpu.device == torch.device("cuda", 0) and not gpu.cpu().is_cuda
    made = [
        gpu + 1,
        gpu[0],
        gpu.T,
        gpu @ gpu.T,
        gpu.half(),
        gpu.new_zeros(2),
        torch.ones_like(gpu),
        gpu.sum(),
        torch.cat([gpu, gpu]),
        gpu.max(1).values,
    ]
    made += [
        torch.ones(2).to("cuda"),
        torch.ones(2).cuda(),
        torch.tensor([1, 2], device="cuda"),
        torch.ones(2, 3).to(gpu),
        nn.Linear(3, 2).to("cuda")(gpu),
    ]
    assert all(t.device.type == "cuda" for t in made)
    assert all(t.device.type == "cpu" for t in (gpu.cpu(), gpu.to("cpu"), gpu.to(torch.ones(1)), torch.ones(2)))
    torch.testing.assert_close((gpu @ gpu.T).cpu(), torch.tensor([[5.0, 14.0], [14.0, 50.0]]))
    assert gpu.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] and float(gpu.sum()) == 15 and f"{gpu[1, 2]:.1f}" == "5.0"


def test_tensors_of_two_devices_do_not_mix_but_a_single_number_may_join(gpu):
    near = torch.ones(2, 3)
    for mix in (
        lambda: gpu + near,
        lambda: gpu @ near.T,
        lambda: torch.cat([gpu, near]),
        lambda: torch.equal(gpu, near),
        lambda: torch.isin(gpu, near),
        lambda: torch.where(near > 0, gpu, 0.0),
        lambda: near * gpu[0, 0],
        lambda: nn.functional.embedding(torch.tensor([0]), gpu),
        lambda: near.index_select(0, torch.tensor([0], device="cuda")),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert ((gpu * torch.tensor(2.0)).device, (gpu * 2).device) == (gpu.device, gpu.device)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())


def test_a_cpu_index_reads_the_gpu_and_not_the_other_way_round(gpu):
    assert gpu[torch.tensor([1])].tolist() == [[3.0, 4.0, 5.0]] and gpu[gpu > 4].device.type == "cuda"
    for index in (torch.tensor([0], device="cuda"), torch.tensor([True, False], device="cuda")):
        with pytest.raises(RuntimeError, match="indices should be either on cpu"):
            torch.ones(2, 3)[index]


def test_copies_between_devices_are_asked_for(gpu):
    for read in (lambda: gpu.numpy(), lambda: np.asarray(gpu)):
        with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy"):
            read()
    near, far = torch.zeros(2, 3), torch.zeros(2, 3, device="cuda")
    near[:], far[0] = gpu, torch.ones(3)
    assert near.device.type == "cpu" and near.tolist() == gpu.tolist() and far.tolist() == [[1.0] * 3, [0.0] * 3]
    far += gpu
    assert far.device.type == "cuda" and far[1].tolist() == [3.0, 4.0, 5.0]


def test_gradients_stay_on_the_gpu_and_are_those_of_the_cpu():
    x = torch.randn(1, 2, 4, 8)
    near = x.clone().requires_grad_()
    nn.functional.scaled_dot_product_attention(near, near, near).square().sum().backward()
    with devices.gpu():
        far = x.to("cuda").requires_grad_()
        nn.functional.scaled_dot_product_attention(far, far, far).square().sum().backward()
        layer = nn.Linear(8, 1).to("cuda")
        optimiser = torch.optim.Adam(layer.parameters(), fused=True)
        layer(far.detach()).sum().backward()
        optimiser.step()
        assert far.grad.device.type == layer.weight.grad.device.type == "cuda"
        torch.testing.assert_close(far.grad.cpu(), near.grad)
    assert not torch.cuda.is_available() and not torch.ones(1).is_cuda


def test_the_recipe_of_effects_runs_on_a_gpu(tmp_path, monkeypatch):
    """The command end to end, its calibration included; what it ships is read on a machine without one."""
    rows, spec = measure_effects.training_vectors, tiny.lab(outlier=1e9).preset
    opened = lambda *_, **__: Lab(spec, tiny.model("llama").to("cuda"), tiny.tokenizer(), {1: tiny.planted_sae().to("cuda")})  # noqa: E731
    monkeypatch.setattr(load, "preset", lambda name: spec)
    monkeypatch.setattr(load, "open", opened)
    monkeypatch.setattr(measure_effects, "training_vectors", lambda W: rows(W, n_held=4))
    monkeypatch.setattr(measure_effects, "density", lambda *_: None)
    monkeypatch.setattr(measure_effects, "topic_features", lambda *_: pd.DataFrame({"feature": [3]}))
    monkeypatch.setattr(measure_effects, "budget", lambda *_, **__: pd.DataFrame({"prompts": [2]}))
    monkeypatch.setattr(measure_effects, "Scheme", functools.partial(effects.Scheme, prompts=("", "ab"), length=8))
    with devices.gpu():
        call = ["--out", str(tmp_path / "parts"), "--ship", str(tmp_path / "e.safetensors"), "--first", "12", "--block", "12"]
        measure_effects.main([*call, "--rise", "0.01"])
    found, about = effects.load(tmp_path / "e.safetensors", rows(tiny.planted_sae().W_dec, n_held=4)[0])
    assert len(found.scales) == 12 and (found.scales >= 1).all() and found.effects.isfinite().all() and about["preset"] == "tiny"


# --- the notebooks ---------------------------------------------------------------------------------------------------


class Through(nn.Module):
    """A block that adds nothing."""

    def forward(self, hidden_states, *_args, **_kwargs):
        return hidden_states


@pytest.fixture(scope="module")
def small():
    """The embedded model and its tokenizer, most blocks emptied: the paths are what is tested, not the texts."""
    model, tokenizer = load.load_model(load.preset("smollm2-135m"), device="cpu")
    for at in set(range(len(model.model.layers))) - set(KEPT):
        model.model.layers[at] = Through()
    return model, tokenizer


@pytest.fixture
def on_gpu(small, monkeypatch):
    """A GPU, and `load.open` with the small model on it; ridge fits without cross-validation."""
    real, coin = trial.graded, np.random.default_rng(0)
    quick = functools.partial(approximator.fit_ridge, penalties=(1.0,))

    def small_model(_spec, *, device="auto", dtype=None):
        return copy.deepcopy(small[0]).to("cuda" if device == "auto" else device), small[1]

    def graded(task, texts, questions):  # so that there are features to select
        rows = real(task, texts, questions)
        return rows.assign(correct=coin.integers(2, size=len(rows)))

    monkeypatch.setattr(load, "load_model", small_model)
    monkeypatch.setattr(load, "self_check", lambda *_: [])
    monkeypatch.setattr(trial, "graded", graded)
    text_features = effects.text_features

    def few(*args, scheme, **settings):
        return text_features(*args, scheme=dataclasses.replace(scheme, prompts=scheme.prompts[3:5], length=8), **settings)

    monkeypatch.setattr(effects, "text_features", few)
    for module in (approximator, published):
        monkeypatch.setattr(module, "fit_ridge", quick)
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a notebook, and faster
    coherence.embedded_judge.cache_clear()
    with devices.gpu():
        yield
    coherence.embedded_judge.cache_clear()
    plt.close("all")


@pytest.mark.embedded
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_on_a_gpu(path, on_gpu, tmp_path):
    plt.switch_backend("Agg")
    job = run.jobs("smoke")[path.stem]
    given = dict(job.given) | {"out_dir": str(tmp_path / "out"), "figures_dir": str(tmp_path / "figures")}
    if path.stem == "07_corrsteer":
        given |= {"lora_tasks": ["letters"]}  # smoke leaves fine-tuning out
    space = cells.run_cells(path, run.check_parameters(run.parameters(nbformat.read(path, 4)), given))
    used = space.get("model")
    assert used is None or next(used.parameters()).is_cuda
    assert list((tmp_path / "figures").rglob("*.png")) and (tmp_path / "out" / "results.json").exists()

"""Every notebook with `-p preset gpt2-small` alone, on a tiny model under its name: it runs, or says at once why not."""

import cells
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from steerkit.book import run
from steerkit.engine.generate import Arm, Sampling, Work
from steerkit.engine.lab import Lab
from steerkit.files import ROOT
from steerkit.judges import coherence, panel
from steerkit.methods.corrsteer import trial
from steerkit.methods.output_scores import score
from steerkit.methods.sae_ts import calibration
from steerkit.models import load
from steerkit.questions import Task
from steerkit.scores import axbench
from steerkit.training import quality

REFUSED = {
    "03_feature_effects": (ValueError, r"gpt2-small, layer 7: expected measured effects.*recipes\.effects --preset gpt2-small"),
    "04_sae_ts": (ValueError, r"gpt2-small, layer 7: expected measured effects"),
    "05_fgaa": (ValueError, r"gpt2-small, layer 7: expected measured effects"),
    "06_output_scores": (
        FileNotFoundError,
        r"scores of gpt2-small's features.*recipes\.scores --preset gpt2-small.*--layers 0 1 2",
    ),
    "07_corrsteer": (ValueError, r"facts: expected a model with a chat template.*gpt2-small has none"),
}


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """A hub cache with a tiny GPT-2 that has no chat template, and SAEs of the released (ReLU) kind for all 12 layers."""
    hub = tiny.offline_hub(monkeypatch, tmp_path / "hub")
    spec = load.preset("gpt2-small")
    tiny.put_model(hub, spec.hub, "gpt2", n_layers=12)
    (tiny.snapshot(hub, spec.hub) / "chat_template.jinja").unlink()
    chosen = spec.sae_set()
    for layer in chosen.layers:
        tiny.put_sae(hub, chosen.release, chosen.sae_id(layer), tiny.planted())
    tiny.shrink(monkeypatch, chosen.release)
    monkeypatch.setattr(load, "self_check", lambda *_: [])  # the planted SAEs are not as sparse as the released ones
    monkeypatch.setattr(coherence, "embedded_judge", lambda dtype="": lambda texts, prompts=None: np.ones(len(texts)))
    return spec


def notebook(name, tmp_path, **given):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    given |= {"preset": "gpt2-small", "out_dir": str(tmp_path / "out"), "figures_dir": str(tmp_path / "figures")}
    plt.switch_backend("Agg")
    try:
        return cells.run_cells(path, run.check_parameters(run.parameters(nbformat.read(path, 4)), given))
    finally:
        plt.close("all")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_said_in_the_first_cell(name, gpt2, tmp_path, monkeypatch):
    kind, words = REFUSED[name]
    if name != "07_corrsteer":  # the others know it before they open the model
        monkeypatch.setattr(load, "load_model", lambda *_a, **_k: pytest.fail("the model was opened first"))
    with pytest.raises(kind, match=words):
        notebook(name, tmp_path)


def test_the_basics_follow_the_preset(gpt2, tmp_path):
    space = notebook("01_steering_basics", tmp_path, topics=["love"], scales=[5.0], n_samples=2, n_random=1, max_new_tokens=4, n_boot=100)
    assert space["layer"] == space["v"].layer == 7 and space["v"].preset == "gpt2-small"


def test_training_takes_relu_saes_and_shows_no_card_of_another_preset(gpt2, tmp_path, capsys):
    small = {"train_tokens": 2000, "epochs": 2.0, "d_sae": 96, "k": 8, "test_rows": 4}
    space = notebook("02_train_saes", tmp_path, **small)
    assert space["card"] is None and "No quality card is shipped for gpt2-small" in capsys.readouterr().out
    assert type(space["shipped"][7]).__name__ == "StandardSAE" and type(space["small"]).__name__ == "JumpReLUSAE"
    assert not (tmp_path / "figures" / "02_train_saes" / "quality_by_layer.png").exists()


def test_a_layer_is_the_one_asked_for_or_the_presets_own():
    spec = load.preset("gpt2-small")
    assert (spec.layer(), spec.layer(-1), spec.layer(3), spec.layer(0)) == (7, 7, 3, 0)
    for wrong in (12, -2):
        with pytest.raises(ValueError, match=f"expected a layer with an SAE, .*or -1 for the preset's own, got {wrong}"):
            spec.layer(wrong)


def test_scores_of_layers_that_were_not_scored_are_refused(tmp_path):
    (tmp_path / "pythia-70m").mkdir()
    pd.DataFrame({"layer": [1, 1, 2], "feature": [0, 1, 0]}).to_csv(tmp_path / "pythia-70m" / "scores.csv.gz", index=False)
    assert len(score.known(str(tmp_path), "pythia-70m", [1])) == 2
    with pytest.raises(ValueError, match=r"expected scores of layers \[1, 4\], got none of \[4\]"):
        score.known(str(tmp_path), "pythia-70m", [1, 4])


def test_densities_say_whose_text_they_were_counted_on():
    assert "shipped" in quality.density_source("smollm2-135m", 13, "data/own_text.jsonl.gz")
    assert "the embedded model wrote" in quality.density_source("gemma-2-2b", 12, "data/own_text.jsonl.gz")
    assert quality.density_source("gemma-2-2b", 12, "NeelNanda/pile-10k") == "counted here, on NeelNanda/pile-10k"


def test_calibration_rows_without_a_first_token_hold_text_alone():
    text, tok = "abcdefghij" * 10, tiny.tokenizer(bos=False)
    rows = calibration.calibration_rows(tok, text, rows=3, length=8)
    assert [tok.decode(row) for row in rows] == [text[8 * i : 8 * i + 8] for i in (0, 4, 8)]
    assert calibration.calibration_rows(tiny.tokenizer(), text, rows=3, length=8)[:, 0].tolist() == [1, 1, 1]


def test_coherence_is_judged_by_the_embedded_model_whatever_wrote_the_texts(monkeypatch):
    opened, judge = [], (tiny.model("llama", seed=3), tiny.tokenizer())
    monkeypatch.setattr(load, "load_model", lambda spec, **_: opened.append(spec.name) or judge)
    coherence.embedded_judge.cache_clear()
    prompts, texts = ["Once", "So", "Once"], [" upon a time there was a cat.", " zq zq zq zq", " upon a time there was a cat."]
    asked = pd.DataFrame({"prompt": prompts, "text": texts}, index=[7, 3, 5])
    panels = [panel(), panel()]
    assert not opened  # not before it is asked
    found = [one for p in panels for one in p.score([(p.coherence, asked)], Work(progress=False))]
    coherence.embedded_judge.cache_clear()
    assert opened == ["smollm2-135m"] and found[0].index.tolist() == [7, 3, 5]  # once, for all calls
    np.testing.assert_allclose(found[0], coherence.coherence_judge(*judge)(texts, prompts))
    np.testing.assert_array_equal(*found)


def test_a_model_without_a_chat_template_is_asked_in_plain_text():
    tok, asked = tiny.tokenizer(), []
    tok.chat_template = None
    model = tiny.model("llama")
    model.base_model.register_forward_pre_hook(lambda _m, _a, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True)
    lab, arms = Lab(load.preset("pythia-70m"), model, tok), [Arm("none")]
    axbench.steer(lab, arms, ["Why?", "Who?"], sampling=Sampling(max_new_tokens=2), work=Work(progress=False))
    assert tok.decode(asked[0][0]) == "<bos>Why" and torch.is_tensor(asked[0])
    chat, plain = (Task(name, "letter", 1, name == "x", {"selection": ()}) for name in "xy")
    with pytest.raises(ValueError, match=r"x: expected a model with a chat template.*pythia-70m has none"):
        trial.check_chat(lab, [chat, plain])
    trial.check_chat(lab, [plain])

"""What a decode refuses, and what it warns of: settings out of range, numbers that are none, arms that push nothing."""

import warnings

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from steered import PROMPTS, QUIET, D, run, vec

import steerkit.engine.generate as G
from steerkit.engine.generate import BASELINE, Arm, Sampling, Work, generate, grid
from steerkit.engine.steer import Add, Boost


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"samples": 0}, "at least one"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"stop": (None,)}, r"stop \(token ids\): expected a whole number, got None"),
    ],
)
def test_settings_out_of_range_are_clear_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        run(tiny.lab(), **settings)


def test_a_vector_of_another_model_is_refused_before_anything_is_written(tmp_path):
    wrong = Arm("wrong", (Add(1, torch.ones(D + 2), 1.0),))
    with pytest.raises(ValueError, match="another model"):
        generate(tiny.lab(), ["a"], [wrong], work=Work(out=tmp_path / "x.jsonl"))
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("name", ["arm", "scale", "text", "row"])
def test_a_label_named_like_a_column_is_refused(name):
    with pytest.raises(ValueError, match=rf"v1: expected labels that are no columns of the table, got \['{name}'\]: rename"):
        Arm("v1", (), 1.0, {name: 3, "topic": "love"})
    with pytest.raises(ValueError, match="rename them"):
        grid([vec(1)], [2.0], **{name: "x"})


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(G, "decode", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tiny.lab())


def poisoned(value: float, *, where=11):
    """A model with one logit that is not finite."""
    lab = tiny.lab()

    def spoil(_module, _args, logits):
        logits = logits.clone()
        logits[..., where] = value
        return logits

    lab.hf.lm_head.register_forward_hook(spoil)
    return lab


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"allowed": (20, 30)}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_drawn_from_logits_that_are_not_finite(tmp_path, settings, value):
    arms, out = [Arm("spoiled", (vec(1).edit(3.0),), 3.0)], tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match=r"row 0, arm 'spoiled', scale 3: .*torch.float32"):
        generate(poisoned(value), ["I think"], arms, sampling=Sampling(**settings), work=Work(out=out, progress=False))
    assert len(out.read_text().splitlines()) == 1  # the key alone


def test_a_token_masked_by_minus_infinity_is_never_drawn_and_no_error():
    first = generate(tiny.lab(), ["I think"], sampling=Sampling(temperature=0.0, max_new_tokens=1), work=QUIET).tokens[0][0]
    five = Sampling(temperature=0.0, max_new_tokens=5)
    assert first not in generate(poisoned(-float("inf"), where=first), ["I think"], sampling=five, work=QUIET).tokens[0]


def test_a_push_out_of_range_names_its_own_rows_and_arms():
    lab = tiny.lab(hf=tiny.model("llama").half())
    arms = [Arm("mild", (vec(1).edit(2.0),), 2.0), Arm("wild", (vec(1).edit(1e6),), 1e6)]
    with pytest.raises(ValueError, match=r"row 1, arm 'wild', scale 1e\+06; row 3, arm 'wild'.*torch.float16") as caught:
        generate(lab, ["I think", "I think so"], arms, work=QUIET)
    assert "mild" not in str(caught.value)


def test_arms_that_changed_nothing_are_named():
    lab, two = tiny.lab(), Sampling(max_new_tokens=2)
    dull = tiny.planted_sae()
    with torch.no_grad():
        dull.threshold.fill_(1e9)
    arms = [BASELINE, Arm("silent", (Boost(1, dull, 5, 3.0),), 3.0), Arm("zero", (vec(1).edit(0.0),)), Arm("loud", (vec(1).edit(3.0),))]
    with pytest.warns(UserWarning, match=r"1 of 4 arms changed no position in any row: 'silent' \(scale 3\)"):
        generate(lab, PROMPTS, arms, sampling=two, window="last", work=QUIET)
    with pytest.warns(UserWarning, match="'loud'"):
        generate(lab, PROMPTS, arms[-1:], sampling=Sampling(max_new_tokens=1), window="generated", work=QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(lab, PROMPTS, [BASELINE, *arms[2:]], sampling=two, window="last", work=QUIET)


def test_one_string_is_not_a_list_of_letters_and_a_gap_is_no_prompt():
    for prompts, message in (("I think", "put it in a list"), (pd.Series(["So", np.nan]), "expected strings, got")):
        with pytest.raises(ValueError, match=message):
            generate(tiny.lab(), prompts, work=QUIET)

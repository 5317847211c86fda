"""Log-likelihoods of options against a float64 oracle: the whole model under the public steering context, one option at a time."""

import numpy as np
import pytest
import tiny
import torch
from faults import dies, short_of_memory

import steerkit.engine.options as O
from steerkit.engine.generate import BASELINE, Arm
from steerkit.engine.options import option_logliks
from steerkit.engine.steer import Add, steering
from steerkit.engine.tokens import prompt_ids
from steerkit.store import Work

PROMPTS = ["I think", "a", "The longest of the prompts here, longer than any window", "So", "a"]
OPTIONS = [[" so", " not at all"], [" b", " c", " defghijk"], [" yes", " no"], [" what", " it is"], [" b", " xy"]]
QUIET = Work(progress=False)


def arms(scale=3.0):
    vectors = torch.randn(3, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    both = (Add(1, vectors[0], scale), Add(2, vectors[1], scale))
    return [BASELINE, Arm("one", Add(0, vectors[2], scale), 1.0, {"method": "x"}), Arm("two layers", both, 2.0)]


def oracle(lab, prompt, option, arm, chat=False):
    """One row, no cache, no pads, float64; the window counts from the prompt's own length."""
    ids = prompt_ids(lab.tokenizer, prompt, chat=chat)
    told = lab.tokenizer(option, add_special_tokens=False)["input_ids"]
    edits = [Add(e.layer, e.vector.double(), float(e.scale)) for e in arm.edits]
    with torch.inference_mode(), steering(lab, edits, window="last", prompt_length=len(ids)):
        logp = lab.hf(input_ids=torch.tensor([ids + told]), use_cache=False).logits[0].log_softmax(-1)
    assert logp.dtype == torch.float64
    return sum(logp[len(ids) - 1 + t, token].item() for t, token in enumerate(told))


@pytest.mark.parametrize("kind,chat", [("llama", False), ("gemma2", False), ("gpt2", False), ("llama", True)])
def test_every_option_under_every_arm_equals_a_float64_oracle(kind, chat):
    """Batches mix lengths, arms and numbers of options; Gemma's sliding window of 16 is shorter than one prompt."""
    found = option_logliks(tiny.lab(kind), PROMPTS, OPTIONS, arms(), chat=chat, work=Work(7, progress=False))
    lab = tiny.lab(kind, hf=tiny.model(kind).double())
    assert found.arm.tolist() == [a.name for a in arms()] * 5 and found.method.dropna().unique().tolist() == ["x"]
    for row, (p, arm) in enumerate((p, arm) for p in range(5) for arm in arms()):
        expected = [oracle(lab, PROMPTS[p], option, arm, chat) for option in OPTIONS[p]]
        np.testing.assert_allclose(found.loglik[row], expected, atol=2e-3, rtol=1e-4)
    steered, plain = found[found.arm == "one"].loglik.tolist(), found[found.arm == "baseline"].loglik.tolist()
    assert np.median(np.abs(np.concatenate(steered) - np.concatenate(plain))) > 0.05


def test_the_batch_does_not_matter():
    whole = option_logliks(tiny.lab(), PROMPTS, OPTIONS, arms(), work=QUIET)
    for size in (1, 4, 1000):
        other = option_logliks(tiny.lab(), PROMPTS, OPTIONS, arms(), work=Work(size, progress=False))
        for a, b in zip(whole.loglik, other.loglik):
            np.testing.assert_allclose(a, b, atol=1e-3)


def test_all_options_of_one_token_behind_a_prompt_sum_to_one():
    lab = tiny.lab()
    tokens = [lab.tokenizer.decode([i]) for i in range(3, lab.tokenizer.vocab_size)]
    tokens = [t for t in tokens if lab.tokenizer(t, add_special_tokens=False)["input_ids"].__len__() == 1]
    (found,) = option_logliks(lab, ["So"], [tokens], work=QUIET).loglik
    with torch.inference_mode():
        p = lab.hf(input_ids=torch.tensor([prompt_ids(lab.tokenizer, "So")])).logits[0, -1].softmax(-1)
    ids = [lab.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in tokens]
    assert np.exp(found).sum() == pytest.approx(p[ids].sum().item(), abs=1e-4) and len(tokens) > 100


def test_a_run_that_was_cut_off_carries_on(tmp_path, monkeypatch):
    out, ask = tmp_path / "scores-{key}.jsonl", (tiny.lab(), PROMPTS, OPTIONS, arms())
    whole = option_logliks(*ask, work=Work(9, progress=False))
    calls = dies(monkeypatch, O, "continuation_logliks", at=3)
    with pytest.raises(KeyboardInterrupt):
        option_logliks(*ask, work=Work(9, out, progress=False))
    found = option_logliks(*ask, work=Work(9, out, progress=False))
    assert found.loglik.tolist() == whole.loglik.tolist() and len(calls) == 3 + 3  # five batches; two were done
    option_logliks(tiny.lab(), PROMPTS, OPTIONS, arms(scale=4.0), work=Work(9, out, progress=False))
    assert len(list(tmp_path.iterdir())) == 2, "another push is another run"


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    whole = option_logliks(tiny.lab(), PROMPTS, OPTIONS, work=QUIET)
    short_of_memory(monkeypatch, O, "continuation_logliks", rows=5, error=torch.OutOfMemoryError("pretend"))
    for a, b in zip(whole.loglik, option_logliks(tiny.lab(), PROMPTS, OPTIONS, work=QUIET).loglik):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_what_cannot_be_scored_is_a_clear_error():
    lab = tiny.lab()
    for options in (OPTIONS[:2], [*OPTIONS[:4], []], [*OPTIONS[:4], [" b", ""]]):
        with pytest.raises(ValueError, match="options of at least one token for each of 5 prompts"):
            option_logliks(lab, PROMPTS, options, work=QUIET)
    with pytest.raises(ValueError, match=r"row 1, arm 'far', scale 7: expected finite losses.*float16"):
        half = tiny.lab(hf=tiny.model("llama").half())
        option_logliks(half, ["So"], [[" it"]], [BASELINE, Arm("far", Add(1, torch.full((tiny.D_MODEL,), 3e4), 10.0), 7.0)], work=QUIET)
    with pytest.raises(ValueError, match="layer: expected 0 to 2"):
        option_logliks(lab, ["So"], [[" it"]], [Arm("gone", Add(9, torch.ones(tiny.D_MODEL)))], work=QUIET)

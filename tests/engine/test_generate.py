"""Batched decoding: batch equals one-by-one, labels come back, and Hugging Face as the oracle."""

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from faults import short_of_memory
from steered import PROMPTS, QUIET, D, arms, run, vec

import steerkit.engine.generate as G
from steerkit.engine.generate import BASELINE, Arm, Sampling, Work, generate, grid, stack
from steerkit.engine.steer import Boost, steering
from steerkit.engine.tokens import prompt_ids, stop_tokens
from steerkit.vectors import sae_row

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)


@pytest.mark.parametrize("window", ["all", "prompt", "last", "generated"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_equals_one_by_one(window, temperature):
    """Left-padded rows with different edits give what each gives alone, greedy and sampled."""
    lab = tiny.lab()
    settings = {"window": window, "temperature": temperature, "samples": 2, "top_k": 20}
    together, alone = run(lab, batch_size=64, **settings), run(lab, batch_size=1, **settings)
    assert together.tokens.tolist() == alone.tokens.tolist()
    assert together.changed.tolist() == alone.changed.tolist()
    np.testing.assert_allclose(together.ratio, alone.ratio, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "gptneox"])
@pytest.mark.parametrize("window", ["all", "last", "generated"])
def test_greedy_equals_hugging_face_generate_under_the_same_hook(kind, window):
    lab, vector = tiny.lab(kind), vec(1)
    ours = generate(lab, PROMPTS, grid([vector], [5.0]), sampling=GREEDY, window=window, work=QUIET)
    for prompt, tokens in zip(PROMPTS, ours.tokens):
        ids = torch.tensor([prompt_ids(lab.tokenizer, prompt)])
        with steering(lab, vector.edit(5.0), window=window):
            out = lab.hf.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
            )
        assert tokens == out[0, ids.shape[1] :].tolist()


def test_changed_counts_the_window_exactly():
    three = Sampling(max_new_tokens=3)
    frame = generate(tiny.lab(), ["abcd", "a"], grid([vec(1)], [5.0]), sampling=three, window="last", work=QUIET)
    assert frame.changed.tolist() == [3, 3]  # last prompt token and two fed tokens; the third new token is never fed
    frame = generate(tiny.lab(), ["abcd", "a"], grid([vec(1)], [5.0]), sampling=three, work=QUIET)
    assert frame.changed.tolist() == [5 + 2, 2 + 2]
    assert (frame.ratio > 0).all()


def test_zero_scale_rows_equal_the_baseline():
    frame = generate(tiny.lab(), PROMPTS, [BASELINE, Arm("zero", (vec(1).edit(0.0),))], sampling=GREEDY, work=QUIET)
    base, zero = (frame[frame.arm == name] for name in ("baseline", "zero"))
    assert base.tokens.tolist() == zero.tokens.tolist() and zero.changed.tolist() == [0] * 4


def test_stop_tokens_end_a_row_and_finished_rows_leave_the_batch():
    """With a stop token, every row is the full row cut at its first stop token, whatever the others do."""
    lab, settings = tiny.lab(), {"samples": 3, "max_new_tokens": 12, "top_k": 10}
    full = run(lab, **settings)
    stop = int(np.bincount(np.concatenate(full.tokens.tolist())).argmax())
    cut = run(lab, **settings, stop=(stop,))
    expected = [t[: t.index(stop)] if stop in t else t for t in full.tokens]
    assert cut.tokens.tolist() == expected and any(len(t) < 12 for t in expected)


def test_labels_come_back_as_columns():
    """Behind the arm, in the order in which they first occur; an arm without one has none."""
    labelled = [*grid([vec(1)], [2.0, 4.0], topic="love", feature=7), Arm("odd", (vec(2).edit(1.0),), 1.0, {"topic": "war", "seed": 3})]
    frame = generate(tiny.lab(), ["So", "a"], [BASELINE, *labelled], samples=2, sampling=Sampling(max_new_tokens=2), work=QUIET)
    assert list(frame)[:8] == ["row", "prompt", "arm", "topic", "feature", "seed", "scale", "sample"]
    once = frame.drop_duplicates(["arm", "scale"])
    assert once.topic.fillna("").tolist() == ["", "love", "love", "war"]
    assert once.feature.fillna(0).tolist() == [0, 7, 7, 0] and once.seed.fillna(0).tolist() == [0, 0, 0, 3]
    assert frame[frame.topic == "love"].arm.tolist() == ["v1"] * 8
    plain = generate(tiny.lab(), ["So"], [BASELINE], sampling=Sampling(max_new_tokens=2), work=QUIET)
    assert list(plain) == ["row", "prompt", "arm", "scale", "sample", "text", "tokens", "changed", "ratio"]


def test_labels_do_not_touch_the_texts_nor_what_is_kept(tmp_path):
    lab, sampling, work = tiny.lab(), Sampling(max_new_tokens=3), Work(out=tmp_path / "t.jsonl", progress=False)
    bare = generate(lab, PROMPTS, grid([vec(1)], [4.0]), sampling=sampling, work=work)
    named = generate(lab, PROMPTS, grid([vec(1)], [4.0], topic="love"), sampling=sampling, work=work)  # the same file carries on
    pd.testing.assert_frame_equal(named.drop(columns="topic"), bare)
    assert named.topic.tolist() == ["love"] * 4


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("pretend"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_changes_no_text(monkeypatch, error):
    lab = tiny.lab()
    expected = run(lab, batch_size=24)
    sizes = short_of_memory(monkeypatch, G, "decode", rows=6, error=error)
    assert run(lab, batch_size=24).tokens.tolist() == expected.tokens.tolist()
    assert max(sizes) == 24 and sizes[-1] <= 6


def test_stack_gives_each_row_its_own_edit():
    edits = stack(arms())
    resid = torch.randn(6, 1, D)
    for row, arm in enumerate(arms()):
        for layer in (0, 1, 2):
            want, got = resid[row : row + 1], resid
            for edit in arm.edits:
                want = want + edit.delta(want) if edit.layer == layer else want
            for edit in edits:
                got = got + edit.delta(got) if edit.layer == layer else got
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-5, atol=1e-5)


def test_samples_share_the_model_until_they_part():
    """Near-greedy samples of one arm cost hardly more than one; their texts are those of each alone."""
    lab, fed = tiny.lab(), []
    settings = {"samples": 16, "sampling": Sampling(top_p=0.05, max_new_tokens=8), "arms": grid([vec(1)], [4.0])}
    handle = lab.hf.base_model.register_forward_pre_hook(lambda _m, _a, kw: fed.append(len(kw["input_ids"])), with_kwargs=True)
    together = generate(lab, ["So"], work=Work(16, progress=False), **settings)
    handle.remove()
    alone = generate(lab, ["So"], work=Work(1, progress=False), **settings)
    assert together.tokens.tolist() == alone.tokens.tolist()
    assert together.changed.tolist() == alone.changed.tolist()
    distinct = [len({tuple(t[:n]) for t in together.tokens}) for n in range(8)]
    assert fed[1:] == distinct and max(distinct) < 16  # the prompt, then one row for each distinct beginning


@pytest.mark.parametrize("window,fed", [("last", [1, 8]), ("all", [8, 8])])
def test_a_prompt_goes_through_the_model_once_for_all_arms_that_leave_it_alone(window, fed):
    """Eight rows: how many go through the model up to the last prompt token, and how many from there on."""
    lab, seen = tiny.lab(), []
    handle = lab.hf.base_model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    pushes = grid([vec(1), vec(2)], [2.0, 4.0])
    generate(lab, ["So it is", "So it is"], pushes, sampling=Sampling(max_new_tokens=1), window=window, work=QUIET)
    handle.remove()
    assert seen == fed


@pytest.mark.parametrize("compiled", ["model", "base_model"])
def test_a_compiled_model_gives_the_steered_texts(compiled):
    lab, settings = tiny.lab(), {"temperature": 0.0, "max_new_tokens": 4}
    expected = run(lab, **settings)
    ids = torch.tensor([prompt_ids(lab.tokenizer, "I think")])
    (lab.hf if compiled == "model" else lab.hf.base_model).compile(backend="eager")
    lab.hf(input_ids=ids)  # now there is code without hooks
    found = run(lab, **settings)
    assert found.tokens.tolist() == expected.tokens.tolist() and found.changed.tolist() == expected.changed.tolist()


def test_a_text_ends_where_hugging_face_ends_it():
    """The generation config names two end tokens, of which the tokenizer knows one."""
    lab = tiny.lab()
    model, tok = lab.hf, lab.tokenizer
    model.generation_config.eos_token_id = None
    free = generate(lab, PROMPTS, sampling=Sampling(temperature=0.0, max_new_tokens=12), work=QUIET)
    model.generation_config.eos_token_id = [tok.eos_token_id, end := free.tokens[0][3]]
    stop = tuple(stop_tokens(tok, model))
    found = generate(lab, PROMPTS, sampling=Sampling(temperature=0.0, max_new_tokens=12, stop=stop), work=QUIET)
    for prompt, tokens in zip(PROMPTS, found.tokens):
        ids = torch.tensor([prompt_ids(tok, prompt)])
        theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert tokens == [t for t in theirs.tolist() if t not in (end, tok.eos_token_id, tok.pad_token_id)]
    assert len(found.tokens[0]) <= 3


def test_numbers_of_numpy_and_pandas_give_what_pythons_give(tmp_path):
    lab = tiny.lab()
    at, sae = lab.at(1), lab.sae(1)
    plain = {"max_new_tokens": 4, "top_k": 5, "seed": 3}
    rows = [sae_row(at, 5), sae_row(at, {3: 0.5, 4: 1.0})]
    boost = Arm("boost", (Boost(1, sae, 5, 2.0),), 2.0)
    settings = {"window": "last", "work": Work(out=tmp_path / "t.jsonl", progress=False)}
    expected = generate(lab, PROMPTS, [*grid(rows, [2.0, 4.0]), boost], samples=2, sampling=Sampling(**plain, stop=(7,)), **settings)
    odd = Sampling(**{k: np.int64(v) for k, v in plain.items()}, stop=tuple(np.array([7])))
    at = lab.at(np.int64(1))
    rows = [sae_row(at, np.int64(5)), sae_row(at, {np.int64(3): np.float32(0.5), 4: 1})]
    boost = Arm("boost", [Boost(np.int64(1), sae, np.int64(5), np.float32(2.0))], np.float32(2.0))
    arms = [*grid(rows, pd.Series([2.0, 4.0], dtype="float32")), boost]
    settings["work"] = Work(np.int64(64), tmp_path / "t.jsonl", progress=False)  # the same key too
    found = generate(lab, pd.Series(PROMPTS, index=[4, 3, 2, 1]), arms, samples=np.int64(2), sampling=odd, **settings)
    pd.testing.assert_frame_equal(found, expected)

"""Batched decoding: batch equals one-by-one, noise keyed by row, resume to the same bytes, and Hugging Face as the oracle."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

import steerkit.engine.generate as G
from steerkit.engine.decode import Sampling, draw, uniforms
from steerkit.engine.generate import BASELINE, Arm, generate, grid, prompt_ids, stack
from steerkit.engine.packed import packed_encode, packed_linears
from steerkit.engine.steer import Ablate, Add, Boost, steering
from steerkit.engine.tokens import stop_tokens
from steerkit.store import Journal
from steerkit.vectors import SteeringVector, sae_row

D = tiny.D_MODEL
PROMPTS = ["I think", "a", "The longest of the prompts here", "So"]


def vec(seed: int, layer: int = 1) -> SteeringVector:
    return SteeringVector(f"v{seed}", torch.randn(D, generator=torch.Generator().manual_seed(seed)), layer, "tiny")


def arms(window="last"):
    """A baseline, two vectors, two layers, an ablation and (where it is defined) a boost: slots that rows share unevenly."""
    boost = [Arm("boost", (Boost(1, tiny.planted_sae(), 5, 3.0),))] if window in ("last", "generated") else []
    return [
        BASELINE,
        *grid([vec(1), vec(2, layer=2)], [4.0]),
        Arm("two", (vec(1).edit(2.0), vec(3, layer=0).edit(1.0)), 2.0),
        Arm("ablate", (Ablate(1, vec(4).direction),)),
        *boost,
    ]


def run(model, **settings):
    settings = {"max_new_tokens": 6, "progress": False, "window": "last"} | settings
    return generate(model, tiny.tokenizer(), PROMPTS, arms(settings["window"]), **settings)


@pytest.mark.parametrize("window", ["all", "prompt", "last", "generated"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_equals_one_by_one(window, temperature):
    """Left-padded rows with different edits give what each gives alone, greedy and sampled."""
    model = tiny.model("llama")
    settings = {"window": window, "temperature": temperature, "samples": 2, "top_k": 20}
    together, alone = run(model, batch_size=64, **settings), run(model, batch_size=1, **settings)
    assert together.tokens.tolist() == alone.tokens.tolist()
    assert together.changed.tolist() == alone.changed.tolist()
    np.testing.assert_allclose(together.ratio, alone.ratio, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen3", "gpt2", "gptneox"])
@pytest.mark.parametrize("window", ["all", "last", "generated"])
def test_greedy_equals_hugging_face_generate_under_the_same_hook(kind, window):
    model, tok = tiny.model(kind), tiny.tokenizer()
    vector = vec(1)
    ours = generate(model, tok, PROMPTS, grid([vector], [5.0]), temperature=0.0, max_new_tokens=8, window=window, progress=False)
    for prompt, tokens in zip(PROMPTS, ours.tokens):
        ids = torch.tensor([prompt_ids(tok, prompt)])
        with steering(model, vector.edit(5.0), window=window):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                min_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
            )
        assert tokens == out[0, ids.shape[1] :].tolist()


def test_changed_counts_the_window_exactly():
    frame = generate(
        tiny.model("llama"),
        tiny.tokenizer(),
        ["abcd", "a"],
        grid([vec(1)], [5.0]),
        max_new_tokens=3,
        window="last",
        progress=False,
    )
    assert frame.changed.tolist() == [3, 3]  # last prompt token and two fed tokens; the third new token is never fed
    frame = generate(tiny.model("llama"), tiny.tokenizer(), ["abcd", "a"], grid([vec(1)], [5.0]), max_new_tokens=3, progress=False)
    assert frame.changed.tolist() == [5 + 2, 2 + 2]
    assert (frame.ratio > 0).all()


def test_zero_scale_rows_equal_the_baseline():
    model = tiny.model("llama")
    frame = generate(
        model,
        tiny.tokenizer(),
        PROMPTS,
        [BASELINE, Arm("zero", (vec(1).edit(0.0),))],
        temperature=0.0,
        max_new_tokens=8,
        progress=False,
    )
    base, zero = (frame[frame.arm == name] for name in ("baseline", "zero"))
    assert base.tokens.tolist() == zero.tokens.tolist() and zero.changed.tolist() == [0] * 4


def test_stop_tokens_end_a_row_and_finished_rows_leave_the_batch():
    """With a stop token, every row is the full row cut at its first stop token, whatever the others do."""
    model = tiny.model("llama")
    full = run(model, samples=3, max_new_tokens=12, top_k=10)
    stop = int(np.bincount(np.concatenate(full.tokens.tolist())).argmax())
    cut = run(model, samples=3, max_new_tokens=12, top_k=10, stop=[stop])
    expected = [t[: t.index(stop)] if stop in t else t for t in full.tokens]
    assert cut.tokens.tolist() == expected and any(len(t) < 12 for t in expected)


class Killed(BaseException):
    """Stands for Ctrl-C."""


def test_killed_half_way_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    model = tiny.model("llama")
    run(model, batch_size=5, out=tmp_path / "whole.jsonl")
    calls, real = [], G.decode

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(G, "decode", dying)
    with pytest.raises(Killed):
        run(model, batch_size=5, out=tmp_path / "resumed.jsonl")
    with (tmp_path / "resumed.jsonl").open("ab") as file:
        file.write(b'{"row": 17, "tex')  # and the machine died while writing
    done = len(calls)
    run(model, batch_size=5, out=tmp_path / "resumed.jsonl")
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(calls) - done == 5 - 2  # 24 rows in 5 batches; two were done


def test_another_run_in_the_same_file_is_refused(tmp_path):
    model = tiny.model("llama")
    run(model, out=tmp_path / "a.jsonl", seed=1)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another run"):
        run(model, out=tmp_path / "a.jsonl", seed=2)
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_full_disk_loses_nothing_already_written(tmp_path, monkeypatch):
    model = tiny.model("llama")
    run(model, batch_size=5, out=tmp_path / "whole.jsonl")
    real, calls = Journal.write, []

    def full(self, rows):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(self, rows)

    monkeypatch.setattr(Journal, "write", full)
    with pytest.raises(OSError, match="No space"):
        run(model, batch_size=5, out=tmp_path / "b.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 5
    run(model, batch_size=5, out=tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("pretend"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_changes_no_text(monkeypatch, error):
    model = tiny.model("llama")
    expected, real, sizes = run(model, batch_size=24), G.decode, []

    def small_memory(model, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 6:
            raise error
        return real(model, prompts, *args, **kwargs)

    monkeypatch.setattr(G, "decode", small_memory)
    assert run(model, batch_size=24).tokens.tolist() == expected.tokens.tolist()
    assert max(sizes) == 24 and sizes[-1] <= 6


def test_noise_depends_on_seed_and_row_only():
    table = uniforms(7, [0, 5, 9], 4)
    np.testing.assert_array_equal(table[1], uniforms(7, [5], 9)[0, :4])
    assert len({*table.flatten().tolist(), *uniforms(8, [0, 5, 9], 4).flatten().tolist()}) == 24
    assert 0.48 < uniforms(0, range(500), 20).mean() < 0.52


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(top_k=3), Sampling(top_p=0.6), Sampling(top_k=4, top_p=0.5)],
)
def test_draws_follow_the_distribution_that_hugging_face_defines(sampling):
    """A fine grid of u against transformers' own temperature, top-k and top-p warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[2.0, 1.5, 0.1, -1.0, 0.0, 1.0]])
    scores = logits
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    u = (torch.arange(20_000) + 0.5) / 20_000
    counts = torch.bincount(draw(logits.expand(len(u), -1), u, sampling), minlength=6) / len(u)
    torch.testing.assert_close(counts, scores.softmax(-1)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype,near", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_packed_linears_agree_with_torch_and_leave_the_model_as_it_was(dtype, near):
    model = tiny.model("llama").to(dtype)
    ids = torch.randint(5, 200, (3, 7))
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with packed_linears(model):
            fast = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
        torch.testing.assert_close(fast, plain, rtol=near, atol=near)
        model.lm_head.weight.mul_(2.0)  # a changed weight is packed again
        with packed_linears(model):
            torch.testing.assert_close(model(input_ids=ids).logits, 2 * plain, rtol=near, atol=10 * near)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_packed_encoder_agrees_with_the_definition_and_follows_its_weights():
    sae, x = tiny.planted_sae(), torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * 20
    for scale in (1.0, 3.0):
        with torch.no_grad():
            sae.W_enc.mul_(scale)  # a changed weight is packed again
            found = packed_encode(sae)(x)
        W, b, theta, b_dec = (p.detach().double() for p in (sae.W_enc, sae.b_enc, sae.threshold, sae.b_dec))
        pre = (x.double() - b_dec * sae.cfg.apply_b_dec_to_input) @ W + b
        torch.testing.assert_close(found.double(), pre.clamp_min(0) * (pre > theta), rtol=1e-4, atol=1e-3)
        assert 0 < (found > 0).float().mean() < 1
    wide = tiny.planted_sae().double()
    assert packed_encode(wide) == wide.encode  # another dtype: its own


def test_packed_linears_may_be_nested():
    model, ids = tiny.model("llama"), torch.randint(5, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with packed_linears(model):
            outer = model(input_ids=ids).logits
            with packed_linears(model):
                inner = model(input_ids=ids).logits
            assert torch.equal(inner, outer) and torch.equal(model(input_ids=ids).logits, outer)
    assert not any("forward" in module.__dict__ for module in model.modules())


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


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"samples": 0}, "at least one"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_settings_out_of_range_are_clear_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        run(tiny.model("llama"), **settings)


def test_a_vector_of_another_model_is_refused_before_anything_is_written(tmp_path):
    wrong = Arm("wrong", (Add(1, torch.ones(D + 2), 1.0),))
    with pytest.raises(ValueError, match="another model"):
        generate(tiny.model("llama"), tiny.tokenizer(), ["a"], [wrong], out=tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(G, "decode", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(tiny.model("llama"))


def test_top_p_over_a_large_vocabulary_equals_a_full_sort():
    """Peaked rows take the short way, flat rows the whole sort; both give what sorting everything gives."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 3000, generator=rng) * torch.linspace(0.0, 12.0, 40)[:, None]
    u = torch.rand(40, generator=rng).double()
    probs, ids = logits.double().softmax(-1).sort(-1, descending=True)
    probs = torch.where(probs.cumsum(-1) - probs >= 0.9, 0.0, probs)
    place = (probs.cumsum(-1) <= u[:, None] * probs.sum(-1, keepdim=True)).sum(-1)
    oracle = ids.gather(-1, place[:, None])[:, 0]
    assert (draw(logits, u, Sampling(top_p=0.9)) == oracle).float().mean() > 0.95  # float32 moves a boundary now and then


def test_samples_share_the_model_until_they_part():
    """Near-greedy samples of one arm cost hardly more than one; their texts are those of each alone."""
    model, tok, fed = tiny.model("llama"), tiny.tokenizer(), []
    settings = {"samples": 16, "top_p": 0.05, "max_new_tokens": 8, "progress": False, "arms": grid([vec(1)], [4.0])}
    handle = model.base_model.register_forward_pre_hook(lambda _m, _a, kw: fed.append(len(kw["input_ids"])), with_kwargs=True)
    together = generate(model, tok, ["So"], batch_size=16, **settings)
    handle.remove()
    alone = generate(model, tok, ["So"], batch_size=1, **settings)
    assert together.tokens.tolist() == alone.tokens.tolist()
    assert together.changed.tolist() == alone.changed.tolist()
    distinct = [len({tuple(t[:n]) for t in together.tokens}) for n in range(8)]
    assert fed[1:] == distinct and max(distinct) < 16  # the prompt, then one row for each distinct beginning


def changed_sae(name: str):
    """The planted SAE with one number, or one setting, another."""
    sae = tiny.planted_sae()
    if name == "apply_b_dec_to_input":
        sae.cfg.apply_b_dec_to_input = not sae.cfg.apply_b_dec_to_input
    else:
        with torch.no_grad():
            getattr(sae, name).view(-1)[-1] += 0.25  # not among the first numbers
    return sae


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold", "apply_b_dec_to_input"])
def test_kept_texts_of_one_sae_are_not_those_of_another(tmp_path, name):
    model, tok, out = tiny.model("llama"), tiny.tokenizer(), tmp_path / "texts.jsonl"
    settings = {"max_new_tokens": 3, "window": "last", "out": out, "progress": False}
    generate(model, tok, PROMPTS, [Arm("boost", (Boost(1, tiny.planted_sae(), 5, 3.0),))], **settings)
    generate(model, tok, PROMPTS, [Arm("boost", (Boost(1, tiny.planted_sae(), 5, 3.0),))], **settings)  # an equal SAE carries on
    with pytest.raises(ValueError, match="holds another run"):
        generate(model, tok, PROMPTS, [Arm("boost", (Boost(1, changed_sae(name), 5, 3.0),))], **settings)


@pytest.mark.parametrize(
    "change",
    [
        lambda call: call | {"arms": [BASELINE, Arm("other")]},
        lambda call: call | {"arms": [Arm("baseline", (), 7.0)]},
        lambda call: call | {"arms": [Arm("baseline", (Ablate(1, vec(1).direction),))]},
        lambda call: call | {"model": tiny.model("llama").bfloat16()},
        lambda call: call | {"model": one_weight_moved()},
        lambda call: call | {"model": other_rope()},
        lambda call: call | {"prompts": ["<bos>I think"]},  # the same tokens, another table
    ],
)
def test_whatever_changes_the_table_changes_the_key(tmp_path, change):
    call = {"model": tiny.model("llama"), "tokenizer": tiny.tokenizer(), "prompts": ["I think"], "arms": [BASELINE]}
    settings = {"max_new_tokens": 2, "out": tmp_path / "t.jsonl", "progress": False}
    generate(**call, **settings)
    generate(**call, **settings, batch_size=3)  # float32: the batch size says nothing
    with pytest.raises(ValueError, match="holds another run"):
        generate(**change(call), **settings)


def one_weight_moved():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1.0
    return model


def other_rope():
    model = tiny.model("llama")
    model.config.rope_parameters["rope_theta"] = 5.0
    return model


def test_the_batch_size_is_part_of_the_key_where_rounding_depends_on_it(tmp_path):
    model, settings = tiny.model("llama").bfloat16(), {"max_new_tokens": 2, "out": tmp_path / "t.jsonl", "progress": False}
    generate(model, tiny.tokenizer(), PROMPTS, batch_size=4, **settings)
    with pytest.raises(ValueError, match="holds another run"):
        generate(model, tiny.tokenizer(), PROMPTS, batch_size=2, **settings)


def poisoned(value: float, *, where=11):
    """A model with one logit that is not finite."""
    model = tiny.model("llama")

    def spoil(_module, _args, logits):
        logits = logits.clone()
        logits[..., where] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"allowed": [20, 30]}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_drawn_from_logits_that_are_not_finite(tmp_path, settings, value):
    arms, out = [Arm("spoiled", (vec(1).edit(3.0),), 3.0)], tmp_path / "t.jsonl"
    with pytest.raises(ValueError, match=r"row 0, arm 'spoiled', scale 3: .*torch.float32"):
        generate(poisoned(value), tiny.tokenizer(), ["I think"], arms, out=out, progress=False, **settings)
    assert len(out.read_text().splitlines()) == 1  # the key alone


def test_a_token_masked_by_minus_infinity_is_never_drawn_and_no_error():
    model, tok = tiny.model("llama"), tiny.tokenizer()
    first = generate(model, tok, ["I think"], temperature=0.0, max_new_tokens=1, progress=False).tokens[0][0]
    masked = generate(poisoned(-float("inf"), where=first), tok, ["I think"], temperature=0.0, max_new_tokens=5, progress=False)
    assert first not in masked.tokens[0]


def test_a_push_out_of_range_names_its_own_rows_and_arms():
    model, tok = tiny.model("llama").half(), tiny.tokenizer()
    arms = [Arm("mild", (vec(1).edit(2.0),), 2.0), Arm("wild", (vec(1).edit(1e6),), 1e6)]
    with pytest.raises(ValueError, match=r"row 1, arm 'wild', scale 1e\+06; row 3, arm 'wild'.*torch.float16") as caught:
        generate(model, tok, ["I think", "I think so"], arms, progress=False)
    assert "mild" not in str(caught.value)


def test_arms_that_changed_nothing_are_named():
    model, tok = tiny.model("llama"), tiny.tokenizer()
    dull = tiny.planted_sae()
    with torch.no_grad():
        dull.threshold.fill_(1e9)
    arms = [BASELINE, Arm("silent", (Boost(1, dull, 5, 3.0),), 3.0), Arm("zero", (vec(1).edit(0.0),)), Arm("loud", (vec(1).edit(3.0),))]
    settings = {"max_new_tokens": 2, "progress": False}
    with pytest.warns(UserWarning, match=r"1 of 4 arms changed no position in any row: 'silent' \(scale 3\)"):
        generate(model, tok, PROMPTS, arms, window="last", **settings)
    with pytest.warns(UserWarning, match="'loud'"):
        generate(model, tok, PROMPTS, arms[-1:], window="generated", max_new_tokens=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tok, PROMPTS, [BASELINE, *arms[2:]], window="last", **settings)


@pytest.mark.parametrize("compiled", ["model", "base_model"])
def test_a_compiled_model_gives_the_steered_texts(compiled):
    model, settings = tiny.model("llama"), {"temperature": 0.0, "max_new_tokens": 4, "progress": False}
    expected = generate(model, tiny.tokenizer(), PROMPTS, arms(), window="last", **settings)
    ids = torch.tensor([prompt_ids(tiny.tokenizer(), "I think")])
    (model if compiled == "model" else model.base_model).compile(backend="eager")
    model(input_ids=ids)  # now there is code without hooks
    found = generate(model, tiny.tokenizer(), PROMPTS, arms(), window="last", **settings)
    assert found.tokens.tolist() == expected.tokens.tolist() and found.changed.tolist() == expected.changed.tolist()


def test_a_text_ends_where_hugging_face_ends_it():
    """The generation config names two end tokens, of which the tokenizer knows one."""
    model, tok = tiny.model("llama"), tiny.tokenizer()
    model.generation_config.eos_token_id = None
    free = generate(model, tok, PROMPTS, temperature=0.0, max_new_tokens=12, progress=False)
    model.generation_config.eos_token_id = [tok.eos_token_id, end := free.tokens[0][3]]
    found = generate(model, tok, PROMPTS, temperature=0.0, max_new_tokens=12, stop=stop_tokens(tok, model), progress=False)
    for prompt, tokens in zip(PROMPTS, found.tokens):
        ids = torch.tensor([prompt_ids(tok, prompt)])
        theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert tokens == [t for t in theirs.tolist() if t not in (end, tok.eos_token_id, tok.pad_token_id)]
    assert len(found.tokens[0]) <= 3


def test_a_stop_token_that_is_none_is_a_clear_error():
    with pytest.raises(ValueError, match=r"stop \(token ids\): expected a whole number, got None"):
        run(tiny.model("llama"), stop=[None])


def test_numbers_of_numpy_and_pandas_give_what_pythons_give(tmp_path):
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    plain = {"samples": 2, "max_new_tokens": 4, "top_k": 5, "seed": 3, "stop": [7], "window": "last", "progress": False}
    rows = [sae_row(sae, 5, layer=1, preset="t"), sae_row(sae, {3: 0.5, 4: 1.0}, layer=1, preset="t")]
    boost = Arm("boost", (Boost(1, sae, 5, 2.0),), 2.0)
    expected = generate(model, tok, PROMPTS, [*grid(rows, [2.0, 4.0]), boost], out=tmp_path / "t.jsonl", **plain)
    odd = {k: np.int64(v) if isinstance(v, int) and k != "progress" else v for k, v in plain.items()} | {"stop": np.array([7])}
    rows = [
        sae_row(sae, np.int64(5), layer=np.int64(1), preset="t"),
        sae_row(sae, {np.int64(3): np.float32(0.5), 4: 1}, layer=1, preset="t"),
    ]
    boost = Arm("boost", [Boost(np.int64(1), sae, np.int64(5), np.float32(2.0))], np.float32(2.0))
    arms = [*grid(rows, pd.Series([2.0, 4.0], dtype="float32")), boost]
    found = generate(model, tok, pd.Series(PROMPTS, index=[4, 3, 2, 1]), arms, out=tmp_path / "t.jsonl", **odd)  # the same key too
    pd.testing.assert_frame_equal(found, expected)


def test_one_string_is_not_a_list_of_letters_and_a_gap_is_no_prompt():
    for prompts, message in (("I think", "put it in a list"), (pd.Series(["So", np.nan]), "expected strings, got")):
        with pytest.raises(ValueError, match=message):
            generate(tiny.model("llama"), tiny.tokenizer(), prompts, progress=False)

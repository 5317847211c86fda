"""Effects of steering vectors: calibration toys, the measuring loop against a plain one, resume and shards."""

import dataclasses
import types

import pandas as pd
import pytest
import tiny
import torch

from recipes import effects as M
from steerkit.engine.generate import Arm, generate
from steerkit.engine.losses import next_token_losses
from steerkit.engine.steer import Add, steering
from steerkit.features import residuals
from steerkit.methods.sae_ts import effects as E
from steerkit.methods.sae_ts.calibrate import calibrate, solve_scale
from steerkit.methods.sae_ts.effects import PROMPTS, PROMPTS_13, Effects, Scheme, measure, text_features

SHORT = Scheme(prompts=("", "ab", "xyz"), length=10)


def vectors(n=5, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_released_prompt_lists():
    assert len(PROMPTS) == 14 and len(PROMPTS_13) == 13
    assert 14 * 64 == 896 and 13 * 64 == 832
    assert PROMPTS.count("") == 3 and "It's interesting thatAssistant:" in PROMPTS_13


def test_scales_of_toy_losses():
    grid = list(range(0, 201, 20))
    loss = [3.5 + 0.004 * a for a in grid]
    stop = next(i for i, value in enumerate(loss) if value > 4.0)
    assert grid[stop] == 140 and solve_scale(grid[: stop + 1], loss[: stop + 1], 4.0) == pytest.approx(125)
    assert solve_scale(grid, [3.5 + 0.001 * a for a in grid], 4.0) == pytest.approx(500)
    assert solve_scale([180, 200], [3.6, 3.6], 4.0) == float("inf")


def test_calibration_equals_one_vector_at_a_time_with_the_hook():
    model, vs = tiny.model("llama"), vectors(4)
    ids = torch.tensor([[11], [55], [120]])
    for _ in range(7):  # its own greedy text, so that steering raises the loss
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    grid = [0.0, 10.0, 20.0, 40.0]

    def loss(v, scale):
        with torch.inference_mode(), steering(model, Add(1, v, scale)):
            return next_token_losses(model(input_ids=ids, use_cache=False).logits, ids).mean().item()

    curves = [[loss(v, g) for g in grid] for v in vs]
    rise = sorted(c[-1] - c[0] for c in curves)[1] * 0.9  # some vectors get there, some do not
    scales, extrapolated, base = calibrate(model, ids, vs, layer=1, rise=rise, grid=grid, batch_size=7)
    assert base == pytest.approx(curves[0][0], rel=1e-5)
    for scale, flag, curve in zip(scales.tolist(), extrapolated.tolist(), curves):
        stop = next((i for i, value in enumerate(curve) if i and value > base + rise), None)
        assert flag == (stop is None)
        stop = len(grid) - 1 if stop is None else stop
        assert scale == pytest.approx(solve_scale(grid[: stop + 1], curve[: stop + 1], base + rise), rel=1e-3)
    same, _, _ = calibrate(model, ids, vs, layer=1, target=base + rise, grid=grid)
    torch.testing.assert_close(same, scales, rtol=1e-3, atol=1e-3)


def test_calibration_refuses_a_target_below_the_unsteered_loss():
    model, ids = tiny.model("llama"), torch.randint(5, 200, (2, 6))
    with pytest.raises(ValueError, match="more than the unsteered loss"):
        calibrate(model, ids, vectors(1), layer=1, target=0.1)
    with pytest.raises(ValueError, match="either target"):
        calibrate(model, ids, vectors(1), layer=1)


@pytest.mark.parametrize("positions", ["all", "ordinary"])
def test_means_equal_a_plain_loop(positions):
    """Every rollout written by `generate`, read alone without the hook, encoded token by token in float64."""
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    vs, scales = vectors(2), torch.tensor([3.0, 6.0])
    scheme = dataclasses.replace(SHORT, positions=positions, samples=2, outlier=1e9)
    got = text_features(model, tok, sae, vs, scales, layer=1, scheme=scheme, batch_size=3)
    for v in range(2):
        sums, counts = torch.zeros(2, 2 * tiny.D_MODEL, dtype=torch.float64), torch.zeros(2, 1)
        for p, prompt in enumerate(scheme.prompts):
            for s in range(2):
                row = ((v + 1) * 3 + p) * 2 + s
                start = [tok.bos_token_id, *tok(prompt, add_special_tokens=False)["input_ids"]]
                new = _one(model, start, vs[v], scales[v].item(), row, 10 - len(start))
                ids = torch.tensor([start + new])
                x = residuals(model, ids, layers=[1])[1][0].double()
                acts = torch.relu(torch.cat([x, -x], 1))
                keep = torch.ones(len(x), dtype=torch.bool)
                if positions == "ordinary":
                    keep[0] = False
                    keep &= ~torch.isin(ids[0], torch.tensor(tok.all_special_ids))
                sums[p % 2] += acts[keep].sum(0)
                counts[p % 2] += keep.sum()
        torch.testing.assert_close(got[v].double(), sums / counts, rtol=1e-3, atol=1e-4)


def _one(model, start, vector, scale, row, n):
    """One rollout by the plainest route: full forward passes, no cache, noise of that row."""
    from steerkit.engine.decode import draw, uniforms

    noise, ids = torch.from_numpy(uniforms(0, [row], n)), list(start)
    for step in range(n):
        with torch.inference_mode(), steering(model, Add(1, vector, scale)):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(draw(logits, noise[:, step], E.SAMPLING).item())
    return ids[len(start) :]


def test_steering_is_off_while_reading():
    """With the hook left on, the vector itself would show: here the planted SAE reads it straight from the stream."""
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    v = torch.zeros(1, tiny.D_MODEL)
    v[0, 5] = 1.0
    effect = measure(model, tok, sae, v, torch.tensor([500.0]), layer=1, scheme=SHORT, baseline_samples=2).effects[0]
    assert effect[5] < 100


def test_all_positions_dilute_the_empty_prompt_by_31_32():
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    vs, scales = vectors(1), torch.tensor([4.0])
    both = []
    for positions in ("all", "ordinary"):
        scheme = Scheme(prompts=("",), length=32, positions=positions, outlier=1e9)
        steered = text_features(model, tok, sae, vs, scales, layer=1, scheme=scheme)[0, 0]
        plain = text_features(model, tok, sae, None, None, layer=1, scheme=scheme)[0, 0]
        both.append(steered - plain)
    if not any(t in tok.all_special_ids for t in _texts(model, tok, vs[0], 4.0)):
        torch.testing.assert_close(both[0], both[1] * 31 / 32, rtol=1e-3, atol=1e-4)


def _texts(model, tok, v, scale):
    return [t for row in (len(("",)) * 1, 0) for t in _one(model, [tok.bos_token_id], v, scale if row else 0.0, row, 31)]


def test_the_same_call_gives_the_same_effects_and_none_against_itself():
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    run = [measure(model, tok, sae, vectors(3), torch.full((3,), 4.0), layer=1, scheme=SHORT, batch_size=b) for b in (2, 64)]
    assert torch.equal(run[0].parts, run[1].parts) or torch.allclose(run[0].parts, run[1].parts, atol=1e-5)
    plain = text_features(model, tok, sae, None, None, layer=1, scheme=SHORT)
    assert not (plain - plain).any()


def test_parts_resume_and_shards_add_up(tmp_path, monkeypatch):
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    vs, scales = vectors(5), torch.linspace(2, 6, 5)
    settings = {"layer": 1, "scheme": SHORT, "batch_size": 2, "progress": False}
    whole = measure(model, tok, sae, vs, scales, **settings)
    base = whole.baseline
    for shard in (1, 0):
        measure(model, tok, sae, vs, scales, baseline=base, out=tmp_path / "s", shard=shard, n_shards=2, **settings)
    calls = []
    monkeypatch.setattr(E, "text_features", lambda *a, **k: calls.append(1))
    merged = measure(model, tok, sae, vs, scales, baseline=base, out=tmp_path / "s", **settings)
    assert not calls  # all parts were there
    torch.testing.assert_close(merged.parts, whole.parts, rtol=2e-3, atol=2e-3)  # parts are kept in float16
    with pytest.raises(ValueError, match="other vectors, scales or settings"):
        measure(model, tok, sae, vs, scales + 1, baseline=base, out=tmp_path / "s", **settings)


def test_an_interruption_keeps_finished_parts(tmp_path, monkeypatch):
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    real, calls = E.text_features, []

    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # the baseline, one part, and then
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    settings = {"layer": 1, "scheme": SHORT, "batch_size": 2, "progress": False}
    monkeypatch.setattr(E, "text_features", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        measure(model, tok, sae, vectors(5), torch.full((5,), 3.0), out=tmp_path, **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["part-000000.safetensors"]


def test_bad_scales_are_a_clear_error():
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    for bad in (torch.tensor([1.0, float("inf")]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="finite numbers above 0"):
            measure(model, tok, sae, vectors(2), bad, layer=1, scheme=SHORT)


def test_shipped_form_is_within_its_stated_error(tmp_path):
    means, base = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0)).abs() ** 3, torch.rand(50)
    kept = Effects(vectors(4), torch.rand(4), means - base, base)
    back, about = E.load(E.save(kept, tmp_path / "e.safetensors", {"seed": 3}), vectors(4))
    assert about == {"seed": 3} and torch.equal(back.scales, kept.scales) and torch.equal(back.baseline, base)
    off = (back.effects - kept.effects).abs() / means.mean(1).amax(1, keepdim=True)
    assert off.max() < 0.004 + 1e-6
    torch.testing.assert_close(E.load(tmp_path / "e.safetensors", vectors(9))[0].vectors, vectors(9)[:4])  # the first four of nine
    with pytest.raises(ValueError, match="at least 4 vectors, got 3"):
        E.load(tmp_path / "e.safetensors", vectors(3))


def test_rollouts_are_those_of_generate():
    """The texts behind the effects are what `generate` writes for the same arm when no sampling is involved."""
    model, tok = tiny.model("llama"), tiny.tokenizer()
    v = vectors(1)[0]
    text = generate(model, tok, ["ab"], [Arm("v", (Add(1, v, 4.0),))], temperature=0.0, max_new_tokens=7, progress=False).tokens[0]
    greedy = E.decode(
        model,
        [[tok.bos_token_id, *tok("ab", add_special_tokens=False)["input_ids"]]],
        [Add(1, v[None], torch.tensor([4.0]))],
        rows=[0],
        arm=[0],
        shared=[0],
        sampling=E.Sampling(temperature=0.0, max_new_tokens=7),
    )
    assert greedy[0].tokens == text


def test_training_vectors_keep_the_held_out_rows_apart():
    W = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    found, held = M.training_vectors(W, n_held=6)
    rows = torch.nn.functional.normalize(W, dim=1)
    assert found.shape == (80, 200) and held.sum() == 12 and held[:12].all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(80))
    which = (found @ rows.T).topk(2)
    made_of = [{which.indices[i, 0].item()} if which.values[i, 0] > 0.999 else set(which.indices[i].tolist()) for i in range(80)]
    assert [len(m) for m in made_of] == [1, 2] * 40  # rows and sums by turns
    assert sorted(i for m in made_of[0::2] for i in m) == list(range(40))  # every row once
    new = {i for m in made_of[:12] for i in m}
    assert len(new) == 6 and not new & {i for m in made_of[12:] for i in m}
    assert torch.equal(found, M.training_vectors(W, n_held=6)[0])


def test_the_recipe_measures_ships_and_resumes(tmp_path, monkeypatch):
    """The command end to end on a planted model: blocks, repeats, the shipped files, and nothing measured twice."""
    spec = types.SimpleNamespace(name="tiny", primary_layer=1, outlier=1e9, sae_set=lambda: None)
    monkeypatch.setattr(M, "preset", lambda name: spec)
    monkeypatch.setattr(M, "load_model", lambda spec, device, dtype: (tiny.model("llama"), tiny.tokenizer()))
    monkeypatch.setattr(M, "load_sae", lambda *a, **k: tiny.planted_sae())
    real = M.training_vectors
    monkeypatch.setattr(M, "training_vectors", lambda W: real(W, n_held=4))
    monkeypatch.setattr(E, "PROMPTS", ("", "ab"))
    monkeypatch.setattr(E.Scheme.__init__, "__defaults__", (("", "ab"), 1, 8, E.SAMPLING, "ordinary", 10.0))
    monkeypatch.setattr(M, "calibrate", lambda model, ids, v, **k: (torch.full((len(v),), 3.0), torch.zeros(len(v), dtype=torch.bool), 1.0))
    monkeypatch.setattr(M, "budget", lambda *a, **k: pd.DataFrame({"prompts": [2]}))
    call = [
        "--out",
        str(tmp_path / "parts"),
        "--ship",
        str(tmp_path / "e.safetensors"),
        "--first",
        "12",
        "--block",
        "8",
        "--batch-size",
        "4",
    ]
    M.main(call)
    vs, _ = real(tiny.planted_sae().W_dec, n_held=4)
    shipped, about = E.load(tmp_path / "e.safetensors", vs)
    again, _ = E.load(tmp_path / "e.repeat1.safetensors", vs)
    assert len(shipped.scales) == 12 and len(again.scales) == 8 and about["preset"] == "tiny" and about["repeat"] == 0
    assert not torch.allclose(shipped.effects[:8], again.effects)  # other random numbers
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*.safetensors")}
    M.main(call)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*.safetensors")}


def planted_recipe(monkeypatch, tmp_path):
    """The command on a planted model, calibrated to scales that follow the rise asked for."""
    spec = types.SimpleNamespace(name="tiny", primary_layer=1, outlier=1e9, sae_set=lambda: None)
    monkeypatch.setattr(M, "preset", lambda name: spec)
    monkeypatch.setattr(M, "load_model", lambda spec, device, dtype: (tiny.model("llama"), tiny.tokenizer()))
    monkeypatch.setattr(M, "load_sae", lambda *a, **k: tiny.planted_sae())
    real = M.training_vectors
    monkeypatch.setattr(M, "training_vectors", lambda W: real(W, n_held=1))
    monkeypatch.setattr(E.Scheme.__init__, "__defaults__", (("", "ab"), 1, 8, E.SAMPLING, "ordinary", 10.0))
    grown = lambda model, ids, v, rise, **k: (torch.full((len(v),), 4 * rise), torch.zeros(len(v), dtype=torch.bool), 1.0)  # noqa: E731
    monkeypatch.setattr(M, "calibrate", grown)
    monkeypatch.setattr(M, "budget", lambda *a, **k: pd.DataFrame({"prompts": [2]}))
    return ["--ship", str(tmp_path / "e.safetensors"), "--first", "4", "--block", "4"]


def test_another_rise_never_ships_the_scales_of_the_last(tmp_path, monkeypatch):
    call = planted_recipe(monkeypatch, tmp_path)
    vs, _ = M.training_vectors(tiny.planted_sae().W_dec)
    M.main([*call, "--out", str(tmp_path / "parts"), "--rise", "0.5"])
    assert E.load(tmp_path / "e.safetensors", vs)[0].scales.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="other vectors, scales or settings"):
        M.main([*call, "--out", str(tmp_path / "parts"), "--rise", "1.0"])
    M.main([*call, "--out", str(tmp_path / "others"), "--rise", "1.0"])
    shipped, about = E.load(tmp_path / "e.safetensors", vs)
    assert shipped.scales.tolist() == [4.0] * 4 and about["rise"] == 1.0


@pytest.mark.parametrize("change", ["threshold", "prompts' tokens", "batch size"])
def test_kept_parts_belong_to_one_sae_one_tokenizer_and_one_way_to_cut(tmp_path, change):
    """A part is numbered by its first vector, so that another batch size would find parts of another length."""
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    settings = {"layer": 1, "scheme": SHORT, "batch_size": 2, "progress": False, "out": tmp_path, "baseline": torch.zeros(2 * tiny.D_MODEL)}
    measure(model, tok, sae, vectors(4), torch.full((4,), 3.0), **settings)
    if change == "threshold":
        with torch.no_grad():
            sae.threshold += 1.0
    elif change == "batch size":
        settings["batch_size"] = 4
    else:
        tok.bos_token = "<eos>"
    with pytest.raises(ValueError, match="other vectors, scales or settings"):
        measure(model, tok, sae, vectors(4), torch.full((4,), 3.0), **settings)


def test_rollouts_that_are_not_finite_name_vector_scale_and_dtype():
    model, tok, sae = tiny.model("llama").half(), tiny.tokenizer(), tiny.planted_sae()
    with pytest.raises(ValueError, match=r"^vector 1 at scale 1e\+06: .*torch.float16"):
        measure(model, tok, sae, vectors(2), torch.tensor([3.0, 1e6]), layer=1, scheme=SHORT, baseline=torch.zeros(2 * tiny.D_MODEL))

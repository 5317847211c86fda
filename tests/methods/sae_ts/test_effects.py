"""Effects of steering vectors: calibration toys, the measuring loop against a plain one, resume and shards."""

import dataclasses
import functools

import pandas as pd
import pytest
import tiny
import torch
from faults import dies

from recipes import effects as M
from steerkit.engine.decode import Sampling, draw, uniforms
from steerkit.engine.generate import Arm, generate
from steerkit.engine.losses import next_token_losses
from steerkit.engine.steer import Add, steering
from steerkit.engine.tokens import prompt_ids
from steerkit.features import read, residuals
from steerkit.methods.sae_ts import effects as E
from steerkit.methods.sae_ts.calibration import calibrate, solve_scale, steered_losses
from steerkit.methods.sae_ts.effects import PROMPTS, PROMPTS_13, Effects, Scheme, measure, text_features
from steerkit.store import Parts, Work

SHORT = Scheme(prompts=("", "ab", "xyz"), length=10)
SMALL = Work(2, progress=False)


def place(**settings):
    return tiny.lab(**settings).at(1)


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
    at, vs = place(saes={}), vectors(4)
    model, ids = at.model, torch.tensor([[11], [55], [120]])
    for _ in range(7):  # its own greedy text, so that steering raises the loss
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    grid = [0.0, 10.0, 20.0, 40.0]

    def loss(v, scale):
        with torch.inference_mode(), steering(model, Add(1, v, scale)):
            return next_token_losses(model(input_ids=ids, use_cache=False).logits, ids).mean().item()

    curves = [[loss(v, g) for g in grid] for v in vs]
    assert steered_losses(at, ids, vs, torch.full((4,), 20.0)).tolist() == pytest.approx([c[2] for c in curves], rel=1e-5)
    rise = sorted(c[-1] - c[0] for c in curves)[1] * 0.9  # some vectors get there, some do not
    scales, extrapolated, base = calibrate(at, ids, vs, rise=rise, grid=grid, batch_size=7)
    assert base == pytest.approx(curves[0][0], rel=1e-5)
    for scale, flag, curve in zip(scales.tolist(), extrapolated.tolist(), curves):
        stop = next((i for i, value in enumerate(curve) if i and value > base + rise), None)
        assert flag == (stop is None)
        stop = len(grid) - 1 if stop is None else stop
        assert scale == pytest.approx(solve_scale(grid[: stop + 1], curve[: stop + 1], base + rise), rel=1e-3)
    same, _, _ = calibrate(at, ids, vs, target=base + rise, grid=grid)
    torch.testing.assert_close(same, scales, rtol=1e-3, atol=1e-3)


def test_calibration_refuses_a_target_below_the_unsteered_loss():
    at, ids = place(saes={}), torch.randint(5, 200, (2, 6))
    with pytest.raises(ValueError, match="more than the unsteered loss"):
        calibrate(at, ids, vectors(1), target=0.1)
    with pytest.raises(ValueError, match="either target"):
        calibrate(at, ids, vectors(1))


@pytest.mark.parametrize("positions", ["all", "ordinary"])
def test_means_equal_a_plain_loop(positions):
    """Every rollout written by `generate`, read alone without the hook, encoded token by token in float64."""
    at, vs, scales = place(outlier=1e9), vectors(2), torch.tensor([3.0, 6.0])
    model, tok = at.model, at.tokenizer
    scheme = dataclasses.replace(SHORT, positions=positions, samples=2)
    got = text_features(at, vs, scales, scheme=scheme, batch_size=3)
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
    noise, ids = torch.from_numpy(uniforms(0, [row], n)), list(start)
    for step in range(n):
        with torch.inference_mode(), steering(model, Add(1, vector, scale)):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(draw(logits, noise[:, step], E.SAMPLING).item())
    return ids[len(start) :]


def test_steering_is_off_while_reading():
    """With the hook left on, the vector itself would show: here the planted SAE reads it straight from the stream."""
    v = torch.zeros(1, tiny.D_MODEL)
    v[0, 5] = 1.0
    effect = measure(place(), v, torch.tensor([500.0]), scheme=dataclasses.replace(SHORT, baseline_samples=2)).effects[0]
    assert effect[5] < 100


def test_all_positions_dilute_the_empty_prompt_by_31_32():
    at, v = place(outlier=1e9), vectors(1)
    both = []
    for positions in ("all", "ordinary"):
        scheme = Scheme(prompts=("",), length=32, positions=positions)
        steered, plain = text_features(at, v, torch.tensor([4.0]), scheme=scheme), text_features(at, None, None, scheme=scheme)
        both.append((steered - plain)[0, 0])
    texts = [_one(at.model, [at.tokenizer.bos_token_id], v[0], 4.0 * row, row, 31) for row in (0, 1)]
    if not {t for text in texts for t in text} & set(at.tokenizer.all_special_ids):
        torch.testing.assert_close(both[0], both[1] * 31 / 32, rtol=1e-3, atol=1e-4)


def test_the_same_call_gives_the_same_effects_and_none_against_itself():
    at = place()
    run = [measure(at, vectors(3), torch.full((3,), 4.0), scheme=SHORT, work=Work(b)) for b in (2, 64)]
    assert torch.equal(run[0].parts, run[1].parts) or torch.allclose(run[0].parts, run[1].parts, atol=1e-5)
    assert torch.equal(*(text_features(at, None, None, scheme=SHORT) for _ in range(2)))


def test_parts_resume_and_shards_add_up(tmp_path, monkeypatch):
    at, vs, scales = place(), vectors(5), torch.linspace(2, 6, 5)
    whole = measure(at, vs, scales, scheme=SHORT, work=SMALL)
    kept = {"scheme": SHORT, "baseline": whole.baseline, "work": dataclasses.replace(SMALL, out=tmp_path / "s")}
    for which in (1, 0):
        measure(at, vs, scales, shard=(which, 2), **kept)
    calls = []
    monkeypatch.setattr(E, "text_features", lambda *a, **k: calls.append(1))
    merged = measure(at, vs, scales, **kept)
    assert not calls  # all parts were there
    torch.testing.assert_close(merged.parts, whole.parts, rtol=2e-3, atol=2e-3)  # parts are kept in float16
    with pytest.raises(ValueError, match="holds another run"):
        measure(at, vs, scales + 1, **kept)
    for wrong in ((2, 2), (1, 0), (-1, 2)):
        with pytest.raises(ValueError, match=r"which one, of how many"):
            measure(at, vs, scales, shard=wrong, **kept)


def test_a_part_comes_back_as_it_was_put_and_a_damaged_one_is_named(tmp_path):
    store, whole = Parts(tmp_path / "new", "key"), {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor([0.5]).half()}
    assert store.get("one") is None and Parts(None, "").get("one") is None
    store.put("one", whole, layer=3)
    Parts(None, "").put("one", whole)
    back = store.get("one")
    assert set(back) == {"a", "b"} and all(torch.equal(back[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match=r"one\.safetensors holds another run \(key key, this one is other\)"):
        Parts(tmp_path / "new", "other").get("one")
    (tmp_path / "new" / "one.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"one\.safetensors: expected a finished part.*delete it"):
        store.get("one")


def test_an_interruption_keeps_finished_parts(tmp_path, monkeypatch):
    dies(monkeypatch, E, "text_features", at=3)  # after the baseline and one part
    with pytest.raises(KeyboardInterrupt):
        measure(place(), vectors(5), torch.full((5,), 3.0), scheme=SHORT, work=dataclasses.replace(SMALL, out=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["part-000000.safetensors"]


def test_bad_scales_are_a_clear_error():
    for bad in (torch.tensor([1.0, float("inf")]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="finite numbers above 0"):
            measure(place(), vectors(2), bad, scheme=SHORT)


def test_shipped_form_is_within_its_stated_error(tmp_path):
    means, base = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0)).abs() ** 3, torch.rand(50)
    kept = Effects(vectors(4), torch.rand(4), means - base, base)
    back, about = E.load(E.save(kept, tmp_path / "e.safetensors", {"seed": 3}), vectors(4))
    assert about == {"seed": 3} and torch.equal(back.scales, kept.scales) and torch.equal(back.baseline, base)
    off = (back.effects - kept.effects).abs() / means.mean(1).amax(0)
    assert off.max() < 0.033 + 1e-6
    torch.testing.assert_close(E.load(tmp_path / "e.safetensors", vectors(9))[0].vectors, vectors(9)[:4])  # the first four of nine
    with pytest.raises(ValueError, match="at least 4 vectors, got 3"):
        E.load(tmp_path / "e.safetensors", vectors(3))


def test_rollouts_are_those_of_generate():
    """The texts behind the effects are what `generate` writes for the same arm when no sampling is involved."""
    at, v, greedy = place(outlier=1e9), vectors(1), Sampling(temperature=0.0, max_new_tokens=7)
    (tokens,) = generate(at.lab, ["ab"], [Arm("v", Add(1, v[0], 4.0))], sampling=greedy, work=SMALL).tokens
    resid, keep = read(at, torch.tensor([prompt_ids(at.tokenizer, "ab") + tokens]))
    found = text_features(at, v, torch.tensor([4.0]), scheme=Scheme(prompts=("ab",), length=10, sampling=greedy))
    torch.testing.assert_close(found[0, 0], at.sae.encode(resid)[keep].mean(0), rtol=1e-4, atol=1e-5)


def test_training_vectors_keep_the_held_out_rows_apart():
    W = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    found, held = E.training_vectors(W, n_held=6)
    rows = torch.nn.functional.normalize(W, dim=1)
    assert found.shape == (80, 200) and held.sum() == 12 and held[:12].all()
    torch.testing.assert_close(found.norm(dim=1), torch.ones(80))
    which = (found @ rows.T).topk(2)
    made_of = [{which.indices[i, 0].item()} if which.values[i, 0] > 0.999 else set(which.indices[i].tolist()) for i in range(80)]
    assert [len(m) for m in made_of] == [1, 2] * 40  # rows and sums by turns
    assert sorted(i for m in made_of[0::2] for i in m) == list(range(40))  # every row once
    new = {i for m in made_of[:12] for i in m}
    assert len(new) == 6 and not new & {i for m in made_of[12:] for i in m}
    assert torch.equal(found, E.training_vectors(W, n_held=6)[0])


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """The command on a planted model, calibrated to four times the rise asked for; returns its first arguments."""
    opened = tiny.lab(outlier=1e9)
    monkeypatch.setattr(M.load, "preset", lambda name: opened.preset)
    monkeypatch.setattr(M.load, "open", lambda *a, **k: opened)  # where weights are centred and SAEs checked
    monkeypatch.setattr(M, "training_vectors", functools.partial(E.training_vectors, n_held=4))
    monkeypatch.setattr(M, "Scheme", functools.partial(Scheme, prompts=("", "ab"), length=8, baseline_samples=4))
    grown = lambda at, ids, v, rise, **k: (torch.full((len(v),), 4 * rise), torch.zeros(len(v), dtype=torch.bool), 1.0)  # noqa: E731
    monkeypatch.setattr(M, "calibrate", grown)
    monkeypatch.setattr(M, "density", lambda *a: None)
    monkeypatch.setattr(M, "topic_features", lambda *a: pd.DataFrame({"feature": [3]}))
    monkeypatch.setattr(M, "budget", lambda *a, targets, **k: pd.DataFrame({"prompts": [2], "targets": targets}))
    return ["--ship", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "parts"), "--block", "8", "--batch-size", "4"]


def test_the_recipe_measures_ships_and_resumes(recipe, tmp_path):
    """The command end to end: blocks, repeats, the shipped files, and nothing measured twice."""
    M.main([*recipe, "--first", "12"])
    vs, _ = M.training_vectors(tiny.planted_sae().W_dec)
    shipped, about = E.load(tmp_path / "e.safetensors", vs)
    again, _ = E.load(tmp_path / "e.repeat1.safetensors", vs)
    assert len(shipped.scales) == 12 and len(again.scales) == 8 and about["preset"] == "tiny" and about["repeat"] == 0
    assert not torch.allclose(shipped.effects[:8], again.effects)  # other random numbers
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*.safetensors")}
    M.main([*recipe, "--first", "12"])
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").rglob("*.safetensors")}


def test_another_rise_never_ships_the_scales_of_the_last(recipe, tmp_path):
    vs, _ = M.training_vectors(tiny.planted_sae().W_dec)
    M.main([*recipe, "--first", "4", "--rise", "0.5"])
    assert E.load(tmp_path / "e.safetensors", vs)[0].scales.tolist() == [2.0] * 4
    with pytest.raises(ValueError, match="holds another run"):
        M.main([*recipe, "--first", "4", "--rise", "1.0"])
    M.main([*recipe, "--first", "4", "--rise", "1.0", "--out", str(tmp_path / "others")])
    shipped, about = E.load(tmp_path / "e.safetensors", vs)
    assert shipped.scales.tolist() == [4.0] * 4 and about["rise"] == 1.0


@pytest.mark.parametrize("change", ["threshold", "prompts' tokens", "batch size"])
def test_kept_parts_belong_to_one_sae_one_tokenizer_and_one_way_to_cut(tmp_path, change):
    """A part is numbered by its first vector, so that another batch size would find parts of another length."""
    at, work = place(), dataclasses.replace(SMALL, out=tmp_path)
    given = {"scheme": SHORT, "baseline": torch.zeros(2 * tiny.D_MODEL)}
    measure(at, vectors(4), torch.full((4,), 3.0), work=work, **given)
    if change == "threshold":
        with torch.no_grad():
            at.sae.threshold += 1.0
    elif change == "batch size":
        work = dataclasses.replace(work, batch_size=4)
    else:
        at.tokenizer.bos_token = "<eos>"
    with pytest.raises(ValueError, match="holds another run"):
        measure(at, vectors(4), torch.full((4,), 3.0), work=work, **given)


def test_rollouts_that_are_not_finite_name_vector_scale_and_dtype():
    at = place(hf=tiny.model("llama").half())
    with pytest.raises(ValueError, match=r"^vector 1 at scale 1e\+06: .*torch.float16"):
        measure(at, vectors(2), torch.tensor([3.0, 1e6]), scheme=SHORT, baseline=torch.zeros(2 * tiny.D_MODEL))

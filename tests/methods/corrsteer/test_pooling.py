"""Pooled features against plain forward passes, and against a decode step by step, on tiny random models."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from faults import dies, short_of_memory

import steerkit.methods.corrsteer.pooling as P
from steerkit.engine.decode import Sampling, Watch, decode
from steerkit.engine.generate import generate
from steerkit.engine.steer import Add, residual_blocks
from steerkit.engine.tokens import prompt_ids
from steerkit.features import residuals
from steerkit.methods.corrsteer.pooled import Pooled
from steerkit.methods.corrsteer.pooling import Raw, Reading, pool_answers
from steerkit.store import Work

D = tiny.D_MODEL
PROMPTS = ["I think", "a", "The longest of the prompts here", "So", "a"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


def written(kind="llama", **sampling):
    frame = generate(tiny.lab(kind), PROMPTS, sampling=replace(GREEDY, **sampling), work=Work(progress=False))
    return frame.tokens.tolist()


def run(answers=None, kind="llama", saes=None, *, prompts=PROMPTS, batch_size=None, out=None, site="pre", **settings):
    at = Reading({1: tiny.planted_sae(), 2: tiny.planted_sae()} if saes is None else saes, site)
    work, answers = Work(batch_size, out, progress=False), written(kind) if answers is None else answers
    (pooled,) = pool_answers(tiny.lab(kind), prompts, answers, [at], work=work, **settings)
    return pooled


def by_hand(kind, prompt, tokens, layer, site, steps):
    """Encode the positions that predict the first `steps` tokens, from one plain pass without a cache."""
    tok, sae = tiny.tokenizer(), tiny.planted_sae()
    ids = prompt_ids(tok, prompt)
    whole = torch.tensor([ids + tokens])
    model = tiny.model(kind)
    if site == "post":
        h = residuals(model, whole, layers=[layer])[layer][0]
    else:  # what enters the block, as a hook before it sees it
        seen, block = [], residual_blocks(model)[layer]
        handle = block.register_forward_pre_hook(lambda _m, args, kw: seen.append((args or (kw["hidden_states"],))[0]), with_kwargs=True)
        with torch.no_grad():
            model(input_ids=whole)
        handle.remove()
        h = seen[0][0]
    z = sae.encode(h[len(ids) - 1 : len(ids) - 1 + steps])
    return (z.amax(0), z.mean(0)) if steps else (torch.zeros(2 * D), torch.zeros(2 * D))


def close(sparse_row, tensor):
    np.testing.assert_allclose(sparse_row.toarray().ravel(), tensor.detach().numpy(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind,site", [("llama", "post"), ("llama", "pre"), ("gemma2", "pre"), ("gpt2", "post")])
def test_pooled_features_equal_a_plain_pass_of_each_text_alone(kind, site):
    """Padded batches against each text alone: maximum, mean and norm over the positions that predict a token."""
    answers = written(kind)
    pooled = run(answers, kind, site=site)
    assert pooled.window.tolist() == [6] * 5
    for row, prompt in enumerate(PROMPTS):
        for layer in (1, 2):
            top, mean = by_hand(kind, prompt, answers[row], layer, site, 6)
            close(pooled.z(layer, "max")[[row]], top)
            close(pooled.z(layer, "mean")[[row]], mean)
    ids = prompt_ids(tiny.tokenizer(), PROMPTS[0])
    h = residuals(tiny.model(kind), torch.tensor([ids + answers[0]]), layers=[2 - (site == "pre")])
    norms = h[2 - (site == "pre")][0, len(ids) - 1 : len(ids) + 5].norm(dim=-1)
    assert pooled.norm[2][0] == pytest.approx(norms.mean().item(), rel=1e-4)


def test_one_pass_sees_what_a_decode_sees_step_by_step():
    """The released way: keep what enters block 2 at every step of the generation, encode it, and take the largest."""
    model, ids, steps = tiny.model("llama"), prompt_ids(tiny.tokenizer(), PROMPTS[0]), []
    watch = Watch((1,), lambda _step, _rows, _stopped, resid: steps.append(resid[1].clone()))
    (done,) = decode(model, [ids], [], rows=[0], arm=[0], sampling=GREEDY, watch=watch)
    assert len(steps) == len(done.tokens) == 6
    pooled = run([done.tokens, *written()[1:]], site="pre")
    z = tiny.planted_sae().encode(torch.cat(steps))
    close(pooled.z(2)[[0]], z.amax(0))
    close(pooled.z(2, "mean")[[0]], z.mean(0))


def test_the_window_ends_before_the_step_that_predicts_the_end():
    """Rows that end early, at once or not at all, in one batch: steps 0 to k - 1, zeros, all steps."""
    full = written(max_new_tokens=8)
    stop = full[0][3], full[1][0]
    lengths = [next((i for i, t in enumerate(ts) if t in stop), 8) for ts in full]
    answers = written(max_new_tokens=8, stop=stop)
    pooled = run(answers, site="post")
    assert pooled.window.tolist() == lengths and [len(t) for t in answers] == lengths
    assert lengths[1] == 0 and lengths[4] == 0 and 0 < lengths[0] <= 3
    for row, steps in enumerate(lengths):
        top, mean = by_hand("llama", PROMPTS[row], full[row], 1, "post", steps)
        close(pooled.z(1)[[row]], top)
        close(pooled.z(1, "mean")[[row]], mean)
    assert pooled.z(1)[[1]].nnz == 0 and pooled.norm[1][1] == 0


def test_one_token_answers_always_have_a_window_and_max_equals_mean():
    answers = [[], *written(max_new_tokens=1)[1:]]
    pooled = run(answers, site="post", min_window=1)
    assert pooled.window.tolist() == [1] * 5
    for layer in (1, 2):
        assert (pooled.z(layer, "max") != pooled.z(layer, "mean")).nnz == 0
    close(pooled.z(1)[[0]], by_hand("llama", PROMPTS[0], [], 1, "post", 1)[0])
    none = run(answers, site="post")
    assert none.window[0] == 0 and none.z(1)[[0]].nnz == 0


def test_batches_of_any_size_give_the_same_features(monkeypatch):
    answers = written(max_new_tokens=8, stop=[written(max_new_tokens=8)[2][4]])
    together, alone = run(answers), run(answers, batch_size=1)
    monkeypatch.setattr(P, "AT_ONCE", 3)  # positions that are dense together: a text is cut anywhere
    for other in (alone, run(answers)):
        assert together.window.tolist() == other.window.tolist()
        for layer in (1, 2):
            for pool in ("max", "mean"):
                np.testing.assert_allclose(together.z(layer, pool).toarray(), other.z(layer, pool).toarray(), atol=2e-4)


def test_a_watch_is_shown_each_step_once_with_steering_on():
    """As many steps as new tokens; the first is the last prompt token of a plain pass, and steering shows."""
    model, ids, vector, steps = tiny.model("llama"), prompt_ids(tiny.tokenizer(), "So it is"), torch.randn(D), []
    common = {"rows": [0], "arm": [0], "sampling": replace(GREEDY, max_new_tokens=4), "window": "last"}
    watch = Watch((1,), lambda step, rows, stopped, resid: steps.append((step, rows.tolist(), resid[1].clone())))
    decode(model, [ids], [], watch=watch, **common)
    assert [s[:2] for s in steps] == [(i, [0]) for i in range(4)]
    torch.testing.assert_close(steps[0][2], residuals(model, torch.tensor([ids]), layers=[1])[1][:, -1], atol=1e-4, rtol=1e-4)
    decode(model, [ids], [Add(1, vector, 2.0)], watch=watch, **common)
    torch.testing.assert_close(steps[4][2], steps[0][2] + 2.0 * vector, atol=1e-4, rtol=1e-4)
    decode(model, [ids], [Add(1, vector, 2.0)], watch=replace(watch, steered=False), **common)
    torch.testing.assert_close(steps[8][2], steps[0][2], atol=1e-4, rtol=1e-4)
    assert not any(block._forward_hooks for block in residual_blocks(model))


def test_several_readings_share_one_pass(monkeypatch, tmp_path):
    """SAEs at both sites and residual coordinates, each as when it is read alone; kept, and read back."""
    answers, own = written(), {1: tiny.planted_sae(), 2: tiny.planted_sae()}
    alone = [run(answers, site=site) for site in ("pre", "post")] + [run(answers, saes={2: Raw(D)})]
    calls, real = [], P.residuals
    monkeypatch.setattr(P, "residuals", lambda *a, **kw: calls.append(kw["layers"]) or real(*a, **kw))
    readings = [Reading(own), Reading(own, "post"), Reading({2: Raw(D)})]
    for _ in range(2):
        together = pool_answers(tiny.lab(), PROMPTS, answers, readings, work=Work(out=tmp_path, progress=False))
        for a, b in zip(alone, together, strict=True):
            assert list(a.features) == list(b.features) and (a.z(2) != b.z(2)).nnz == 0 == (a.z(2, "mean") != b.z(2, "mean")).nnz
            np.testing.assert_array_equal(a.norm[2], b.norm[2])
    assert calls == [[0, 1, 2]], "one batch, one pass; the second time from the file"


def test_raw_coordinates_keep_their_signs():
    """Residual coordinates: a negative maximum is a negative maximum, and a text that ends at once is zero."""
    pooled, sae = run(saes={1: Raw(D)}), run(saes={1: tiny.planted_sae()})
    top = pooled.z(1).toarray()
    assert (top < 0).any()
    np.testing.assert_allclose(np.maximum(top, 0), sae.z(1).toarray()[:, :D], atol=1e-6)
    mean = sae.z(1, "mean").toarray()
    np.testing.assert_allclose(pooled.z(1, "mean").toarray(), mean[:, :D] - mean[:, D:], atol=1e-5)


def test_an_interrupted_run_carries_on_from_its_files(tmp_path, monkeypatch):
    out, answers = tmp_path / "run-{key}", written()
    whole = run(answers, batch_size=2)
    calls = dies(monkeypatch, P, "residuals", at=2)
    with pytest.raises(KeyboardInterrupt):
        run(answers, batch_size=2, out=out)
    resumed = run(answers, batch_size=2, out=out)
    assert len(calls) == 2 + 2  # three batches, the first was done
    assert (resumed.z(2) != whole.z(2)).nnz == 0
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="another run"):
        run([a[:5] for a in answers], batch_size=2, out=folder)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("pretend"), ValueError("else")])
def test_out_of_memory_halves_the_batch_and_other_errors_do_not(monkeypatch, error):
    answers = written()
    whole = run(answers)
    sizes = short_of_memory(monkeypatch, P, "residuals", rows=2, error=error)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="else"):
            run(answers)
        return
    halves = run(answers)
    assert sizes == [5, 2, 3, 1, 2]
    np.testing.assert_allclose(halves.z(1).toarray(), whole.z(1).toarray(), atol=2e-4)


def test_kept_selected_and_joined_samples_stay_themselves(tmp_path):
    whole = run(out=tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    pooled = run(out=tmp_path)  # read from the file
    assert path.stat().st_mtime_ns == before and pooled.window.tolist() == whole.window.tolist()
    both = Pooled.join([pooled.take([3, 0]), pooled.take([4])])
    assert len(both) == 3
    np.testing.assert_array_equal(both.norm[2], whole.norm[2][[3, 0, 4]])
    for pool in ("max", "mean"):
        np.testing.assert_array_equal(both.z(2, pool).toarray(), whole.z(2, pool).toarray()[[3, 0, 4]])
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="delete it"):
        run(out=tmp_path)
    with pytest.raises(ValueError, match="layer of"):
        pooled.z(7)


def test_correlations_of_kept_features_equal_numpy():
    """Pools for r and for coefficients, selections with repeats, and batches smaller than the data."""
    pooled = run()
    y = np.array([1, 0, 1, 1, 0])
    top, mean = pooled.z(1).toarray().astype(float), pooled.z(1, "mean").toarray().astype(float)
    c = pooled.correlation(1, y, steer_pool="mean", batch=2)
    alive = top.std(0) > 1e-5
    np.testing.assert_allclose(c.r()[alive], [np.corrcoef(x, y)[0, 1] for x in top.T[alive]], atol=1e-10)
    np.testing.assert_allclose(c.coefficients(), mean[y == 1].mean(0))
    drawn = [0, 0, 4, 2]
    np.testing.assert_allclose(pooled.take(drawn).correlation(1, y[drawn]).coefficients(), top[[0, 0, 2]].mean(0))
    with pytest.raises(ValueError, match="expected z"):
        pooled.correlation(1, y[:3])


def test_sites_and_settings_out_of_range_are_clear_errors():
    assert (Reading({}, "post").block(3), Reading({}).block(3)) == (3, 2)
    for layer, site in ((0, "pre"), (1, "mid")):
        with pytest.raises(ValueError, match=rf"site: .*got '{site}' for layers \[{layer}\]"):
            Reading({layer: Raw(D)}, site)
    with pytest.raises(ValueError, match="and SAEs"):
        pool_answers(tiny.lab(), ["a"], [[1]], [])
    for given in ({"answers": [], "prompts": []}, {"saes": {}}, {"answers": [[1]]}):
        with pytest.raises(ValueError, match="expected prompts, an answer for each, and SAEs"):
            run(**given)
    with pytest.raises(ValueError, match="a layer from 0 to 2, got 3"):
        run(saes={3: Raw(D)})


@pytest.mark.parametrize("name", ["threshold", "b_enc", "W_enc"])
def test_features_kept_of_one_sae_are_not_those_of_another(tmp_path, name):
    """The same decoder and another encoder: another folder with "{key}", and an error in the same one."""
    other, answers = tiny.planted_sae(), written()
    with torch.no_grad():
        getattr(other, name).add_(0.5)
    here, there = {"out": tmp_path / "same"}, {"out": tmp_path / "{key}"}
    expected = run(answers, saes={1: other}).z(1).nnz
    assert run(answers, saes={1: tiny.planted_sae()}, **there).z(1).nnz != expected == run(answers, saes={1: other}, **there).z(1).nnz
    run(answers, saes={1: tiny.planted_sae()}, **here)
    with pytest.raises(ValueError, match="another run"):
        run(answers, saes={1: other}, **here)

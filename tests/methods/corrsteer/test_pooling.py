"""Pooling during generation against plain forward passes on tiny random models."""

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
from steerkit.methods.corrsteer.pooling import Raw, block_of, pool_generations
from steerkit.store import Work

D = tiny.D_MODEL
PROMPTS = ["I think", "a", "The longest of the prompts here", "So", "a"]
GREEDY = Sampling(temperature=0.0, max_new_tokens=6)


def run(prompts=PROMPTS, kind="llama", saes=None, *, new=6, stop=(), batch_size=None, out=None, **settings):
    lab = tiny.lab(kind, saes={1: tiny.planted_sae(), 2: tiny.planted_sae()} if saes is None else saes)
    work = Work(batch_size, out, progress=False)
    return pool_generations(lab, prompts, sampling=replace(GREEDY, max_new_tokens=new, stop=tuple(stop)), work=work, **settings)


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
def test_pooled_features_equal_a_plain_pass_and_texts_those_of_generate(kind, site):
    """Left-padded batches against each text alone, whole: maximum and mean over the positions that predict a token."""
    texts, pooled = run(kind=kind, site=site)
    frame = generate(tiny.lab(kind), PROMPTS, sampling=GREEDY, work=Work(progress=False))
    assert pooled.tokens == frame.tokens.tolist() and texts == frame.text.tolist()
    assert pooled.window.tolist() == [6] * 5
    for row, prompt in enumerate(PROMPTS):
        for layer in (1, 2):
            top, mean = by_hand(kind, prompt, pooled.tokens[row], layer, site, 6)
            close(pooled.z(layer, "max")[[row]], top)
            close(pooled.z(layer, "mean")[[row]], mean)


def test_the_window_ends_before_the_step_that_predicts_the_end():
    """Rows that end early, at once or not at all, in one batch: steps 0 to k - 1, zeros, all steps."""
    full = run(new=8)[1]
    stop = full.tokens[0][3], full.tokens[1][0]
    _, pooled = run(new=8, stop=stop)
    lengths = [next((i for i, t in enumerate(ts) if t in stop), 8) for ts in full.tokens]
    assert pooled.window.tolist() == lengths and [len(t) for t in pooled.tokens] == lengths
    assert lengths[1] == 0 and lengths[4] == 0 and 0 < lengths[0] <= 3
    for row, steps in enumerate(lengths):
        top, mean = by_hand("llama", PROMPTS[row], full.tokens[row], 1, "post", steps)
        close(pooled.z(1)[[row]], top)
        close(pooled.z(1, "mean")[[row]], mean)
    assert pooled.z(1)[[1]].nnz == 0


def test_one_token_answers_always_have_a_window_and_max_equals_mean():
    first = [t[0] for t in run(new=1)[1].tokens]
    _, pooled = run(new=1, stop=first[:1])
    assert pooled.window.tolist() == [1] * 5 and pooled.tokens[0] == []
    for layer in (1, 2):
        assert (pooled.z(layer, "max") != pooled.z(layer, "mean")).nnz == 0
    close(pooled.z(1)[[0]], by_hand("llama", PROMPTS[0], [], 1, "post", 1)[0])
    _, none = run(new=1, stop=first[:1], min_window=0)
    assert none.window[0] == 0 and none.z(1)[[0]].nnz == 0


def test_the_labs_saes_and_its_ends_of_text_are_the_defaults(monkeypatch):
    seen, real = [], P.decode
    monkeypatch.setattr(P, "decode", lambda *a, **kw: seen.append(kw["sampling"]) or real(*a, **kw))
    _, pooled = pool_generations(tiny.lab(), ["a"])
    assert list(pooled.features) == [1]
    assert seen == [Sampling(temperature=0.0, stop=(tiny.tokenizer().pad_token_id, tiny.tokenizer().eos_token_id))]


def test_batches_of_any_size_give_the_same_features():
    """One by one nothing is padded; together the rows are left-padded, end at different steps and leave the batch."""
    full = run(new=8)[1]
    stop = [full.tokens[2][4]]
    (texts, together), (alone_texts, alone) = run(new=8, stop=stop), run(new=8, stop=stop, batch_size=1)
    assert texts == alone_texts and together.window.tolist() == alone.window.tolist()
    for layer in (1, 2):
        for pool in ("max", "mean"):
            np.testing.assert_allclose(together.z(layer, pool).toarray(), alone.z(layer, pool).toarray(), atol=2e-4)


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


def test_raw_coordinates_keep_their_signs():
    """Residual coordinates: a negative maximum is a negative maximum, and a text that ends at once is zero."""
    _, pooled = run(saes={1: Raw(D)})
    sae = run(saes={1: tiny.planted_sae()})[1]
    top = pooled.z(1).toarray()
    assert (top < 0).any()
    np.testing.assert_allclose(np.maximum(top, 0), sae.z(1).toarray()[:, :D], atol=1e-6)
    mean = sae.z(1, "mean").toarray()
    np.testing.assert_allclose(pooled.z(1, "mean").toarray(), mean[:, :D] - mean[:, D:], atol=1e-5)


def test_an_interrupted_run_carries_on_from_its_files(tmp_path, monkeypatch):
    out = tmp_path / "run-{key}"
    texts, whole = run(batch_size=2)
    calls = dies(monkeypatch, P, "decode", at=2)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2, out=out)
    again, resumed = run(batch_size=2, out=out)
    assert len(calls) == 2 + 2 and again == texts  # three batches, the first was done
    assert (resumed.z(2) != whole.z(2)).nnz == 0
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="another run"):
        run(batch_size=2, new=5, out=folder)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("pretend"), ValueError("else")])
def test_out_of_memory_halves_the_batch_and_other_errors_do_not(monkeypatch, error):
    texts, whole = run()
    sizes = short_of_memory(monkeypatch, P, "decode", rows=2, error=error)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="else"):
            run()
        return
    again, halves = run()
    assert again == texts and sizes == [5, 2, 3, 1, 2]
    np.testing.assert_allclose(halves.z(1).toarray(), whole.z(1).toarray(), atol=2e-4)


def test_kept_selected_and_joined_samples_stay_themselves(tmp_path):
    whole = run(out=tmp_path)[1]
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    pooled = run(out=tmp_path)[1]  # read from the file
    assert path.stat().st_mtime_ns == before
    assert pooled.tokens == whole.tokens and pooled.window.tolist() == whole.window.tolist()
    both = Pooled.join([pooled.take([3, 0]), pooled.take([4])])
    assert both.tokens == [whole.tokens[i] for i in (3, 0, 4)] and len(both) == 3
    for pool in ("max", "mean"):
        np.testing.assert_array_equal(both.z(2, pool).toarray(), whole.z(2, pool).toarray()[[3, 0, 4]])
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="delete it"):
        run(out=tmp_path)
    with pytest.raises(ValueError, match="layer of"):
        pooled.z(7)


def test_correlations_of_kept_features_equal_numpy():
    """Pools for r and for coefficients, selections with repeats, and batches smaller than the data."""
    _, pooled = run()
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
    assert (block_of(3, "post"), block_of(3, "pre")) == (3, 2)
    for layer, site in ((0, "pre"), (1, "mid")):
        with pytest.raises(ValueError, match="site"):
            block_of(layer, site)
    with pytest.raises(ValueError, match="at least one prompt"):
        run([])
    with pytest.raises(ValueError, match="at least one prompt and SAE, got 5 and 0"):
        run(saes={})
    with pytest.raises(ValueError, match="a layer from 0 to 2, got 3"):
        run(saes={3: Raw(D)})
    with pytest.raises(ValueError, match=r"greedy decoding.*set temperature=0"):
        pool_generations(tiny.lab(), ["a"], sampling=Sampling())


@pytest.mark.parametrize("name", ["threshold", "b_enc", "W_enc"])
def test_features_kept_of_one_sae_are_not_those_of_another(tmp_path, name):
    """The same decoder and another encoder: another folder with "{key}", and an error in the same one."""
    other = tiny.planted_sae()
    with torch.no_grad():
        getattr(other, name).add_(0.5)
    here, there = {"out": tmp_path / "same"}, {"out": tmp_path / "{key}"}
    expected = run(saes={1: other})[1].z(1).nnz
    assert run(saes={1: tiny.planted_sae()}, **there)[1].z(1).nnz != expected == run(saes={1: other}, **there)[1].z(1).nnz
    run(saes={1: tiny.planted_sae()}, **here)
    with pytest.raises(ValueError, match="another run"):
        run(saes={1: other}, **here)


def test_pooled_positions_end_where_hugging_face_ends_the_answer():
    """Two end tokens in the generation config, of which the tokenizer knows one: nothing past the answer is pooled."""
    lab = tiny.lab()
    free = generate(lab, PROMPTS, sampling=replace(GREEDY, max_new_tokens=32), work=Work(progress=False)).tokens
    lab.hf.generation_config.eos_token_id = [2, free[0][3]]
    _, pooled = pool_generations(lab, PROMPTS, work=Work(progress=False))
    for prompt, window in zip(PROMPTS, pooled.window):
        ids = torch.tensor([prompt_ids(lab.tokenizer, prompt)])
        new = lab.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
        assert window == len([t for t in new.tolist() if t not in (0, 2, free[0][3])])
    assert pooled.window[0] <= 3

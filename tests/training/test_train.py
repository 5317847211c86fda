"""Rows, blocks, batches and training against planted data, autograd, sae_lens's own functions, and interruptions."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file

from recipes import saes as recipe_saes
from steerkit.feature_cards import contexts, describe, describe_on, passages
from steerkit.features import ordinary_positions, residuals
from steerkit.models.jumprelu import JumpReLU
from steerkit.training import harvest, quality, train
from steerkit.training.harvest import Block, Recipe, Sae, Stream
from steerkit.training.quality import fit, loss_recovered

D = tiny.D_MODEL


@pytest.fixture
def text(tmp_path):
    """A data set file: plain documents and one chat."""
    rows = [{"text": f"Document {i} speaks of {'rain' * (i % 4)} and of wind.", "source": "ab"[i % 2]} for i in range(60)]
    rows.insert(5, {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]})
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def recipe(**change):
    small = {"saes": (Sae(0, 128), Sae(1, 96)), "k": 4, "tokens": 1200, "epochs": 2.0, "batch": 100, "context": 32, "block_rows": 16}
    return Recipe(**(small | {"warm_up": 3} | change))


def stream(text, **change):
    return Stream(tiny.model("llama"), tiny.tokenizer(), text, recipe(**change), batch_size=8)


def test_rows_are_packed_documents_with_the_first_token_in_front(text):
    tok = tiny.tokenizer()
    rows = torch.stack(list(harvest.token_rows(text, tok, context=32)))
    assert rows.shape[1] == 32 and (rows[:, 0] == tok.bos_token_id).all()
    stream = tok.decode(rows[:, 1:].flatten()).replace("<bos>", "")
    assert stream.startswith("Document 0 speaks of  and of wind.Document 1 speaks of rain and of wind.") and "[user] Hello?" in stream


@pytest.mark.parametrize("lengths", [[3, 9, 1, 30, 7, 7, 2], [7] * 6, [8, 6, 15, 1, 1, 1, 1, 21]])
def test_packing_equals_sae_lens(lengths):
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    docs = [torch.arange(10 * i + 2, 10 * i + 2 + n) for i, n in enumerate(lengths)]
    docs.insert(2, torch.tensor([1, 5, 6]))  # brings its own beginning-of-text token
    how = {"context_size": 8, "begin_batch_token_id": 1, "sequence_separator_token_id": 1}
    theirs = [row.tolist() for row in concat_and_batch_sequences(iter(docs), **how)]
    ours = list(harvest.packed(((i, "", d.tolist()) for i, d in enumerate(docs)), 1, 8))
    assert [row.tolist() for row, _ in ours] == theirs
    for row, owner in ours:
        assert all(t == 1 or t in docs[o].tolist() for t, o in zip(row.tolist(), owner.tolist())) and owner[0] == -1


def test_a_block_holds_the_residual_streams_of_ordinary_positions(text):
    s = stream(text)
    got, tok = s.block(1), s.tokenizer
    rows = torch.stack(list(harvest.token_rows(text, tok, context=32)))
    size = -(-s.recipe.rows // s.recipe.blocks)
    rows = rows[size : 2 * size]
    parts = [(b, residuals(s.model, b, layers=[0, 1])) for b in rows.split(8)]
    keep = [ordinary_positions(b, None, r, special=tok.all_special_ids) for b, r in parts]
    assert torch.equal(got.ids, torch.cat([b[k] for (b, _), k in zip(parts, keep)]))
    want = torch.cat([r[1][k] for (_, r), k in zip(parts, keep)])
    assert (got.acts[1].float() - want).norm() < 0.03 * want.norm()  # bfloat16 autocast, where native
    lines = [json.loads(line) for line in Path(text).read_text().splitlines()]
    number = int(got.owner[200])
    said = tok.decode(got.ids[got.owner == number])
    assert said in lines[number]["text"] and s.sources[s.source_of[number]] == lines[number]["source"]


def test_too_little_text_is_a_clear_error(text):
    with pytest.raises(ValueError, match="lower `tokens`"):
        stream(text, tokens=10**6, block_rows=10**4).block(0)


def test_batches_are_a_shuffled_block_and_start_anywhere(text):
    s = stream(text, block_rows=1000)
    seen = [batch[0] for _, batch in s.batches(0)]
    rows = {tuple(row.tolist()) for row in s.block(0).acts[0].float()}
    taken = [tuple(row.tolist()) for batch in seen for row in batch]
    assert len(taken) == len(s.block(0)) // 100 * 100 and set(taken) <= rows
    assert not torch.equal(seen[0], s.block(0).acts[0][:100].float())
    later = [batch[0] for _, batch in stream(text, block_rows=1000).batches(0, 3)]
    assert all(map(torch.equal, seen[3:], later))
    assert not torch.equal(next(s.batches(1))[1][0], seen[0])
    with pytest.raises(ValueError, match="lower `batch`"):
        next(stream(text, batch=10**5).batches(0))


def test_outlier_and_special_positions_are_left_out():
    ids = torch.tensor([[1, 9, 9, 2, 9, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    resid = torch.ones(1, 7, 4)
    resid[0, 4] = 50.0
    keep = ordinary_positions(ids, mask, {0: resid}, special=[0, 1, 2], outlier=10.0)
    assert keep.tolist() == [[False, True, True, False, False, True, False]]


class Planted(Stream):
    """Sparse sums of known directions in place of a model's activations: what an SAE must find."""

    def __init__(self, plan, n=4000, atoms=24, active=3):
        super().__init__(tiny.model("llama", d_model=16), None, "planted", plan)
        rng = torch.Generator().manual_seed(0)
        self.truth = torch.nn.functional.normalize(torch.randn(atoms, 16, generator=rng), dim=1)
        codes = torch.zeros(n, atoms).scatter(1, torch.rand(n, atoms, generator=rng).topk(active).indices, 1.0)
        self.x = (codes * (1 + torch.rand(n, atoms, generator=rng))) @ self.truth * 3

    def block(self, number):
        return Block({0: self.x.half()}, torch.arange(len(self.x)), torch.zeros(len(self.x)).long())


def test_training_finds_planted_directions_and_export_is_an_sae_lens_jumprelu(tmp_path):
    from sae_lens import SAE

    plan = Recipe((Sae(0, 48, lr=3e-3),), k=3, tokens=4000, epochs=60, batch=200)
    planted = Planted(plan)
    weights = train.train(planted, dtype=torch.float32)["layer_0"]
    train.export(weights, tmp_path / "sae", layer=0, recipe=plan, acts=planted.x)
    ready = SAE.load_from_disk(tmp_path / "sae", dtype="float32")
    assert ready.cfg.architecture() == "jumprelu" and ready.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    torch.testing.assert_close(ready.W_dec.norm(dim=1), torch.ones(48), atol=2e-3, rtol=0)
    with torch.no_grad():
        f = ready.encode(planted.x)
        fvu = (planted.x - ready.decode(f)).square().sum() / (planted.x - planted.x.mean(0)).square().sum()
    assert fvu < 0.1 and abs(float((f > 0).sum(1).float().mean()) - 3) < 0.1
    cosines = (planted.truth @ torch.nn.functional.normalize(ready.W_dec, dim=1).T).amax(1)
    assert (cosines > 0.9).float().mean() > 0.9


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_gradients_are_those_of_sae_lens(n_dead):
    """The loss of sae_lens's BatchTopKTrainingSAE, auxiliary part included, differentiated by autograd."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    ours = train.BatchTopK(16, 48, 3.5, seed=1)
    for p in ours.params[2:]:
        p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=48, k=3.5, rescale_acts_by_decoder_norm=False))
    for name, p in zip(ours.PARAMS, ours.params):
        getattr(theirs, name).data.copy_(p.data)
    x = 3 * torch.randn(20, 16, generator=torch.Generator().manual_seed(3))
    dead = torch.arange(48) < n_dead
    ours.idle[dead] = 10**9
    got, loss = ours.gradients(x)
    out = theirs.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    )
    out.loss.backward()
    assert float(loss) == pytest.approx(out.losses["mse_loss"].item(), rel=1e-5)
    for name, grad in zip(ours.PARAMS, got):
        torch.testing.assert_close(grad, getattr(theirs, name).grad, rtol=1e-4, atol=1e-5)


def test_the_quick_search_keeps_what_a_full_one_keeps():
    quick = train.BatchTopK(4, 40, 3.5)
    for seed in range(6):
        pre = torch.randn(10, 40, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3)
        assert set(quick.active(pre).tolist()) == set(pre.flatten().topk(35).indices.tolist())
    assert len(quick.active(-torch.ones(10, 40))) == 0


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def test_a_cut_off_run_goes_on_to_the_same_weights(text, tmp_path, monkeypatch):
    plan = {"saes": (Sae(0, 128), Sae(1, 96), Sae(1, 64, share=0.5))}
    whole = train.train(stream(text, **plan))
    assert whole.keys() == {"layer_0", "layer_1-d_sae96", "layer_1-d_sae64-share0.5"}
    step, calls = train.BatchTopK.step, []

    def break_off(self, *args):
        calls.append(1)
        if len(calls) == 23:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(train.BatchTopK, "step", break_off)
    with pytest.raises(KeyboardInterrupt):
        train.train(stream(text, **plan), tmp_path / "state.safetensors", every=0)
    monkeypatch.setattr(train.BatchTopK, "step", step)
    resumed = train.train(stream(text, **plan), tmp_path / "state.safetensors")
    assert same(whole, resumed)
    monkeypatch.setattr(train.BatchTopK, "step", break_off)  # done: no step is taken again
    assert same(whole, train.train(stream(text, **plan), tmp_path / "state.safetensors"))
    with pytest.raises(ValueError, match="checkpoint of"):
        train.train(stream(text, k=5), tmp_path / "state.safetensors")


def test_a_killed_process_goes_on_to_the_same_weights(text, tmp_path):
    state = tmp_path / "state.safetensors"
    code = f"""if True:
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parents[i]) for i in (0, 1)]!r}
        from pathlib import Path
        import test_train as t
        step, calls = t.train.BatchTopK.step, []
        def kill(self, *args):
            calls.append(1)
            if len(calls) == 15: os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args)
        t.train.BatchTopK.step = kill
        t.train.train(t.stream({text!r}), Path({str(state)!r}), every=0)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert state.exists() and same(train.train(stream(text), state), train.train(stream(text)))


def test_threshold_gives_the_wanted_l0():
    rng = torch.Generator().manual_seed(0)
    state = {
        "W_enc": torch.randn(8, 30, generator=rng),
        "b_enc": torch.randn(30, generator=rng),
        "b_dec": torch.randn(8, generator=rng),
    }
    x = torch.randn(5000, 8, generator=rng)
    cut = train.l0_threshold(state, x, 4)
    pre = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    assert (pre > cut).sum(1).float().mean().item() == pytest.approx(4, abs=0.01)


def test_fit_equals_a_float64_oracle_and_a_perfect_sae_loses_nothing():
    perfect, noisy = tiny.lab(), tiny.lab()
    rows = torch.randint(5, 200, (6, 20), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = perfect.tokenizer.bos_token_id
    W_dec = noisy.sae(1).W_dec.data
    W_dec += 0.05 * torch.randn(W_dec.shape, generator=torch.Generator().manual_seed(1))
    table, density = fit(noisy, rows)
    resid = residuals(noisy.hf, rows, layers=[1])
    x = resid[1][ordinary_positions(rows, None, resid, special=noisy.tokenizer.all_special_ids)].double()
    f = torch.relu(torch.cat([x, -x], 1))
    error = (x - f @ W_dec.double()).square().sum() / (x - x.mean(0)).square().sum()
    assert table.fvu[0] == pytest.approx(float(error), rel=1e-4) and table.l0[0] == pytest.approx(float((f > 0).sum(1).double().mean()))
    torch.testing.assert_close(density[1].double(), (f > 0).double().mean(0), rtol=1e-5, atol=1e-6)
    row = loss_recovered(perfect, rows).iloc[0]
    assert row.recovered_zero == pytest.approx(1.0, abs=1e-3) and row.loss_sae == pytest.approx(row.loss_clean, abs=1e-3)


def test_densities_are_counted_where_no_cards_are_shipped(text):
    lab = tiny.lab(saes={0: tiny.planted_sae(), 1: tiny.planted_sae()})
    rows = [row for _, row in zip(range(4), harvest.token_rows(text, lab.tokenizer))]
    alone = tiny.lab(saes={1: tiny.planted_sae()})
    assert torch.equal(quality.density(lab.at(1), text, rows=4), fit(alone, torch.stack(rows))[1][1])


def test_feature_cards_name_the_planted_peaks(tmp_path):
    sae, tok = tiny.planted_sae(), tiny.tokenizer()
    ids = torch.randint(5, 200, (300,), generator=torch.Generator().manual_seed(0))
    x = 0.1 * torch.rand(300, D, generator=torch.Generator().manual_seed(1))
    x[150, 7], x[40, 7] = 9.0, 8.0
    owners = torch.arange(300) // 50
    pieces = ([t[:100], t[100:]] for t in (x, ids, owners))
    card = describe(sae, next(pieces), next(pieces), tmp_path / "features.safetensors", owners=next(pieces), source_of={0: 4, 3: 1}, k=2)
    stored = load_file(card)
    assert stored["peaks"][7].tolist() == [9.0, 8.0] and stored["documents"][7].tolist() == [3, 0]
    assert stored["sources"][7].tolist() == [1, 4]
    assert stored["contexts"][7, 0, 8].item() == ids[150].item()
    assert stored["contexts"][7, 1].to(torch.int64).tolist() == ids[32:43].tolist()
    np.testing.assert_allclose(stored["density"][:D], (x > 0).float().mean(0))
    assert f"«{tok.decode([int(ids[150])])}»" in contexts(card, 7, tok)[0][0]
    before, peak, after, value = passages(card, [3, 7], tok)[1][0]
    assert (f"{before}«{peak}»{after}", value) == contexts(card, 7, tok)[0] and peak == tok.decode([int(ids[150])])


def test_a_card_is_made_on_given_texts_from_ordinary_positions_alone(tmp_path):
    lab = tiny.lab()
    texts = ["so many words in one line", "and as many in another one", "a third line of words to read"]
    card = describe_on(lab.at(1), texts, tmp_path / "card.safetensors", k=2)
    feature, best, peak = 5, 0.0, ""
    for text in texts:
        ids, _ = lab.tokens([text])
        acts = lab.sae(1).encode(residuals(lab.hf, ids, layers=[1])[1])[0, 1:, feature].detach()  # not at the first token
        if float(acts.max()) > best:
            best, peak = float(acts.max()), lab.tokenizer.decode([ids[0, 1 + int(acts.argmax())]])
    before, found, after, value = passages(card, [feature], lab.tokenizer)[0][0]
    assert found == peak and value == pytest.approx(best, rel=1e-3) and len(before) <= 8 and len(after) <= 2


def test_the_recipe_trains_describes_and_measures(text, tmp_path, monkeypatch):
    """From the command line: SAEs that open, with cards that name their sources; a table of their features; the data card's."""
    lab = tiny.lab()
    spec = SimpleNamespace(**vars(lab.preset), layers=[1], sae_set=lambda: SimpleNamespace(folder=str(tmp_path / "shipped")))
    monkeypatch.setattr(recipe_saes.load, "preset", lambda name: spec)
    monkeypatch.setattr(recipe_saes.load, "load_model", lambda *_, **__: (lab.hf, lab.tokenizer))
    monkeypatch.setattr(recipe_saes.load, "open", lambda *_, **__: lab)
    monkeypatch.setattr(recipe_saes, "DATA", tmp_path)
    call = ["--dataset", text, "--tokens", "900"]
    small = ["--saes", "1:64", "1:96", "--k", "4", "--batch", "100", "--warm-up", "3", "--block-rows", "8"]
    recipe_saes.main(["train", *call, *small, "--work", str(tmp_path), "--out", str(tmp_path / "saes")])
    for name, d_sae in (("layer_1-d_sae64", 64), ("layer_1-d_sae96", 96)):
        assert JumpReLU(tmp_path / "saes" / name).W_dec.shape == (d_sae, D)
        about = json.loads((tmp_path / "saes" / name / "cfg.json").read_text())["metadata"]
        assert set(about["sources"]) == {"", "a", "b"} and about["recipe"]["tokens"] == 900
        assert load_file(tmp_path / "saes" / name / "features.safetensors")["sources"].max() < 3
    recipe_saes.main(["features", str(tmp_path / "saes"), *call, "--out", str(tmp_path / "features.csv")])
    found = pd.read_csv(tmp_path / "features.csv")
    assert found.d_sae.tolist() == [64, 96] and found.auroc_best.between(0, 1).all() and found.fvu.between(0, 2).all()
    (tmp_path / "README.md").write_text("Before\n<!-- quality -->\nold\n<!-- end of quality -->\nbehind\n")
    recipe_saes.main(["quality", "--dataset", text, "--rows", "6", "--loss-rows", "4"])
    table, page = pd.read_csv(tmp_path / "shipped" / "quality.csv"), (tmp_path / "README.md").read_text()
    assert table.recovered_zero[0] == pytest.approx(1.0, abs=1e-3) and table.loss_rows[0] == 4
    assert page.startswith("Before\n<!-- quality -->") and page.endswith("<!-- end of quality -->\nbehind\n") and "old" not in page
    assert f"| 1 | {table.fvu[0]:.3f} [" in page

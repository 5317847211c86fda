"""Harvest, batches and training against planted data, sae_lens's own functions, and interruptions."""

import json

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from steerkit import shards, train
from steerkit.features import ordinary_positions, residuals
from steerkit.quality import contexts, describe, fit, loss_recovered

D = tiny.D_MODEL


@pytest.fixture
def text(tmp_path):
    """A data set file: plain documents and one chat."""
    rows = [{"text": f"Document {i} speaks of {'rain' * (i % 4)} and of wind."} for i in range(60)]
    rows.insert(5, {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]})
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def recipe(**change):
    return shards.Recipe(
        **(
            {
                "layers": (0, 1),
                "d_sae": 128,
                "k": 4,
                "tokens": 600,
                "epochs": 2.0,
                "batch": 100,
                "context": 32,
                "shard_rows": 8,
            }
            | change
        )
    )


def test_rows_are_packed_documents_with_the_first_token_in_front(text):
    tok = tiny.tokenizer()
    rows = torch.stack(list(shards.token_rows(text, tok, recipe())))
    assert rows.shape[1] == 32 and (rows[:, 0] == tok.bos_token_id).all()
    stream = tok.decode(rows[:, 1:].flatten()).replace("<bos>", "")
    assert stream.startswith("Document 0 speaks of  and of wind.Document 1 speaks of rain and of wind.") and "[user] Hello?" in stream


def test_harvest_writes_the_residual_streams_of_ordinary_positions_and_resumes(text, tmp_path, monkeypatch):
    model, tok = tiny.model("llama"), tiny.tokenizer()
    folder = shards.harvest(model, tok, text, tmp_path / "a", recipe())
    paths = sorted(folder.glob("*"))
    rows = torch.stack([r for _, r in zip(range(8), shards.token_rows(text, tok, recipe()))])
    resid = residuals(model, rows, layers=[0, 1])
    keep = ordinary_positions(rows, None, resid, special=tok.all_special_ids)
    first = load_file(paths[0])
    assert torch.equal(first["tokens"].long(), rows[keep])
    assert (first["layer_1"].float() - resid[1][keep]).norm() < 0.03 * resid[1][keep].norm()  # bfloat16 autocast
    whole = [p.read_bytes() for p in paths]
    paths[-1].unlink()
    calls = []
    monkeypatch.setattr(shards, "residuals", lambda *a, **k: calls.append(1) or residuals(*a, **k))
    shards.harvest(model, tok, text, tmp_path / "a", recipe())
    assert [p.read_bytes() for p in sorted(folder.glob("*"))] == whole and len(calls) == 1


def test_too_little_text_is_a_clear_error(text, tmp_path):
    with pytest.raises(ValueError, match="ended after"):
        shards.harvest(tiny.model("llama"), tiny.tokenizer(), text, tmp_path / "a", recipe(tokens=10**6))


def test_outlier_and_special_positions_are_left_out():
    ids = torch.tensor([[1, 9, 9, 2, 9, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    resid = torch.ones(1, 7, 4)
    resid[0, 4] = 50.0
    keep = ordinary_positions(ids, mask, {0: resid}, special=[0, 1, 2], outlier=10.0)
    assert keep.tolist() == [[False, True, True, False, False, True, False]]


def planted_shards(folder, n=4000, atoms=24, active=3, seed=0):
    """Sparse sums of known directions: what an SAE must find."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(atoms, 16, generator=rng), dim=1)
    codes = torch.zeros(n, atoms).scatter(1, torch.rand(n, atoms, generator=rng).topk(active).indices, 1.0) * (
        1 + torch.rand(n, atoms, generator=rng)
    )
    folder.mkdir()
    save_file({"layer_0": (codes @ truth * 3).half(), "tokens": torch.arange(n).int()}, folder / "shard_00000.safetensors")
    return truth, (codes @ truth * 3)


def test_training_finds_planted_directions_and_export_is_an_sae_lens_jumprelu(tmp_path):
    from sae_lens import SAE

    truth, x = planted_shards(tmp_path / "shards")
    plan = shards.Recipe(layers=(0,), d_sae=48, k=3, tokens=4000, epochs=60, batch=200, lr=3e-3)
    sae = train.train(tmp_path / "shards", plan, 16, tmp_path / "ck", n_checkpoints=0, autocast=False)["layer_0"]
    train.export(sae, tmp_path / "sae", layer=0, recipe=plan, acts=x)
    ready = SAE.load_from_disk(tmp_path / "sae", dtype="float32")
    assert ready.cfg.architecture() == "jumprelu" and ready.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    torch.testing.assert_close(ready.W_dec.norm(dim=1), torch.ones(48), atol=2e-3, rtol=0)
    with torch.no_grad():
        f = ready.encode(x)
        fvu = (x - ready.decode(f)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.1 and abs(float((f > 0).sum(1).float().mean()) - 3) < 0.1
    cosines = (truth @ torch.nn.functional.normalize(ready.W_dec, dim=1).T).amax(1)
    assert (cosines > 0.9).float().mean() > 0.9


def test_training_resumes_from_a_checkpoint_to_the_same_place(tmp_path):
    planted_shards(tmp_path / "shards")
    plan = shards.Recipe(layers=(0,), d_sae=48, k=3, tokens=4000, epochs=4, batch=200)
    whole = train.train(tmp_path / "shards", plan, 16, tmp_path / "a", n_checkpoints=3, autocast=False)["layer_0"]
    newest = max((tmp_path / "a").iterdir(), key=lambda p: int(p.name))
    assert (newest / "layer_0" / "sae_weights.safetensors").exists()
    resumed = train.train(tmp_path / "shards", plan, 16, tmp_path / "a", n_checkpoints=3, autocast=False)["layer_0"]
    cosine = torch.nn.functional.cosine_similarity(whole.W_dec, resumed.W_dec, dim=1)
    assert cosine.min() > 0.99  # one step may be repeated


def test_batches_are_shuffled_whole_and_skip_ahead(tmp_path):
    planted_shards(tmp_path / "shards", n=1000)
    plan = shards.Recipe(layers=(0,), tokens=1000, batch=100)
    straight = shards.Shards(tmp_path / "shards", plan)
    seen = [next(straight)["layer_0"] for _ in range(13)]
    ahead = shards.Shards(tmp_path / "shards", plan, skip=12)
    assert torch.equal(next(ahead)["layer_0"], seen[12])
    epoch = torch.cat(seen[:10]).sum(0)
    torch.testing.assert_close(
        epoch,
        load_file(tmp_path / "shards" / "shard_00000.safetensors")["layer_0"].float().sum(0),
        rtol=1e-3,
        atol=1e-2,
    )
    with pytest.raises(FileNotFoundError, match="harvest"):
        shards.Shards(tmp_path, plan)


def test_quick_batch_top_k_equals_sae_lens():
    from sae_lens.saes.batchtopk_sae import BatchTopK

    quick = train.QuickBatchTopK(3.5)
    for seed in range(6):
        x = torch.randn(10, 40, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 3)
        torch.testing.assert_close(quick(x), BatchTopK(3.5)(x))
        assert quick.cut == pytest.approx(float(BatchTopK(3.5)(x)[BatchTopK(3.5)(x) > 0].min()))


def test_quick_dead_latent_loss_equals_sae_lens():
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    cfg = BatchTopKTrainingSAEConfig(d_in=16, d_sae=48, k=3)
    quick = train.quick_sae(cfg)
    plain = BatchTopKTrainingSAE(cfg)
    plain.load_state_dict(quick.state_dict())
    x, out, pre = torch.randn(20, 16), torch.randn(20, 16), torch.randn(20, 48)
    for n_dead in (0, 3, 8, 20):
        dead = torch.zeros(48, dtype=torch.bool)
        dead[:n_dead] = True
        args = {"sae_in": x, "sae_out": out, "hidden_pre": pre, "dead_neuron_mask": dead}
        torch.testing.assert_close(quick.calculate_topk_aux_loss(**args), plain.calculate_topk_aux_loss(**args))


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
    model, tok, sae = tiny.model("llama"), tiny.tokenizer(), tiny.planted_sae()
    rows = torch.randint(5, 200, (6, 20), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = tok.bos_token_id
    noisy = tiny.planted_sae()
    noisy.W_dec.data += 0.05 * torch.randn(noisy.W_dec.shape, generator=torch.Generator().manual_seed(1))
    table, density = fit(model, tok, {1: noisy}, rows)
    resid = residuals(model, rows, layers=[1])
    x = resid[1][ordinary_positions(rows, None, resid, special=tok.all_special_ids)].double()
    f = torch.relu(torch.cat([x, -x], 1))
    error = (x - f @ noisy.W_dec.detach().double()).square().sum() / (x - x.mean(0)).square().sum()
    assert table.fvu[0] == pytest.approx(float(error), rel=1e-4) and table.l0[0] == pytest.approx(float((f > 0).sum(1).double().mean()))
    torch.testing.assert_close(density[1].double(), (f > 0).double().mean(0), rtol=1e-5, atol=1e-6)
    perfect = loss_recovered(model, tok, {1: sae}, rows)
    assert perfect.recovered_zero[0] == pytest.approx(1.0, abs=1e-3) and perfect.loss_sae[0] == pytest.approx(
        perfect.loss_clean[0], abs=1e-3
    )


def test_feature_cards_name_the_planted_peaks(tmp_path):
    sae, tok = tiny.planted_sae(), tiny.tokenizer()
    ids = torch.randint(5, 200, (300,), generator=torch.Generator().manual_seed(0))
    x = 0.1 * torch.rand(300, D, generator=torch.Generator().manual_seed(1))
    x[150, 7], x[40, 7] = 9.0, 8.0
    card = describe(sae, [x[:100], x[100:]], [ids[:100], ids[100:]], tmp_path / "features.safetensors", k=2)
    stored = load_file(card)
    assert stored["peaks"][7].tolist() == [9.0, 8.0]
    assert stored["contexts"][7, 0, 8].item() == ids[150].item()
    assert stored["contexts"][7, 1].to(torch.int64).tolist() == ids[32:43].tolist()
    np.testing.assert_allclose(stored["density"][:D], (x > 0).float().mean(0))
    assert f"«{tok.decode([int(ids[150])])}»" in contexts(card, 7, tok)[0][0]

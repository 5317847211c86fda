"""Measures of single features against loops, scikit-learn and planted answers; the GPU queue's steps and parcels."""

import json
import tarfile

import numpy as np
import pytest
import tiny
import torch

from recipes import gpu as gpu_run
from steerkit import stats
from steerkit.models.jumprelu import JumpReLU
from steerkit.training import quality, train
from steerkit.training.harvest import Block, Recipe, Sae


def test_spread_counts_different_labels():
    labels = torch.randint(-1, 4, (50, 5), generator=torch.Generator().manual_seed(0))
    assert quality.spread(labels).tolist() == [len(set(row) - {-1}) for row in labels.tolist()]


def test_auroc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (20, 6)), rng.integers(0, 4, (30, 6))
    truth = [1] * 20 + [0] * 30
    want = [roc_auc_score(truth, np.concatenate([a[:, i], b[:, i]])) for i in range(6)]
    np.testing.assert_allclose(stats.auroc(a, b), want)


def test_the_chosen_feature_has_not_seen_the_held_out_sentences():
    rng = np.random.default_rng(0)
    parts = [rng.random((12, 5)) for _ in range(4)]
    parts[0][:, 2] += 5  # tells the prompts apart, not the sentences
    parts[2][:, 3] += 5  # the reverse
    parts[0][:, 4] += 5  # both, but it is dense
    parts[2][:, 4] += 5
    row = quality.topic_aurocs({"t": parts}, np.array([True] * 4 + [False])).iloc[0]
    assert row.feature == 2 and row.best == 1.0 and row.chosen == pytest.approx(stats.auroc(parts[2], parts[3])[2])


def test_stability_of_a_decoder_with_itself_and_with_noise():
    w = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    assert quality.stability(w, 3 * w.flip(0)) == pytest.approx(1.0, abs=1e-5) and quality.stability(w, other) < 0.5


def put_sae(folder, layer=1):
    w = {n: v for n, v in tiny.planted().items() if n != "threshold"}
    x = torch.randn(500, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    return train.export(w, folder, layer=layer, recipe=Recipe((Sae(layer),), k=40), acts=x)


def test_jumprelu_is_sae_lens_and_refuses_other_kinds(tmp_path):
    from sae_lens import SAE

    folder = put_sae(tmp_path / "sae")
    ours, theirs = JumpReLU(folder), SAE.load_from_disk(folder, dtype="float32")
    x = torch.randn(20, tiny.D_MODEL)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x))
        torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x))
    assert ours.layer == 1 and ours.dtype == torch.float32
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"architecture": "topk"}))
    with pytest.raises(ValueError, match="use sae_lens"):
        JumpReLU(folder)


def test_reconstruction_and_breadth_of_planted_features(tmp_path):
    sae = JumpReLU(put_sae(tmp_path / "sae"))
    sae.threshold.zero_()
    x = torch.randn(400, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)).half()
    got = quality.reconstruction(sae, x.float())
    assert got["fvu"] < 1e-6 and got["l0"] == pytest.approx(tiny.D_MODEL, abs=0.1) and got["dead"] == 0
    texts = {"t": [[x[i : i + 9].float() for i in range(0, 45, 9)]] * 4}
    block = Block({1: x}, torch.randint(3, 250, (400,)), torch.arange(400) // 100)
    row = quality.survey(tiny.lab(saes={1: sae}).at(1), block, {n: n // 2 for n in range(4)}, texts, tmp_path / "card.safetensors")
    top = (x.float() @ sae.W_enc).clamp_min(0)  # contexts lie in blocks of eleven tokens, one peak in each
    peaks = top[:396].view(-1, 11, top.shape[1]).max(1)
    block_of = peaks.values.topk(5, dim=0).indices
    owner = (block_of * 11 + peaks.indices.gather(0, block_of)) // 100
    assert row["documents_3"] == pytest.approx(np.mean([len(set(o)) >= 3 for o in owner.T.tolist()]))
    assert row["sources_2"] == pytest.approx(np.mean([len({n // 2 for n in o}) >= 2 for o in owner.T.tolist()]))


def test_the_gpu_queue_goes_on_where_it_stopped_and_packs_its_results(tmp_path, monkeypatch):
    ran = []
    plan = {name: (minutes, lambda name=name: ran.append(name)) for name, minutes in (("a", 1.0), ("b", 1.0), ("c", 60.0))}
    monkeypatch.setattr(gpu_run, "steps", lambda args: plan)
    for _ in range(2):
        gpu_run.main(["--work", str(tmp_path)])
    assert ran == ["a", "b"]  # c would take longer than what is left
    gpu_run.main(["--work", str(tmp_path), "--minutes", "90"])
    assert ran == ["a", "b", "c"]
    (tmp_path / "results").mkdir()
    noise = np.random.default_rng(0).bytes(2500)
    (tmp_path / "results" / "x.bin").write_bytes(noise)
    monkeypatch.setattr(gpu_run, "PIECE", 1000)
    for part in (0, 1, 2, 3):
        gpu_run.main(["--work", str(tmp_path), "--pack", str(tmp_path / "out"), "--part", str(part)])
    pieces = sorted((tmp_path / "out").iterdir())
    assert all(p.stat().st_size <= 1000 for p in pieces)
    (tmp_path / "whole.tar").write_bytes(b"".join(p.read_bytes() for p in pieces))
    with tarfile.open(tmp_path / "whole.tar") as archive:
        assert archive.extractfile("results/x.bin").read() == noise

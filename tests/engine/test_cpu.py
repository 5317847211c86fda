"""bfloat16 is chosen where the machine multiplies it, never elsewhere; the two dtypes agree within what is said."""

import os
import subprocess
import sys

import pytest
import tiny
import torch

from steerkit.engine import cpu, packed
from steerkit.engine.losses import next_token_losses
from steerkit.features import token_batches
from steerkit.files import DATA
from steerkit.models import load
from steerkit.models.check import measure
from steerkit.training import harvest


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, monkeypatch):
    for module in (cpu, packed, harvest):
        monkeypatch.setattr(module, "native_bfloat16", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("wanted", ["auto", "bfloat16", torch.bfloat16])
def test_bfloat16_where_it_is_native_and_a_line_says_so(native, wanted, capsys):
    assert cpu.choose_dtype(wanted, "cpu") == (torch.bfloat16 if native else torch.float32)
    said = capsys.readouterr().out
    assert ("float32" in said and "no native bfloat16" in said) if not native else (wanted == "auto") == ("natively" in said)


@pytest.mark.parametrize("wanted", ["float32", "torch.float64", torch.float16])
def test_another_dtype_is_taken_without_a_word(native, wanted, capsys):
    assert cpu.choose_dtype(wanted, "cpu") == getattr(torch, str(wanted).removeprefix("torch.")) and not capsys.readouterr().out


@pytest.mark.parametrize("wanted", ["fp99", "int64", "nn"])
def test_a_name_that_is_no_floating_dtype_is_refused(wanted):
    with pytest.raises(ValueError, match=rf"expected auto or a floating dtype.*got {wanted!r}"):
        cpu.choose_dtype(wanted, "cpu")


def test_a_cpu_that_has_the_units_on_paper_alone_is_not_native(monkeypatch):
    """oneDNN accepts bfloat16 on any AVX-512 and emulates it; Arm says what it has through oneDNN."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for machine, expected in {"x86_64": False, "aarch64": True}.items():
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert cpu.native_bfloat16() is expected


def test_harvest_runs_in_bfloat16_only_where_it_is_native(native, tmp_path):
    """What the hooks of a block see tells which dtype the linear layers ran in."""
    import json

    model, seen = tiny.model("llama"), set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "ab cd " * 40}) + "\n" for _ in range(20)))
    recipe = harvest.Recipe((harvest.Sae(1),), tokens=200, context=16)
    harvest.Stream(model, tiny.tokenizer(), str(text), recipe).block(0)
    assert seen == {torch.bfloat16 if native else torch.float32}


@pytest.mark.embedded
def test_the_two_dtypes_agree_within_what_is_said():
    """On the check texts: mean loss within 0.05 nats (measured: 0.023 higher in bfloat16), FVU within 0.002, L0 within 1 %."""
    texts, found = (DATA / "check_texts.txt").read_text().splitlines(), {}
    for dtype in (torch.float32, torch.bfloat16):
        lab = load.open("smollm2-135m", layers=[13])
        lab.hf.to(dtype)
        ids, mask = next(iter(token_batches(lab.tokenizer, texts)))
        with torch.inference_mode():
            losses = next_token_losses(lab.hf(input_ids=ids, attention_mask=mask).logits, ids)[mask[:, 1:].bool()]
        found[dtype] = float(losses.mean()), measure(lab, dict(lab.saes))[13]
    (loss, row), (loss_16, row_16) = found.values()
    assert loss_16 == pytest.approx(loss, abs=0.05) and loss_16 != loss
    assert row_16["fvu"] == pytest.approx(row["fvu"], abs=0.002) and row_16["l0"] == pytest.approx(row["l0"], rel=0.01)


@pytest.mark.parametrize("mine", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_sleep_at_barriers_unless_told_otherwise(mine):
    code = "import steerkit, os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | mine
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
    expected = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"} if "OMP_WAIT_POLICY" not in mine else {"GOMP_SPINCOUNT": "None"}
    assert said == list(({"OMP_WAIT_POLICY": "PASSIVE", **expected} | mine).values())

"""What a decode keeps on disk: resumed to the same bytes, and never another run's texts."""

import json

import pytest
import tiny
import torch
from faults import dies
from steered import PROMPTS, arms, run, vec

import steerkit.engine.generate as G
from steerkit.engine.generate import BASELINE, Arm, Sampling, Work, generate
from steerkit.engine.lab import Lab
from steerkit.engine.steer import Ablate, Boost
from steerkit.store import Journal


class Killed(BaseException):
    """Stands for Ctrl-C."""


def test_killed_half_way_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    lab = tiny.lab()
    run(lab, batch_size=5, out=tmp_path / "whole.jsonl")
    calls = dies(monkeypatch, G, "decode", at=3, error=Killed)
    with pytest.raises(Killed):
        run(lab, batch_size=5, out=tmp_path / "resumed.jsonl")
    with (tmp_path / "resumed.jsonl").open("ab") as file:
        file.write(b'{"row": 17, "tex')  # and the machine died while writing
    done = len(calls)
    run(lab, batch_size=5, out=tmp_path / "resumed.jsonl")
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(arms()) * len(PROMPTS) == 24 and len(calls) - done == 5 - 2  # 24 rows in 5 batches; two were done


def test_another_run_in_the_same_file_is_refused(tmp_path):
    lab = tiny.lab()
    run(lab, out=tmp_path / "a.jsonl", seed=1)
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(ValueError, match="another run"):
        run(lab, out=tmp_path / "a.jsonl", seed=2)
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_key_in_the_name_gives_another_run_another_file(tmp_path):
    lab = tiny.lab()
    for seed in (1, 2, 1):
        run(lab, out=tmp_path / "t-{key}.jsonl", seed=seed)
    assert len(list(tmp_path.glob("t-*.jsonl"))) == 2 and not (tmp_path / "t-{key}.jsonl").exists()


def test_a_full_disk_loses_nothing_already_written(tmp_path, monkeypatch):
    lab = tiny.lab()
    run(lab, batch_size=5, out=tmp_path / "whole.jsonl")
    real, calls = Journal.write, []

    def full(self, rows):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(self, rows)

    monkeypatch.setattr(Journal, "write", full)
    with pytest.raises(OSError, match="No space"):
        run(lab, batch_size=5, out=tmp_path / "b.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 5
    run(lab, batch_size=5, out=tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


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
    lab, work = tiny.lab(), Work(out=tmp_path / "texts.jsonl", progress=False)

    def boosted(sae):
        arms = [Arm("boost", (Boost(1, sae, 5, 3.0),))]
        return generate(lab, PROMPTS, arms, sampling=Sampling(max_new_tokens=3), window="last", work=work)

    boosted(tiny.planted_sae())
    boosted(tiny.planted_sae())  # an equal SAE carries on
    with pytest.raises(ValueError, match="holds another run"):
        boosted(changed_sae(name))


def with_model(model) -> Lab:
    return tiny.lab(hf=model)


def one_weight_moved():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1.0
    return model


def other_rope():
    model = tiny.model("llama")
    model.config.rope_parameters["rope_theta"] = 5.0
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"arms": [BASELINE, Arm("other")]},
        lambda: {"arms": [Arm("baseline", (), 7.0)]},
        lambda: {"arms": [Arm("baseline", (Ablate(1, vec(1).direction),))]},
        lambda: {"lab": with_model(tiny.model("llama").bfloat16())},
        lambda: {"lab": with_model(one_weight_moved())},
        lambda: {"lab": with_model(other_rope())},
        lambda: {"prompts": ["<bos>I think"]},  # the same tokens, another table
        lambda: {"sampling": Sampling(max_new_tokens=2, top_k=5)},
        lambda: {"window": "last"},
    ],
)
def test_whatever_changes_the_table_changes_the_key(tmp_path, change):
    call = {"lab": tiny.lab(), "prompts": ["I think"], "arms": [BASELINE], "sampling": Sampling(max_new_tokens=2)}
    out = tmp_path / "t.jsonl"
    generate(**call, work=Work(out=out, progress=False))
    generate(**call, work=Work(3, out, progress=False))  # float32: the batch size says nothing
    with pytest.raises(ValueError, match="holds another run"):
        generate(**call | change(), work=Work(out=out, progress=False))


def test_the_batch_size_is_part_of_the_key_where_rounding_depends_on_it(tmp_path):
    lab, two = with_model(tiny.model("llama").bfloat16()), Sampling(max_new_tokens=2)
    generate(lab, PROMPTS, sampling=two, work=Work(4, tmp_path / "t.jsonl", progress=False))
    with pytest.raises(ValueError, match="holds another run"):
        generate(lab, PROMPTS, sampling=two, work=Work(2, tmp_path / "t.jsonl", progress=False))

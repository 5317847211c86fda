"""Shared fixtures. While tests run, jaxtyping and beartype check the shapes and types of steerkit (pyproject.toml)."""

import functools
import os
import random
from pathlib import Path

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parent.parent

# `make test` leaves these to us, and a make that a test calls would take its options and its VENV from them.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(name, None)


@functools.cache
def hub_trouble() -> str:
    """Ask the hub once, with five seconds of patience (its own client retries for a minute), and return what went wrong."""
    import httpx
    from huggingface_hub import constants

    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def pytest_runtest_setup(item) -> None:
    """Skip what needs the hub where it cannot be reached."""
    if item.get_closest_marker("hub") and (why := hub_trouble()):
        pytest.skip(f"needs the hub: {why}")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed the global generators before every test, and return the seed."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return 0


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no way to the hub."""
    import tiny

    return tiny.offline_hub(monkeypatch, tmp_path / "hub")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project with texts that are not part of it; tests that need it skip without it."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the project")
    return folder

"""Shared fixtures. While tests run, jaxtyping and beartype check the shapes and types of steerkit (pyproject.toml)."""

import random
from pathlib import Path

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed the global generators before every test, and return the seed."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project with texts that are not part of it; tests that need it skip without it."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the project")
    return folder

"""The Triton kernels themselves, on a GPU or under Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted -k attention

Triton reads TRITON_INTERPRET when it is imported, and a process has it or not: without it and without a GPU nothing
is collected here. The suite of the project runs every file in a process of its own (tests/kernels/test_interpreted.py).
"""

import os

import pytest
import torch

from zoo.kernels import use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def precise():
    """The widest type that the kernels take: float64 under the interpreter."""
    return torch.float64 if INTERPRETED else torch.float32

"""Shared settings: one thread a test worker, so that parallel workers do not fight over the cores."""

import os

import pytest

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# tests start processes: where bytecode is not kept, each of them compiles all of torch and timm
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)

import zoo  # noqa: F401 - registers the models


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

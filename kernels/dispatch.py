"""Which form of an operator runs: its Triton kernels, or plain torch. One rule for all operators, `use_triton`.

| backend | Triton kernels run | otherwise |
|---|---|---|
| "auto" (default) | on CUDA and ROCm tensors that the operator's kernels support | plain torch |
| "triton" | on CUDA and ROCm tensors, on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1) | an error |
| "torch" | never | plain torch |

`set_backend` sets it for the process, `use_backend` for a block of code, and the environment variable ZOO_KERNELS
before zoo is imported. Scripted models and ONNX graphs hold no Triton kernel: there, and on the meta device, every
backend means plain torch.

The rule is asked inside the public function of an operator, never in a model. So fx sees one node, torch.compile
and torch.export follow the branch that the example tensors take, and a scripted function keeps the plain form.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["explain", "get_backend", "interpreted", "set_backend", "use_backend", "use_triton"]

BACKENDS = ("auto", "triton", "torch")
# read once: torch.compile must not look at the environment, and Triton itself reads this variable once
_TRITON_FOUND = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_backend = "auto"


def set_backend(name: str) -> None:
    """Choose "auto", "triton" or "torch" for every operator of this process.

    Raises:
        ValueError: another name, or "triton" where the package is not installed.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernels have no backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "triton" and not _TRITON_FOUND:
        raise ValueError("the backend 'triton' needs the package triton: pip install triton, or choose 'auto'")
    _backend = name


def get_backend() -> str:
    """The name that `set_backend`, `use_backend` or ZOO_KERNELS chose."""
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend` for a block of code."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def use_triton(operator: str, *tensors: Tensor | None, unsupported: str | None = None) -> bool:
    """Whether `operator` runs its Triton kernels on these tensors: the rule of this module.

    Args:
        operator: its name, for the error.
        tensors: everything that it reads; the first one is not None.
        unsupported: what the kernels cannot do here ("a head size of 160 (at most 128)"); None: they can.

    Raises:
        ValueError: the backend is "triton" and they cannot run.
    """
    if _backend == "torch" or torch.onnx.is_in_onnx_export():
        return False
    first = tensors[0]
    if first is None or first.device.type == "meta":
        return False
    reason = unsupported
    if not _TRITON_FOUND:
        reason = "the package triton is not installed"
    for tensor in tensors:
        if tensor is not None and tensor.device != first.device:
            reason = f"its tensors are on {first.device} and {tensor.device}"
    if not first.is_cuda and not (_INTERPRETED and _backend == "triton" and first.device.type == "cpu"):
        reason = f"its tensors are on {first.device} (a GPU, or TRITON_INTERPRET=1 for a CPU, is needed)"
    elif first.is_cuda and first.dtype == torch.float64:
        reason = "float64 on a GPU"
    if reason is not None and _backend == "triton":
        raise ValueError(
            f"{operator} was asked to run as a Triton kernel and cannot: {reason}; choose the backend 'auto' or 'torch'"
        )
    return reason is None


def interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter in this process (TRITON_INTERPRET=1)."""
    return _INTERPRETED


def explain() -> str:
    """One sentence: what would run on this machine, and why."""
    if _backend == "torch":
        return "plain torch, because the backend is 'torch'"
    if not _TRITON_FOUND:
        return "plain torch, because triton is not installed"
    if torch.cuda.is_available():
        return f"Triton on {torch.cuda.get_device_name()}, plain torch for tensors on the CPU (backend '{_backend}')"
    if _INTERPRETED:
        how = "for the backend 'triton'" if _backend == "auto" else "(backend 'triton')"
        return f"no CUDA or ROCm device; Triton's interpreter {how}, plain torch otherwise"
    if _backend == "triton":
        return "none, because the backend is 'triton' and there is no CUDA or ROCm device"
    return "plain torch, because there is no CUDA or ROCm device (backend 'auto')"


def _from_environment() -> None:
    name = os.environ.get("ZOO_KERNELS") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"ZOO_KERNELS is {name!r}: set it to one of {', '.join(BACKENDS)}")
    set_backend(name)


_from_environment()

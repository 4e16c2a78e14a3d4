"""`@triton_jit`: triton.jit for kernels that stand in the file of their operator without importing triton.

    @triton_jit
    def _double(X, Y, size, BLOCK: tl.constexpr):
        ...

    _double[(triton.cdiv(size, 64),)](x, y, size, BLOCK=64, num_warps=4)

Inside the kernels, `tl` is triton.language, and other functions of the module with the same decorator can be called.
triton is imported when a kernel runs for the first time. `recorded_launches` collects launches instead of running
them: from tensors on the meta device this gives every configuration that the launch heuristics choose, which is how
the tests compile all of them for GPUs that are not there.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels.dispatch import interpreted

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["Launch", "TritonKernel", "cdiv", "dot", "dot_precision", "next_power_of_2", "on_amd", "triton_jit"]


class Launch(NamedTuple):
    """One launch of a kernel: its grid, positional arguments, and keyword arguments (with num_warps and such)."""

    kernel: TritonKernel
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict[str, Any]


_recorder: list[Launch] | None = None
_recorded_for_amd = False


class TritonKernel:
    """A function in Triton's language, compiled when first used; `kernel[grid](...)` launches it."""

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self.function = function

    @functools.cached_property
    def compiled(self) -> Any:
        """The result of triton.jit (of Triton's interpreter under TRITON_INTERPRET=1)."""
        import triton
        import triton.language as tl

        # the module's globals, with `tl` in them and the kernels that this one calls as Triton wants them
        scope = {**self.function.__globals__, "tl": tl}
        for name in self.function.__code__.co_names:
            # names of attributes are among them: `dot` below reads tl.dot
            if isinstance(scope.get(name), TritonKernel) and scope[name] is not self:
                scope[name] = scope[name].compiled
        function = types.FunctionType(self.function.__code__, scope, self.function.__name__, self.function.__defaults__)
        functools.update_wrapper(function, self.function)
        del function.__wrapped__  # inspect would follow it back to the globals without `tl`
        return triton.jit(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        if 0 in grid:
            return  # an empty batch
        if _recorder is not None:
            _recorder.append(Launch(self, grid, args, kwargs))
            return
        tensor = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            self.compiled[grid](*args, **kwargs)


def triton_jit(function: Callable) -> TritonKernel:
    """Make a Triton kernel, or a function that kernels call, of `function`."""
    return TritonKernel(function)


@contextmanager
def recorded_launches(amd: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of this block, as they would be on a card of NVIDIA or AMD, and run none."""
    global _recorder, _recorded_for_amd
    before = _recorder, _recorded_for_amd
    _recorder, _recorded_for_amd = [], amd
    try:
        yield _recorder
    finally:
        _recorder, _recorded_for_amd = before


# What launch heuristics ask for ----------------------------------------------------------------------------------


def on_amd() -> bool:
    """Whether kernels are launched on ROCm: 64 KB of shared memory a block, against 163 KB or more on sm_80 and up."""
    return _recorded_for_amd if _recorder is not None else torch.version.hip is not None


def dot_precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies operands of `dtype`.

    float32: in one TF32 product where torch may round so too, else in three ("tf32x3"), which keep float32's digits
    on the tensor cores; AMD's matrix cores take float32 as it is. Other types: exact products. "widen" is for
    bfloat16 under the interpreter, which has no arithmetic for it.
    """
    if dtype == torch.bfloat16 and interpreted() and _recorder is None:
        return "widen"
    if dtype != torch.float32 or on_amd():
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n (1 for n < 1)."""
    return 1 << max(0, n - 1).bit_length()


@triton_jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, accumulated in float32 (in float64 for such operands); `PRECISION` is what `dot_precision` returned."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)

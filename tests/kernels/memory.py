"""Peak memory of a computation on a CPU: the bytes of all storages that it makes and that live at the same time."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts what operations inside the block return; `peak` is in bytes. Inputs made before it do not count.

    Buffers that live only inside one operation of torch are not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):  # what exists already is somebody else's, or counted
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._known:
                self._remember(x.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._known:
                self._remember(x.untyped_storage(), x.untyped_storage().nbytes())
        return result

    def _remember(self, storage, size: int) -> None:
        key = storage._cdata
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(function: Callable, *args) -> int:
    """The peak of `function(*args)`, its result included."""
    with PeakMemory() as memory:
        function(*args)
    return memory.peak

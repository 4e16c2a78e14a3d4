"""Checkpoints that a crash cannot spoil: written beside their name, synced, renamed; the newest few are kept."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoint import CheckpointError, read_checkpoint
from zoo.extras import require

require("mmengine", extra="train")

from mmengine.dist import is_main_process  # noqa: E402
from mmengine.fileio import LocalBackend, register_backend  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.logging import HistoryBuffer  # noqa: E402

_PATTERN = re.compile(r"step_(\d+)\.pth")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(RuntimeError):
    """There is no room for a checkpoint; the ones before it are intact."""


@register_backend("zoo.atomic")
class AtomicBackend(LocalBackend):
    """A local file either appears whole, synced to the disk, or not at all."""

    def put(self, obj: bytes | memoryview, filepath: str | Path) -> None:
        """Write `obj` to `filepath`.

        Raises:
            DiskFullError: no room; nothing that was there before is touched.
        """
        path = Path(filepath)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            with temporary.open("wb") as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the rename itself must survive a power cut
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno in _DISK_ERRORS:
                raise DiskFullError(
                    f"no room to write {path.name} in {path.parent} ({error.strerror}): "
                    "free space and continue with --resume; earlier checkpoints are intact"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


def saved_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    numbered = [(int(m[1]), path) for path in folder.glob("step_*.pth") if (m := _PATTERN.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def newest_readable_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, and a remark for each newer one that cannot."""
    remarks = []
    for path in reversed(saved_checkpoints(folder)):
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            remarks.append(str(error))
            continue
        return path, remarks
    return None, remarks


class CheckpointHook(Hook):
    """Saves everything that a run needs to continue, every `interval` steps and at the end.

    Args:
        folder: where to.
        interval: steps from one checkpoint to the next.
        accumulate: forward passes of one optimiser step; a checkpoint between two of them would lose
            gradients, so it waits for the step.
        keep: how many stay. An old one is deleted after the new one is safe.
    """

    priority = "VERY_LOW"

    def __init__(self, folder: Path, interval: int, accumulate: int = 1, keep: int = 2):
        self.folder = Path(folder)
        self.interval = -(-interval // accumulate) * accumulate
        self.keep = keep

    def before_train(self, runner) -> None:
        """Make the folder and clear what a killed writer left behind."""
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.partial"):
                leftover.unlink()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Save if this step is due."""
        step = runner.iter + 1
        if step % self.interval == 0 or step == runner.max_iters:
            self.save(runner, step)

    def save(self, runner, step: int) -> None:
        """Save the state after `step` steps, then delete what is too old."""
        runner.save_checkpoint(
            str(self.folder),
            f"step_{step:08d}.pth",
            meta={"epoch": step // runner.train_loop.steps_per_epoch, "iter": step},
            backend="zoo.atomic",
        )
        if is_main_process():
            for old in saved_checkpoints(self.folder)[: -self.keep]:
                old.unlink(missing_ok=True)


class PlainHistoryHook(Hook):
    """Keeps mmengine's log history in checkpoints as plain tensors, so that reading one runs no code.

    mmengine pickles its `HistoryBuffer` objects, which torch.load refuses with `weights_only=True`;
    allow-listing them would need `getattr`, which opens every checkpoint to attacks.
    """

    priority = "LOWEST"

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """History buffers to tensors; runtime information to plain values."""
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {
            name: {
                "values": torch.from_numpy(buffer.data[0].copy()),
                "counts": torch.from_numpy(buffer.data[1].copy()),
            }
            for name, buffer in hub["log_scalars"].items()
        }
        hub["runtime_info"] = {k: v for k, v in hub["runtime_info"].items() if _is_plain(v)}
        hub["resumed_keys"] = dict(hub["resumed_keys"])
        checkpoint["message_hub"] = dict(hub)
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Tensors back to history buffers."""
        hub = checkpoint.get("message_hub")
        if hub is None:
            return
        for name, record in hub["log_scalars"].items():
            if isinstance(record, dict):
                buffer = HistoryBuffer()
                buffer._log_history = record["values"].cpu().numpy()
                buffer._count_history = record["counts"].cpu().numpy()
                hub["log_scalars"][name] = buffer


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)

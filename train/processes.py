"""Several processes: joining them under torchrun or Slurm, and a clear end when one of them is lost."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta

import torch

from zoo.extras import require

require("mmengine", extra="train")

from mmengine.dist import get_dist_info, is_distributed  # noqa: E402

# Long enough for the main process to evaluate a large set alone, short enough for a night to be saved.
_TIMEOUT = timedelta(minutes=30)
# What gloo, NCCL and torch's store say when the other side is gone.
_LOST = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|closed by peer|broken pipe|socket|timed? ?out|"
    r"nccl.*(?:abort|remote|unhandled)|gloo",
    re.IGNORECASE,
)


class StoppedError(RuntimeError):
    """The run was told to stop, or lost another process; raised between two lines of Python."""


def start_processes() -> None:
    """Join the other processes where torchrun or Slurm's `srun` started several."""
    if is_distributed():
        return
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        set_slurm_environment(os.environ)
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or "RANK" not in os.environ:
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))
    # torchrun may keep its store over a restart: the addresses of processes that are dead must not be found there
    store = torch.distributed.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=world, timeout=_TIMEOUT
    )


def set_slurm_environment(environment: MutableMapping[str, str]) -> None:
    """Translate what `srun` sets into torchrun's variables, in place; what is set already stays."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    # node[01-04,07]-ib or a,b: the first host of the list
    stem, number, rest = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes).groups("")
    for name, value in {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": stem + number + rest,
        "MASTER_PORT": str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000),
    }.items():
        environment.setdefault(name, value)


def was_restarted() -> bool:
    """Whether a launcher started this job again after a failure (torchrun's --max-restarts, Slurm's requeue)."""
    return any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


@contextmanager
def clear_ends() -> Iterator[None]:
    """Turn SIGTERM, and errors of communication, into a `StoppedError` that says what happened.

    torchrun sends SIGTERM to the other processes when one died, Slurm before a job's time is up.
    """
    rank, world = get_dist_info()
    who = f"process {rank} of {world}" if world > 1 else "the run"

    def stop(number: int, frame: object) -> None:
        reason = ", which the launcher sends when another process died" if world > 1 else ""
        raise StoppedError(f"{who} was stopped by {signal.Signals(number).name}{reason}")

    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if here else None
    try:
        yield
    except RuntimeError as error:
        if world > 1 and not isinstance(error, StoppedError) and _LOST.search(str(error)):
            first = str(error).strip().splitlines()[0]
            raise StoppedError(f"{who} lost contact with another one, which has probably died ({first})") from error
        raise
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)

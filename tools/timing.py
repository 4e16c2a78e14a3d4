"""Times of several calls, taken in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]


def default_clock(device: torch.device, threads: int = 1) -> Clock:
    """This process's CPU time for one thread of a CPU (another job's time is not ours), else the wall's."""
    return time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Clock | None = None,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every call in every round.

    Each round calls all of them, beginning with another one each time: what ran before fills the caches.
    """
    clock = clock or default_clock(device, torch.get_num_threads())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    order = list(calls.items())
    for turn in range(rounds):
        first = turn % len(order)
        for name, call in order[first:] + order[:first]:
            wait(device)
            start = clock()
            call()
            wait(device)
            times[name].append(clock() - start)
    return times


def wait(device: torch.device) -> None:
    """Until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]

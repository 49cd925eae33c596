"""Jobs timed beside each other: they take turns, A B A B …, so that all meet the same disturbances."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latency:
    """Measured time of one call.

    Attributes:
        median_ms: median over the calls, milliseconds.
        low_ms, high_ms: first and third quartile.
        n: calls measured.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    n: int


def latencies(
    jobs: Sequence[Callable[[], object]], n: int = 20, warm_up: int = 3, device: torch.device | None = None
) -> list[Latency]:
    """The time that each of `jobs` takes; see `times_in_turns`."""
    found = []
    for taken in times_in_turns(jobs, n, device, warm_up=warm_up):
        low, median, high = statistics.quantiles(taken, n=4) if n > 1 else taken * 3
        found.append(Latency(median, low, high, n))
    return found


def times_in_turns(
    jobs: Sequence[Callable[[], object]],
    turns: int,
    device: torch.device | None = None,
    seconds: float = math.inf,
    least: int = 3,
    warm_up: int = 1,
) -> list[list[float]]:
    """Milliseconds of each job in each turn; a turn runs all of them.

    Args:
        jobs: what to time.
        turns: at most so many, after those that are not counted.
        device: where the jobs run: a GPU is waited for. None for the CPU.
        seconds: no further turn is begun once these have passed, if `least` are done.
        least: turns that are counted in any case.
        warm_up: turns before, that are not counted.
    """
    started = time.perf_counter()
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(warm_up + turns):
        if turn >= warm_up + least and time.perf_counter() - started > seconds:
            break
        for job, taken in zip(jobs, times, strict=True):
            _wait(device)
            start = time.perf_counter()
            job()
            _wait(device)
            taken.append((time.perf_counter() - start) * 1e3)
    return [taken[warm_up:] for taken in times]


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)

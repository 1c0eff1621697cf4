"""Time engines interleaved in one process and compare their outputs with float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLICE, IDLE, LONGEST = 0.02, 0.1, 0.6
CALLS, WAKING = 5, 2
LONG, LONG_CALLS = 0.05, 3


@dataclass(frozen=True)
class Engine:
    """`step` does the work once, which is timed; `output` does it and gives the result as an array.

    `ready` is called before a few timed steps.
    """

    name: str
    precision: str
    step: Callable[[], object]
    output: Callable[[], NDArray[Any]]
    ready: Callable[[], object] = bool


@dataclass(frozen=True)
class Row:
    """What one engine reached on one work, or why it did not."""

    work: str
    engine: str
    precision: str
    median: float = 0.0
    """milliseconds"""
    best: float = 0.0
    error: float | None = None
    """largest difference to float64 over the largest value"""
    failure: str = ""


def measure(work: str, engines: Sequence[Engine], exact: NDArray[Any], runs: int, patience: float = 40.0) -> list[Row]:
    """Medians over interleaved rounds; fewer rounds than `runs` (at least 3) after `patience` seconds."""
    errors = [error(engine.output(), exact) for engine in engines]
    times: list[list[float]] = [[] for _ in engines]
    start = time.perf_counter()
    for done in range(runs):
        if done >= 3 and (time.perf_counter() - start) * (done + 1) / done > patience:
            break
        for engine, found in zip(engines, times, strict=True):
            engine.ready()
            settle()
            found.extend(steady(engine.step))
    rows = zip(engines, times, errors, strict=True)
    return [Row(work, e.name, e.precision, 1e3 * statistics.median(t), 1e3 * min(t), err) for e, t, err in rows]


def settle() -> None:
    """Wait until this process is idle: threads of the last engine spin on and would be counted against the next."""
    start = time.perf_counter()
    while time.perf_counter() - start < LONGEST:
        busy, wall = time.process_time(), time.perf_counter()
        time.sleep(SLICE)
        if time.process_time() - busy < IDLE * (time.perf_counter() - wall):
            return


def steady(step: Callable[[], object]) -> list[float]:
    """Seconds of a few calls in a row, the first ones left out: its threads are awake by then. Long calls are fewer."""
    times = [seconds(step)]
    long = times[0] > LONG
    times += [seconds(step) for _ in range((LONG_CALLS if long else CALLS) - 1)]
    return times[1 if long else WAKING :]


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def error(found: NDArray[Any], exact: NDArray[Any]) -> float:
    if found.size != exact.size:
        raise ValueError(f"the output has shape {list(found.shape)}, expected {list(exact.shape)}")
    return float(np.abs(found.reshape(exact.shape) - exact).max() / np.abs(exact).max())

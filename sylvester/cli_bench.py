"""Latency of every entry of an artefact on inputs made up from its signature."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.compiler.binding import DTYPES, asked
from sylvester.compiler.manifest import EntrySpec, Symbol, TensorSpec
from sylvester.compiler.runner import Runner, State
from sylvester.compiler.sizes import evaluate

WARM_UP = 3


def measure(runner: Runner, *, runs: int, batch: int, length: int) -> list[dict[str, Any]]:
    """One row per entry: median and fastest milliseconds, and tokens or rows per second.

    A decode step is timed at position `length`.
    """
    rows = []
    for name, entry in runner.manifest.entries.items():
        inputs = made_up(entry, batch, tokens_of(name, length))
        state = working_state(runner, name, inputs, length)
        times = [_seconds(runner, name, inputs, state) for _ in range(runs + WARM_UP)][WARM_UP:]
        median = statistics.median(times)
        work = {"per second": _work(entry, inputs) / median}
        unit = {"unit": "tokens" if entry.states else "rows"}
        rows.append(
            {"entry": name, "median ms": median * 1e3, "best ms": min(times) * 1e3, "runs": runs, **work, **unit}
        )
    return rows


def made_up(entry: EntrySpec, batch: int, length: int) -> dict[str, NDArray[Any]]:
    """Ones for integers, noise for floats; a symbol that leads some input's shape is the batch, others the length."""
    firsts = {spec.shape[0] for spec in asked(entry) if spec.shape}
    values = {s.name: _clamp(s, batch if s.name in firsts else length) for s in entry.symbols}
    return {spec.name: _array(spec, tuple(evaluate(n, values) for n in spec.shape)) for spec in asked(entry)}


def _clamp(symbol: Symbol, size: int) -> int:
    return max(symbol.min, size if symbol.max is None else min(size, symbol.max))


def _array(spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    dtype = DTYPES.get(spec.dtype, spec.dtype)
    if not spec.dtype.startswith("float"):
        return np.ones(shape, dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _work(entry: EntrySpec, inputs: dict[str, NDArray[Any]]) -> int:
    """Tokens of a call, or rows: those of its first input, as the entry may take fewer than were asked for."""
    shape = next((array.shape for array in inputs.values() if array.shape), (1,))
    return math.prod(shape[:2]) if entry.states else shape[0]


def tokens_of(entry: str, length: int) -> int:
    """Tokens per row of a call: a decode step adds one to a state that holds `length`."""
    return 1 if entry == "decode" else length


def working_state(runner: Runner, entry: str, inputs: dict[str, NDArray[Any]], length: int) -> State | None:
    """A fresh state; before a decode step it holds `length` positions, or as many as leave room for one more."""
    if not runner.manifest.entries[entry].states:
        return None
    state = runner.new_state(entry, inputs)
    state.position = fitting(runner, entry, length) if entry == "decode" else 0
    return state


def fitting(runner: Runner, entry: str, length: int) -> int:
    """The length that a language model has room for: one less before a decode step."""
    generation = runner.manifest.generation
    return min(length, generation.max_length - int(entry == "decode")) if generation else length


def _seconds(runner: Runner, entry: str, inputs: dict[str, NDArray[Any]], state: State | None) -> float:
    start = time.perf_counter()
    runner.run(entry, inputs, state)
    return time.perf_counter() - start

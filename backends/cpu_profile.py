"""Time every kernel of an entry and hold it against what the machine can do at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cpu_runtime import Engine
from sylvester.backends.kernel_table import KernelSpec, read_table
from sylvester.backends.limits import Limits
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.runner import Runner, State, entry_of

SETTLING = 0.3
"""Seconds of runs before the measured ones: a scheduler may take that long to give every thread a core."""


@dataclass(frozen=True)
class KernelTime:
    """The median time of one kernel, and the operations and bytes of one call of it."""

    kernel: KernelSpec
    seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Bound:
    """The least time that a machine allows, and which of its limits says so."""

    seconds: float
    limit: str


def profile(
    runner: Runner, entry: str, inputs: Mapping[str, NDArray[np.generic]], state: State | None, runs: int
) -> list[KernelTime]:
    """The kernels of an entry in the order in which they run; every thread waits for the others between two of them."""
    if not isinstance(runner, Engine):
        raise Unsupported(
            f"target {runner.manifest.target!r} does not time its kernels", hint="compile for the cpu target"
        )
    specs = read_table(runner.folder).entries[entry_of(runner.manifest, entry)]
    until = perf_counter() + SETTLING
    while perf_counter() < until:
        runner.run(entry, inputs, state)
    times = np.zeros((runs, max(len(specs), 1)))
    for row in times:
        runner.run(entry, inputs, state, row)
    flops, moved = runner.costs(entry, inputs, state, max(len(specs), 1))
    medians = np.median(times, axis=0)
    return [KernelTime(s, float(medians[n]), float(flops[n]), float(moved[n])) for n, s in enumerate(specs)]


def streamed(times: Sequence[KernelTime]) -> float:
    """Bytes that a call brings in from memory at least: what its kernels read of weights and state."""
    return sum(t.bytes for t in times if t.kernel.streams)


def bound(times: Sequence[KernelTime], limits: Limits, working_set: float) -> Bound:
    """Of one or several kernels: the longer of moving their bytes and computing their operations.

    A kernel that streams weights or state reads at the rate of `working_set`, what the whole call streams; another one
    finds its operands where the kernel before left them, at the rate of what it touches itself.
    """
    rates = [limits.bandwidth(max(working_set if t.kernel.streams else t.bytes, 1.0)) for t in times]
    moving = sum(t.bytes / rate for t, rate in zip(times, rates, strict=True))
    computing = sum(t.flops / limits.peak(t.kernel.arithmetic) for t in times)
    if moving >= computing:
        return Bound(moving, f"{min(rates, default=0) / 1e9:.0f} GB/s")
    kinds = sorted({t.kernel.arithmetic for t in times})
    return Bound(computing, ", ".join(f"{limits.peak(kind) / 1e9:.0f} Gop/s {kind}" for kind in kinds))


def entry_bound(times: Sequence[KernelTime], limits: Limits) -> Bound:
    """Of the whole call: activations may stay in the caches, weights and state are read once."""
    working_set = streamed(times)
    return bound([t if t.kernel.streams else replace(t, bytes=0.0) for t in times], limits, working_set)

"""How much memory compiling and running a CPU artefact takes, told before the long work starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from sylvester.backends.memory import available
from sylvester.backends.tensor_writer import Deferred
from sylvester.codegen.plan import Arena
from sylvester.compiler.binding import DTYPES
from sylvester.compiler.manifest import EntrySpec, Manifest
from sylvester.compiler.program import Program
from sylvester.compiler.sizes import evaluate

WORKING = 30_000_000
"""What compiling takes for pieces of weights and for graphs, the C compiler's own processes aside."""
PROCESS = 45_000_000
"""A process that has loaded numpy, the runtime and the code."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `compiling` counts what is added to the model given, `running` a whole process.

    `arena` holds activations, `state` the caches of one call; `longest_` stands for the longest sequence, the other
    numbers for the example inputs.
    """

    compiling: int
    weights: int
    arena: int
    longest_arena: int
    state: int

    @property
    def running(self) -> int:
        return PROCESS + self.weights + self.arena + self.state

    @property
    def longest_running(self) -> int:
        return PROCESS + self.weights + self.longest_arena + self.state

    def notes(self) -> list[str]:
        """Lines for the ledger; one more for what this machine has no room for."""
        parts = f"weights {_mb(self.weights)}, arena {_mb(self.arena)}, state {_mb(self.state)}"
        told = [
            f"memory: compiling takes {_mb(self.compiling)} on top of the model, "
            f"running {_mb(self.running)} ({parts}), at the longest sequence {_mb(self.longest_running)}"
        ]
        free = available()
        needs = {"compiling": self.compiling, "running at the longest sequence": self.longest_running}
        return told + [
            f"memory is short: {work} takes {_mb(need)}, this machine has {_mb(free)} free"
            for work, need in needs.items()
            if need > free
        ]

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "running": self.running, "longest_running": self.longest_running}


def memory_plan(
    program: Program,
    manifest: Manifest,
    stored: Mapping[str, Deferred],
    arenas: Mapping[str, Arena],
    rows: int | None = None,
) -> MemoryPlan:
    """Entries share one arena, and the state of a call serves all of them.

    `rows` takes the place of every size without a maximum, such as the batch, instead of that of the example.
    """
    given = {name: {size.name: rows or n for size, n in arena.hints.items()} for name, arena in arenas.items()}
    longest = {name: given[name] | _longest(manifest.entries[name]) for name in arenas}
    arena, longest_arena = (
        max((arenas[name].nbytes(sizes[name]) for name in arenas), default=0) for sizes in (given, longest)
    )
    return MemoryPlan(
        compiling=WORKING + _made(program),
        weights=sum(tensor.nbytes for tensor in stored.values()),
        arena=arena,
        longest_arena=longest_arena,
        state=max((_state(manifest, name, longest[name]) for name in arenas), default=0),
    )


def _longest(spec: EntrySpec) -> dict[str, int]:
    return {symbol.name: symbol.max for symbol in spec.symbols if symbol.max is not None}


def _state(manifest: Manifest, entry: str, sizes: Mapping[str, int]) -> int:
    slots = [manifest.state[name] for name in manifest.entries[entry].states]
    return sum(math.prod(evaluate(n, sizes) for n in slot.shape) * _width(slot.dtype) for slot in slots)


def _width(dtype: str) -> int:
    return np.dtype(DTYPES.get(dtype, dtype)).itemsize


def _made(program: Program) -> int:
    """Bytes of the weights that passes made; a transposed one is a view of what the model holds."""
    held = set(program.info.get("captured", program.weights))
    made = [tensor for key, tensor in program.weights.items() if key not in held]
    return sum(tensor.nbytes for tensor in made if tensor.is_contiguous())


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"

"""This machine as passes may ask about it: seconds of layers and of whole steps, bytes stored and needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from sylvester.backends import fingerprint
from sylvester.backends.base import Backend
from sylvester.backends.cpu_profile import SETTLING
from sylvester.backends.cpu_runtime import Array, Engine
from sylvester.backends.identity import identity
from sylvester.backends.kernel_table import read_table
from sylvester.backends.memory_plan import memory_plan
from sylvester.backends.resident import resident
from sylvester.backends.signature import manifest
from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuning import runnable
from sylvester.backends.width_speed import linear_seconds
from sylvester.codegen.compile import compile_program
from sylvester.codegen.isa import Isa, variants
from sylvester.codegen.layout import plain
from sylvester.compiler import knobs
from sylvester.compiler.cost import hint
from sylvester.compiler.program import Program, binding, value
from sylvester.compiler.progress import report, silent
from sylvester.compiler.recipe import Footprint, Machine, Seconds, Shape, Step
from sylvester.compiler.runner import State
from sylvester.compiler.target import Target

ROUNDS, RUNS = 15, 8
"""How often the programs take turns, and calls of each in a turn."""
QUARTILE = 0.25
"""Other work on the machine only adds to a time: the lower quartile is closer to what a call takes than the median."""


@dataclass(frozen=True)
class CpuMachine(Machine):
    """Linear layers are timed with `rows` rows."""

    backend: Backend
    target: Target
    rows: int

    @property
    def threads(self) -> int:
        return self.target.threads or knobs.threads()

    def identity(self) -> str:
        return " ".join([fingerprint.cpu(), f"threads {self.threads}", *(identity(self.target) or ())])

    def linears(self, shapes: Iterable[Shape], bits: Iterable[int]) -> Seconds:
        return linear_seconds(shapes, bits, self.rows, self.target)

    def steps(self, programs: Sequence[Program], entry: str, length: int) -> list[Step]:
        with ExitStack() as opened:
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="sylvester-steps-"))
            calls = []
            for i, program in enumerate(programs):
                report("build what is timed", i, len(programs))
                calls.append(self._call(program, entry, length, Path(folder, str(i))))
                opened.enter_context(closing(calls[-1].engine))
            report("time steps", 0, 1)
            found = _race(calls)
            report("time steps", 1, 1)
            return found

    def footprint(self, program: Program) -> Footprint:
        lasting = resident(program)
        compiled = compile_program(lasting.program)
        names = {entry: [use.name for use in uses] for entry, uses in compiled.weights.items()}
        stored, held = lasting.tensors(compiled.weights)
        made = manifest(program, self.target, weights=names, steady=True)
        plan = memory_plan(program, made, stored | held, compiled.unit.arenas, rows=1)
        layouts = {layout.name: layout for uses in compiled.weights.values() for layout in uses}
        by_keys: dict[tuple[str, ...], int] = {}
        for name, tensor in stored.items():
            layout = layouts.get(name, plain(name))
            keys = tuple(key for key in (*layout.keys, *layout.scales) if key)
            by_keys[keys] = by_keys.get(keys, 0) + tensor.nbytes
        return Footprint(by_keys, plan.longest_running, plan.state)

    def _call(self, program: Program, entry: str, length: int, folder: Path) -> _Call:
        folder.mkdir()
        target = replace(self.target, isas=self._isas(), tune=None)
        made = self.backend.build(program, target, folder, silent)
        engine = Engine(folder, made, self.threads)
        inputs: dict[str, Array] = {
            binding(node).key: np.zeros([1] * value(node).ndim, str(value(node).dtype).removeprefix("torch."))
            for node in program.entries[entry].placeholders("input")
            if value(node).ndim
        }
        state = engine.new_state(entry, inputs)
        capacity = min((hint(slot.shape[2]) for slot in program.state.values()), default=length + 1)
        state.position = min(length, capacity - 1)
        return _Call(engine, entry, inputs, state)

    def _isas(self) -> tuple[str, ...]:
        """The one this machine runs, and the one that says so."""
        if self.target.isas:
            return self.target.isas
        compiler = find_compiler(architecture=self.target.architecture)
        known: Sequence[Isa] = variants({"f32", "bf16", "q8"}, self.target.architecture, ())
        return tuple(dict.fromkeys((known[0].name, runnable(known, self.target, compiler).name)))


@dataclass(frozen=True)
class _Call:
    engine: Engine
    entry: str
    inputs: dict[str, Array]
    state: State

    def seconds(self) -> float:
        start = perf_counter()
        self.engine.run(self.entry, self.inputs, self.state)
        return perf_counter() - start

    def labels(self) -> list[tuple[str, ...]]:
        """Nodes of every kernel."""
        specs = read_table(self.engine.folder).entries[self.entry]
        return [tuple(label.partition(" ")[0] for label in spec.labels) for spec in specs]


def _race(calls: Sequence[_Call]) -> list[Step]:
    labels = [call.labels() for call in calls]
    whole: list[list[float]] = [[] for _ in calls]
    kernels = [np.zeros((ROUNDS, max(len(found), 1))) for found in labels]
    until = perf_counter() + SETTLING
    while perf_counter() < until:
        for call in calls:
            call.seconds()
    for turn in range(ROUNDS):
        for call, times, table in zip(calls, whole, kernels, strict=True):
            call.seconds()
            times += [call.seconds() for _ in range(RUNS)]
            rows = np.zeros((RUNS, table.shape[1]))
            for row in rows:
                call.engine.run(call.entry, call.inputs, call.state, row)
            table[turn] = np.quantile(rows, QUARTILE, axis=0)
    return [
        Step(
            float(np.quantile(times, QUARTILE)),
            tuple(zip(found, np.quantile(table, QUARTILE, 0).tolist(), strict=False)),
        )
        for times, found, table in zip(whole, labels, kernels, strict=True)
    ]

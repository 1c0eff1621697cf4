"""Load and run a CPU artefact: one copy of the weights, one thread team, one arena reused between calls; on numpy."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cpu_library import Doubles, Library, choose
from sylvester.backends.derived import open_weights, with_derived
from sylvester.backends.memory import aligned, aligned_empty, aligned_zeros, small_pages
from sylvester.compiler import binding, knobs
from sylvester.compiler.errors import CompileError, InputError
from sylvester.compiler.manifest import EntrySpec, Manifest, TensorSpec
from sylvester.compiler.runner import SHARED, State, entry_of

Array = NDArray[np.generic]
OUT_OF_RANGE = 1
ZERO_DIVISOR = 3
NO_TREE = 4
WRONG_BLOCKS = 5
NO_MEMORY = -1
KEPT_CALLS = 64


@dataclass
class Call:
    """One entry at fixed sizes: output shapes, arena size and the pointer table with the weights filled in."""

    sizes: Any
    buffers: Any
    outputs: list[tuple[int, ...]]
    arena: int
    slots: tuple[weakref.ref[Array], ...] = ()
    """The state arrays the table points at."""


class Engine:
    """Runs entries; safe to share between threads, which take turns, and after a fork."""

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        self.folder, self.manifest = folder, manifest
        self.threads = threads or _wanted_threads(manifest)
        choice = choose(folder, manifest)
        self.binary = Library(choice.path, list(manifest.entries))
        self.notes = choice.notes
        """What the user should know of the variant that was loaded."""
        self._file = open_weights(folder, manifest)
        self._weights: dict[str, Array] = {}
        self._calls: dict[object, Call] = {}
        self._arena: Array = aligned_empty((0,), "uint8")
        self._closed = False
        self._start()
        ENGINES.add(self)

    @property
    def isa(self) -> str:
        return self.binary.path.stem

    def new_state(self, entry: str, inputs: Mapping[str, Array]) -> State:
        """Zeroed slots for the batch of `inputs`."""
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        blank = State({})
        arrays = binding.complete(spec, inputs, blank)
        values = binding.bind(spec, arrays, None, self.manifest.state)
        shapes = binding.state_shapes(spec, self.manifest.state, values)
        slots = self.manifest.state
        return State(
            {n: aligned_zeros(s, binding.DTYPES.get(slots[n].dtype, slots[n].dtype)) for n, s in shapes.items()}
        )

    def spare(self, state: State) -> None:
        """Rows after the first will hold little of what comes next: memory they do not touch costs nothing."""
        for array in state.arrays.values():
            small_pages(array[1:])

    def run(
        self, entry: str, inputs: Mapping[str, Array], state: State | None = None, times: Array | None = None
    ) -> dict[str, Array]:
        """One call of an entry; `InputError` when the inputs do not fit, with what was found and expected.

        The seconds of every kernel are added to `times` (float64) when it is given; kernels then run one by one.
        """
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        arrays = [aligned(a) for a in binding.complete(spec, inputs, state)]
        with self._lock:
            if self._closed:
                raise CompileError("the artefact is closed", hint="load it again with sv.load")
            call = self._prepare(entry, spec, arrays, state)
            outputs = [
                aligned_empty(shape, binding.DTYPES.get(o.dtype, o.dtype))
                for shape, o in zip(call.outputs, spec.outputs, strict=True)
            ]
            self._execute(entry, call, arrays, state, outputs, times)
        return {o.name: array for o, array in zip(spec.outputs, outputs, strict=True)}

    def costs(self, entry: str, inputs: Mapping[str, Array], state: State | None, kernels: int) -> Array:
        """[2, kernels]: floating-point operations and bytes of every kernel in a call with these inputs."""
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        arrays = binding.complete(spec, inputs, state)
        sizes = self._prepare(entry, spec, arrays, state).sizes
        found = np.zeros((2, kernels))
        position = state.position if state else 0
        self.binary.entry("costs", entry)(sizes, position, _doubles(found[0]), _doubles(found[1]))
        return found

    def read_weights(self) -> dict[str, Array]:
        """Bring the weights into memory, unless an earlier call did: the process that compiles holds them already."""
        with self._reading:
            if self._file is not None:
                self._file.read()
                self._weights, self._file = with_derived(self.manifest, self._file.arrays), None
        return self._weights

    def close(self) -> None:
        """Stop the threads; a later run is an error."""
        with self._lock:
            self._closed = True
            if self._free is not None:
                self._free()

    def _start(self) -> None:
        """A fresh lock, and no team until the first run: also what a forked child needs, whose threads are gone."""
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._team: int | None = None
        self._free: weakref.finalize[Any, Engine] | None = None

    def after_fork(self) -> None:
        if self._free is not None:
            self._free.detach()
        self._start()

    def _make_team(self) -> int:
        team = self.binary.team_new(self.threads)
        if not team:
            raise CompileError(f"cannot start {self.threads} threads", hint=f"set {knobs.THREADS.name} to fewer")
        self._free = weakref.finalize(self, self.binary.team_free, team)
        return int(team)

    def _prepare(self, entry: str, spec: EntrySpec, arrays: Sequence[Array], state: State | None) -> Call:
        key = (entry, tuple(a.shape for a in arrays), state.shapes if state and spec.states else ())
        if key not in self._calls:
            values = binding.bind(spec, arrays, state if spec.states else None, self.manifest.state)
            if len(self._calls) >= KEPT_CALLS:
                self._calls.pop(next(iter(self._calls)))
            self._calls[key] = self._call(entry, spec, list(values.values()))
        return self._calls[key]

    def _call(self, entry: str, spec: EntrySpec, values: Sequence[int]) -> Call:
        sizes = (ctypes.c_int64 * max(len(values), 1))(*values)
        ranks = [len(t.shape) for t in spec.inputs], [len(t.shape) for t in spec.outputs]
        states = sum(len(self.manifest.state[name].shape) for name in spec.states)
        dims = (ctypes.c_int64 * max(sum(ranks[0]) + sum(ranks[1]) + states, 1))()
        self.binary.entry("shapes", entry)(sizes, dims)
        shapes, at = [], sum(ranks[0])
        for rank in ranks[1]:
            shapes.append(tuple(dims[at : at + rank]))
            at += rank
        count = len(spec.inputs) + len(spec.weights) + len(spec.states) + len(spec.outputs) + 1
        buffers = (ctypes.c_void_p * count)()
        weights = self.read_weights()
        for index, name in enumerate(spec.weights, len(spec.inputs)):
            buffers[index] = weights[name].ctypes.data
        return Call(sizes, buffers, shapes, int(self.binary.entry("arena", entry)(sizes)))

    def _execute(
        self,
        entry: str,
        call: Call,
        arrays: Sequence[Array],
        state: State | None,
        outputs: Sequence[Array],
        times: Array | None,
    ) -> None:
        spec = self.manifest.entries[entry]
        if call.arena > self._arena.nbytes:
            self._arena = aligned_empty((call.arena,), "uint8")
        if self._team is None:
            self._team = self._make_team()
        if state is not None and spec.states:
            slots = [state.arrays[name] for name in spec.states]
            if len(call.slots) != len(slots) or any(r() is not a for r, a in zip(call.slots, slots, strict=True)):
                self._check_slots(spec, state)
                _point(call.buffers, len(arrays) + len(spec.weights), slots)
                call.slots = tuple(weakref.ref(a) for a in slots)
        _point(call.buffers, 0, arrays)
        _point(call.buffers, len(arrays) + len(spec.weights) + len(spec.states), [*outputs, self._arena])
        if times is None:
            code = self.binary.entry("run", entry)(self._team, call.sizes, call.buffers)
        else:
            code = self.binary.entry("profile", entry)(self._team, call.sizes, call.buffers, _doubles(times))
        if code:
            raise _error(int(code), int(self.binary.error_value(self._team)), spec, arrays)

    def _check_slots(self, spec: EntrySpec, state: State) -> None:
        """The compiled code writes these arrays in place: they must be what the slots say."""
        shapes = dict(zip(state.arrays, state.shapes, strict=True))
        for name in spec.states:
            array, dtype = state.arrays[name], self.manifest.state[name].dtype
            fits = array.dtype == binding.DTYPES.get(dtype, dtype) and array.shape == shapes[name]
            if not (fits and array.flags.c_contiguous and array.flags.writeable):
                raise InputError(
                    f"state {name!r} is a {array.dtype} array of shape {list(array.shape)}, "
                    f"expected a contiguous, writable {dtype} array of shape {list(shapes[name])}",
                    hint="make the state with `new_state` and change its arrays in place",
                )


def _doubles(array: Array) -> Any:
    return array.ctypes.data_as(Doubles)


def _point(buffers: Any, first: int, arrays: Sequence[Array]) -> None:
    for index, array in enumerate(arrays, first):
        buffers[index] = array.ctypes.data


def _wanted_threads(manifest: Manifest) -> int:
    """The knob, else what the artefact was compiled for, else every core."""
    return knobs.threads() if knobs.THREADS.get() != "0" else manifest.threads or knobs.threads()


def _error(code: int, value: int, spec: EntrySpec, arrays: Sequence[Array]) -> CompileError:
    if code == OUT_OF_RANGE:
        given = [(s, a) for s, a in zip(spec.inputs, arrays, strict=True) if s.name != SHARED]
        return _out_of_range(value, [s for s, a in given if _holds(a, value)], spec)
    if code == ZERO_DIVISOR:
        return InputError("an integer was divided by zero", hint="look for zeros among the integer inputs")
    if code == NO_TREE:
        return InputError(
            f"the depths of the tokens are no tree: found {value}",
            hint="give at most 16 tokens in preorder: 0 first, then at most one more than the depth before",
        )
    if code == WRONG_BLOCKS:
        expected = "ascending numbers of blocks of 64 keys, each once, then -1"
        return InputError(f"a list of blocks of keys holds {value} out of place or range, expected {expected}")
    if code == NO_MEMORY:
        return CompileError("out of memory for the scratch space of the threads", hint="use a smaller batch or length")
    return CompileError(f"the compiled code failed with code {code} and value {value}")


def _holds(array: Array, value: int) -> bool:
    return array.dtype.kind in "iu" and bool((array == value).any())


def _out_of_range(value: int, holders: Sequence[TensorSpec], spec: EntrySpec) -> InputError:
    if any(binding.is_position(holder, spec) for holder in holders):
        return InputError(
            f"no room in the state for this call at position {value}", hint="make a longer maximum length"
        )
    place = f" in input {holders[0].name!r}" if holders else ""
    return InputError(f"index {value}{place} is out of range", hint="token ids must be smaller than the vocabulary")


ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(ENGINES):
        engine.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def load(folder: Path, manifest: Manifest, threads: int | None = None) -> Engine:
    return Engine(folder, manifest, threads)

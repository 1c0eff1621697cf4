"""Load and run an artefact for a GPU: weights are copied there once, and caches and outputs stay there until read."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.ahead import Ahead, Step
from sylvester.backends.cuda.calls import ARENA, ERROR, Call, Launch, dtype_of, prepared, require_addressable
from sylvester.backends.cuda.choice import MOST, ROOM, Chooser, Scores
from sylvester.backends.cuda.collectives import require_ranks, sum_over_ranks
from sylvester.backends.cuda.device import Device
from sylvester.backends.cuda.driver import first_device
from sylvester.backends.cuda.graphs import Graphs
from sylvester.backends.cuda.memory import DeviceArray, Heap, Memory, padded, stepped
from sylvester.backends.cuda.prediction import require_memory
from sylvester.backends.derived import open_weights, with_derived
from sylvester.codegen.gpu_architectures import SHARED, number_of, runs
from sylvester.compiler import binding
from sylvester.compiler.device_arrays import Foreign
from sylvester.compiler.errors import ArtefactError, CompileError, InputError, Unsupported
from sylvester.compiler.manifest import WEIGHTS, EntrySpec, Manifest
from sylvester.compiler.runner import State, entry_of

Array = NDArray[np.generic]
FILE, VERSION = "launches.json", 2
KEPT_CALLS = 64
"""Sizes of calls whose launches are kept as numbers."""
FLAG = 16
"""Bytes of what kernels report: a code, and the value that was wrong."""
ZERO_DIVISOR = 3
ALIGNED = 16
"""Bytes that addresses of inputs are multiples of."""
GUARDED = "kernels are launched one by one, as the CPU reads which parts of the model are skipped, or sums over ranks"


class GpuRunner:
    """One model on one device; calls of several threads run one after another."""

    def __init__(self, folder: Path, manifest: Manifest, device: Device) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ArtefactError(f"{FILE} has version {data['version']}, expected {VERSION}", hint="compile again")
        self.arch = built_for(device.arch, manifest.isas)
        self.kernels, self.entries = data["kernels"], data["entries"]
        self.heap = Heap(device, self._settle)
        self.graphs, self.choices = Graphs(device), Graphs(device)
        """Of calls, and of what chooses tokens."""
        self._ranks = data.get("ranks")
        self._hosted = {number for number, kernel in enumerate(self.kernels) if not kernel["files"]}
        """What is no kernel: sums over ranks."""
        self.notes = [f"{name}: {GUARDED}" for name, entry in self.entries.items() if self._guarded(entry)]
        self._lock = self.heap.lock
        self._functions: dict[int, Any] = {}
        self._calls: dict[Hashable, Call] = {}
        self._room: dict[str, Memory] = {}
        """What is kept between calls, by use."""
        file = open_weights(folder, manifest)
        arrays = with_derived(manifest, file.arrays) if file else {}
        require_memory(arrays, self.entries, manifest, device.free_bytes())
        self._places = self._upload(arrays)
        """Addresses of weights and of the flag."""
        self._places[ERROR] = report = self._place(ERROR, FLAG + 8 * MOST)
        self.device.clear(report, FLAG)
        self._roles: dict[str, int] = data["choice"]
        self._ahead = Ahead(self._run, lambda: self.device.clear(report, FLAG))
        self._chooser = Chooser(
            self.heap, self._start, self.choices.run, report, FLAG, self._raise, self._ahead,
            lambda: self._place("choice", ROOM), self.notes,
        )  # fmt: skip

    def _upload(self, arrays: Mapping[str, Array]) -> dict[str, int]:
        self._room[WEIGHTS] = self.heap.take(sum(padded(a.nbytes) for a in arrays.values()))
        places, at = {}, self._room[WEIGHTS].address
        for name, array in arrays.items():
            require_addressable(name, array.size)
            places[f"weight {name}"] = at
            self.device.write(at, np.ascontiguousarray(array))
            at += padded(array.nbytes)
        return places

    def new_state(self, entry: str, inputs: Mapping[str, Array]) -> State:
        """Zeroed slots on the device for the batch of `inputs`, in one piece of memory."""
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        values = binding.bind(spec, binding.complete(spec, inputs, State({})), None, self.manifest.state)
        shapes = binding.state_shapes(spec, self.manifest.state, values)
        dtypes = {name: dtype_of(self.manifest.state[name].dtype) for name in shapes}
        sizes = {name: padded(int(np.prod(shape)) * dtypes[name].itemsize) for name, shape in shapes.items()}
        with self._lock:
            memory = self.heap.take(sum(sizes.values()))
            self.device.clear(memory.address, memory.nbytes)
        arrays, at = {}, memory.address
        for name, shape in shapes.items():
            arrays[name] = DeviceArray(self.heap, memory, at, shape, dtypes[name])
            at += sizes[name]
        return State(arrays)  # type: ignore[arg-type]

    def run(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """One call of an entry; `InputError` when the inputs do not fit, with what was found and expected."""
        with self._lock:
            outputs = self.there(entry, inputs, state)
            self._settle()
            return {name: array.numpy() for name, array in outputs.items()}

    def there(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, DeviceArray]:
        """As `run`, but the outputs stay on the device, and what kernels report is an error of what is read next."""
        with self._lock:
            begun = self._ahead.take(entry, inputs, state)
            return self._run(entry, inputs, state) if begun is None else begun

    def expect(self, entry: str, name: str, state: State, batch: int) -> None:
        """The next ids [batch] that are chosen will be read as input `name` of an entry, where the state is now."""
        self._ahead.expect(Step(entry, name, state, batch))

    def _run(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, DeviceArray]:
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        arrays = binding.complete(spec, inputs, state)
        with self._lock:
            if not self._room:
                raise CompileError("the artefact is closed", hint="load it again with sv.load")
            require_ranks(self._ranks)
            call = self._call(entry, spec, arrays, state if spec.states else None)
            outputs = {name: self._output(*what) for name, what in call.outputs.items()}
            places = self._given(spec, arrays) | self._slots(spec, state)
            places |= {f"output {name}": array.address for name, array in outputs.items()}
            places[ARENA] = self._place(ARENA, call.arena)
            self._execute(call, places)
        return outputs

    def _output(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        array = self.heap.array(shape, dtype)
        chosen_from = self._roles and dtype == np.float32 and len(shape) > 1
        return Scores.of(array, self._chooser) if chosen_from else array

    def _execute(self, call: Call, places: dict[str, int]) -> None:
        whole = self._places | places

        def launch() -> None:
            for one in call.launches:
                self._launch(one, whole)

        if call.guarded or any(one.kernel in self._hosted for one in call.launches):
            launch()
        else:
            self.graphs.run((call.entry, call.values, tuple(places.values())), launch)

    def beside(self, entry: str, inputs: Mapping[str, Any], streams: Sequence[int]) -> dict[str, DeviceArray]:
        """Outputs that stay on the device, of inputs of which some are there as `Foreign` arrays, which are not copied.

        Work begins after what the streams were given, and they go on after it.
        """
        with self._lock:
            for stream in streams:
                self.device.follow(stream)
            self.heap.lend(streams)
            arrays: dict[str, Any] = {n: self._taken(n, v) if isinstance(v, Foreign) else v for n, v in inputs.items()}
            state = self.new_state(entry, arrays) if self.manifest.entries[entry].states else None
            outputs = self.there(entry, arrays, state)
            if self._reports(entry):
                self._settle()
            for stream in streams:
                self.device.lead(stream)
        return outputs

    def _taken(self, name: str, value: Foreign) -> DeviceArray:
        """Where it is; a copy if kernels could not read it there."""
        array = DeviceArray(self.heap, value.owner, value.address, value.shape, np.dtype(value.dtype), value.strides)
        if array.contiguous and array.address % ALIGNED == 0:
            return array
        why = f"input {name!r} was copied on the device: it is not row-major, or not at a multiple of {ALIGNED} bytes"
        if why not in self.notes:
            self.notes.append(why)
        return array.copy()

    def _reports(self, entry: str) -> bool:
        """Whether kernels check positions, so that the CPU has to ask what they found."""
        launches = self.entries[entry]["launches"]
        return any(isinstance(a, dict) and "error" in a for launch in launches for a in launch["arguments"])

    def _call(self, entry: str, spec: EntrySpec, arrays: list[Array], state: State | None) -> Call:
        key = (entry, tuple(a.shape for a in arrays), state.shapes if state else ())
        if key not in self._calls:
            values = binding.bind(spec, arrays, state, self.manifest.state)
            self._calls[key] = prepared(entry, self.entries[entry], spec, self.manifest.state, values)
            if len(self._calls) > KEPT_CALLS:
                del self._calls[next(iter(self._calls))]
        return self._calls[key]

    def _given(self, spec: EntrySpec, arrays: list[Any]) -> dict[str, int]:
        """Addresses of the inputs; those of the host are copied there together."""
        total = sum(padded(a.nbytes) for a in arrays if isinstance(a, np.ndarray))
        base, at, packed = self._place("inputs", total), 0, np.empty(total, np.uint8)
        places = {}
        for tensor, array in zip(spec.inputs, arrays, strict=True):
            if not isinstance(array, np.ndarray):
                places[f"input {tensor.name}"] = array.address
                continue
            packed[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            places[f"input {tensor.name}"] = base + at
            at += padded(array.nbytes)
        if total:
            self.device.write(base, packed)
        return places

    def _slots(self, spec: EntrySpec, state: State | None) -> dict[str, int]:
        """Addresses of the caches."""
        places = {}
        shapes = dict(zip(state.arrays, state.shapes, strict=True)) if state else {}
        for name in spec.states if state else ():
            array: Any = state.arrays[name]  # type: ignore[union-attr]
            if not (isinstance(array, DeviceArray) and array.contiguous and array.shape == shapes[name]):
                raise InputError(
                    f"state {name!r} is a {type(array).__name__} of shape {list(array.shape)}, expected a row-major "
                    f"array of the device of shape {list(shapes[name])}", hint="make the state with `new_state`",
                )  # fmt: skip
            places[f"state {name}"] = array.address
        return places

    def _place(self, use: str, nbytes: int) -> int:
        """Memory that is kept for a use, and grows in steps: graphs are of no use once it has moved."""
        if use not in self._room or self._room[use].nbytes < nbytes:
            self._room.pop(use, None)
            self._room[use] = self.heap.take(stepped(nbytes))
        return self._room[use].address

    def _guarded(self, entry: Mapping[str, Any]) -> bool:
        return any("guard" in launch or launch["kernel"] in self._hosted for launch in entry["launches"])

    def _launch(self, launch: Launch, places: Mapping[str, int]) -> None:
        if launch.guard and self._skips(places[launch.guard[0]] + launch.guard[1]):
            return
        values = [places[place] + value if place else value for place, value in launch.arguments]
        self._begin(launch.kernel, launch.grid, values)

    def _start(self, role: str, grid: tuple[int, ...], values: list[Any]) -> None:
        self._begin(self._roles[role], grid, values)

    def _begin(self, number: int, grid: tuple[int, ...], values: list[Any]) -> None:
        if number in self._hosted:
            address, count = values
            sum_over_ranks(self.device, address, count)
            return
        kernel, function = self.kernels[number], self._function(number)
        shared, types = kernel["shared"][self.arch], tuple(kernel["types"])
        self.device.launch(function, grid, kernel["warps"], shared, types, values)

    def _skips(self, address: int) -> bool:
        flag = np.zeros(1, np.float32)
        self.device.read(address, flag)
        return bool(flag[0] > 0)

    def _function(self, number: int) -> Any:
        if number not in self._functions:
            kernel = self.kernels[number]
            image = self.folder / kernel["files"][self.arch]
            made = self.device.function(image, kernel["function"], kernel["shared"][self.arch])
            self._functions[number] = made
        return self._functions[number]

    def _settle(self) -> None:
        """Wait for the work so far; `InputError` for what kernels reported since the last time."""
        found = np.zeros(2, np.int64)
        with self._lock:
            if not self._room:
                return
            self.device.read(self._places[ERROR], found)
            self._raise(found)

    def _raise(self, found: Array) -> None:
        """What kernels reported, which is forgotten with that."""
        if found[0]:
            self.device.clear(self._places[ERROR], FLAG)
        if found[0] == ZERO_DIVISOR:
            raise InputError("an integer was divided by zero", hint="look for zeros among the integer inputs")
        if found[0]:
            raise InputError(
                f"index {found[1]} is out of range", hint="token ids must be smaller than the vocabulary, and a call "
                "must fit in what the state has left"
            )  # fmt: skip

    def close(self) -> None:
        """Give memory back; what outputs and states still hold goes with them."""
        with self._lock:
            self.graphs.clear()
            self.choices.clear()
            self._ahead.take("", {}, None)
            self._room.clear()
            self.heap.close()
            self.device.close()


def built_for(device: str, archs: tuple[str, ...]) -> str:
    """The newest architecture of an artefact that the device runs code of."""
    fitting = [arch for arch in archs if runs(device, arch)]
    if not fitting:
        raise Unsupported(
            f"this artefact has code for {list(archs)}, the device is {device}",
            hint=f"compile again with sv.Target('cuda', arch={device!r})"
            if device in SHARED
            else f"code can be built for {list(SHARED)}",
        )
    return max(fitting, key=number_of)


@dataclass(frozen=True)
class NoDevice:
    """Stands for the code of an artefact where no GPU is: it can be saved, not run."""

    manifest: Manifest
    cause: Unsupported

    def new_state(self, entry: str, inputs: Mapping[str, Array]) -> State:
        raise self.cause

    def run(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        raise self.cause

    def close(self) -> None:
        return None


def load(folder: Path, manifest: Manifest, threads: int | None = None) -> GpuRunner | NoDevice:
    try:
        device = first_device()
    except Unsupported as cause:
        return NoDevice(manifest, cause)
    return GpuRunner(folder, manifest, device)

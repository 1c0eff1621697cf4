"""Load and run an artefact for a GPU: weights are copied there once, calls launch kernels over one arena."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.device import Device
from sylvester.backends.cuda.driver import first_device
from sylvester.backends.tensor_file import TensorFile
from sylvester.codegen.scalar import BYTES
from sylvester.compiler import binding
from sylvester.compiler.errors import ArtefactError, CompileError, InputError, Unsupported
from sylvester.compiler.manifest import WEIGHTS, EntrySpec, Manifest
from sylvester.compiler.runner import State, entry_of
from sylvester.compiler.sizes import evaluate

Array = NDArray[np.generic]
FILE, VERSION = "launches.json", 1
ALIGNMENT = 256
LIMIT = 2**31 - 1
"""The most elements that kernels address in a tensor."""
FLAG = 16
"""Bytes of what kernels report: a code, and the value that was wrong."""
ZERO_DIVISOR = 3


class GpuRunner:
    """One model on one device. The arrays of a state are copied there and back at every call."""

    def __init__(self, folder: Path, manifest: Manifest, device: Device) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ArtefactError(f"{FILE} has version {data['version']}, expected {VERSION}", hint="compile again")
        self.arch = built_for(device.arch, manifest.isas)
        self.kernels, self.entries = data["kernels"], data["entries"]
        self._functions: dict[int, Any] = {}
        self._room: dict[str, tuple[int, int]] = {}
        """Address and bytes of what is kept between calls, by use."""
        self._weights = self._upload()

    def _upload(self) -> dict[str, int]:
        arrays = TensorFile(self.folder / WEIGHTS).arrays if self._stored() else {}
        needed, free = sum(_padded(a.nbytes) for a in arrays.values()), self.device.free_bytes()
        if needed > free:
            raise CompileError(
                f"the weights take {needed / 1e9:.2f} GB, the device has {free / 1e9:.2f} GB free",
                hint="compile with fewer bits (passes='w4a8'), or free memory of the device",
            )
        places = {}
        for name, array in arrays.items():
            _require_addressable(name, array.size)
            places[name] = self.device.allocate(_padded(array.nbytes))
            self.device.write(places[name], np.ascontiguousarray(array))
        return places

    def _stored(self) -> bool:
        return any(spec.weights for spec in self.manifest.entries.values())

    def new_state(self, entry: str, inputs: Mapping[str, Array]) -> State:
        """Zeroed slots for the batch of `inputs`."""
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        values = binding.bind(spec, binding.complete(spec, inputs, State({})), None, self.manifest.state)
        shapes = binding.state_shapes(spec, self.manifest.state, values)
        return State({name: np.zeros(shape, self._dtype(name)) for name, shape in shapes.items()})

    def _dtype(self, slot: str) -> Any:
        found = self.manifest.state[slot].dtype
        return binding.DTYPES.get(found, found)

    def run(self, entry: str, inputs: Mapping[str, Array], state: State | None = None) -> dict[str, Array]:
        """One call of an entry; `InputError` when the inputs do not fit, with what was found and expected."""
        spec = self.manifest.entries[entry_of(self.manifest, entry)]
        arrays = binding.complete(spec, inputs, state)
        values = binding.bind(spec, arrays, state if spec.states else None, self.manifest.state)
        outputs = {o.name: _empty(o.shape, o.dtype, values) for o in spec.outputs}
        places = self._places(entry, spec, arrays, state, outputs, values)
        for launch in self.entries[entry]["launches"]:
            self._launch(entry, launch, places, values)
        self._require_no_error(places["error"])
        for name, array in outputs.items():
            self.device.read(places[f"output {name}"], array)
        for name in spec.states if state else ():
            self.device.read(places[f"state {name}"], state.arrays[name])  # type: ignore[union-attr]
        return outputs

    def _places(
        self,
        entry: str,
        spec: EntrySpec,
        arrays: list[Array],
        state: State | None,
        outputs: Mapping[str, Array],
        values: Mapping[str, int],
    ) -> dict[str, int]:
        """Addresses of inputs, state, outputs and slots of the arena, by kind and name; the inputs are there."""
        found = {}
        given = [(f"input {s.name}", a) for s, a in zip(spec.inputs, arrays, strict=True)]
        given += [(f"state {name}", state.arrays[name]) for name in spec.states] if state else []
        for name, array in (*given, *outputs.items()):
            _require_addressable(name, array.size)
        for name, array in given:
            found[name] = self._place(name, array.nbytes)
            self.device.write(found[name], np.ascontiguousarray(array))
        found |= {f"output {name}": self._place(f"output {name}", a.nbytes) for name, a in outputs.items()}
        for number, sizes in enumerate(self.entries[entry]["slots"]):
            nbytes = max(evaluate(n, values) for n in sizes)
            _require_addressable("a tensor of this call", nbytes)
            found[f"slot {number}"] = self._place(f"slot {number}", nbytes)
        found["error"] = self._place("error", FLAG)
        self.device.write(found["error"], np.zeros(2, np.int64))
        return found

    def _place(self, use: str, nbytes: int) -> int:
        """Memory that is kept for a use, and grows."""
        address, held = self._room.get(use, (0, 0))
        if nbytes > held or not address:
            if address:
                self.device.release(address)
            self._room[use] = (self.device.allocate(_padded(nbytes)), _padded(nbytes))
        return self._room[use][0]

    def _launch(
        self, entry: str, launch: Mapping[str, Any], places: Mapping[str, int], values: Mapping[str, int]
    ) -> None:
        grid = tuple(evaluate(n, values) for n in launch["grid"])
        if not all(grid) or not _fits(launch.get("when"), values) or self._skipped(entry, launch, places):
            return
        kernel = self.kernels[launch["kernel"]]
        arguments = [self._argument(entry, a, places, values) for a in launch["arguments"]]
        function = self._function(launch["kernel"])
        self.device.launch(
            function, grid, kernel["warps"], kernel["shared"][self.arch], tuple(kernel["types"]), arguments
        )

    def _skipped(self, entry: str, launch: Mapping[str, Any], places: Mapping[str, int]) -> bool:
        if "guard" not in launch:
            return False
        flag = np.zeros(1, np.float32)
        self.device.read(self._address(entry, launch["guard"], places), flag)
        return bool(flag[0] > 0)

    def _argument(self, entry: str, argument: Any, places: Mapping[str, int], values: Mapping[str, int]) -> Any:
        if not isinstance(argument, dict):
            return argument if isinstance(argument, float) else evaluate(argument, values)
        if "error" in argument:
            return places["error"]
        size = BYTES[self.entries[entry]["buffers"][argument["buffer"]]["dtype"]]
        return self._address(entry, argument["buffer"], places) + size * evaluate(argument["offset"], values)

    def _address(self, entry: str, name: str, places: Mapping[str, int]) -> int:
        buffer = self.entries[entry]["buffers"][name]
        if buffer["kind"] == "weight":
            return self._weights[buffer["key"]]
        return places[f"slot {buffer['slot']}" if buffer["kind"] == "arena" else f"{buffer['kind']} {buffer['key']}"]

    def _function(self, number: int) -> Any:
        if number not in self._functions:
            kernel = self.kernels[number]
            image = self.folder / kernel["files"][self.arch]
            made = self.device.function(image, kernel["function"], kernel["shared"][self.arch])
            self._functions[number] = made
        return self._functions[number]

    def _require_no_error(self, flag: int) -> None:
        found = np.zeros(2, np.int64)
        self.device.read(flag, found)
        if found[0] == ZERO_DIVISOR:
            raise InputError("an integer was divided by zero", hint="look for zeros among the integer inputs")
        if found[0]:
            raise InputError(
                f"index {found[1]} is out of range", hint="token ids must be smaller than the vocabulary, and a call "
                "must fit in what the state has left"
            )  # fmt: skip

    def close(self) -> None:
        for address in [*self._weights.values(), *(address for address, _ in self._room.values())]:
            self.device.release(address)
        self._weights, self._room = {}, {}


def built_for(device: str, archs: tuple[str, ...]) -> str:
    """The newest cubin that the device runs: of its major version, and not later than it."""
    number = int(device.removeprefix("sm_"))
    fitting = [a for a in archs if int(a[3:]) // 10 == number // 10 and int(a[3:]) <= number]
    if not fitting:
        raise Unsupported(
            f"this artefact has code for {list(archs)}, the device is {device}",
            hint=f"compile again with sv.Target('cuda', arch={device!r}) where Triton knows it",
        )
    return max(fitting)


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


def _require_addressable(name: str, elements: int) -> None:
    """Kernels count in 32 bits; of memory between kernels every byte counts as one."""
    if elements > LIMIT:
        raise InputError(
            f"{name} has {elements} elements, kernels on GPUs address at most {LIMIT}",
            hint="use a smaller batch or a shorter length",
        )


def _fits(when: Any, values: Mapping[str, int]) -> bool:
    return when is None or bool(when[1] <= evaluate(when[0], values) <= when[2])


def _empty(shape: Any, dtype: str, values: Mapping[str, int]) -> Array:
    return np.empty([evaluate(n, values) for n in shape], binding.DTYPES.get(dtype, dtype))


def _padded(nbytes: int) -> int:
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)

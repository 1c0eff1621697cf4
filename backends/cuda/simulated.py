"""A device that runs launches one after another with Triton's interpreter: for tests of what a GPU would compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sylvester.backends.cuda.modules import interpret
from sylvester.codegen.gpu_lowering import When
from sylvester.codegen.gpu_plan import Argument, ErrorFlag, GpuEntry, Launch
from sylvester.codegen.index import Atom, Index, Size, index
from sylvester.codegen.lazy import Pointer
from sylvester.codegen.memory import ALIGNMENT

DTYPES = {
    "f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "i32": torch.int32, "i8": torch.int8,
    "u8": torch.uint8, "b8": torch.uint8, "bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.float8_e4m3fn,
}  # fmt: skip


class Simulated:
    """One entry over tensors of the CPU: those given for inputs, weights and state, by key, and outputs."""

    def __init__(self, entry: GpuEntry, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        self.entry = entry
        self.values: dict[Atom, Index] = {Size(name): index(n) for name, n in sizes.items()}
        self.flag = torch.zeros(2, dtype=torch.int64)
        given = {**given, **entry.constants}
        self.memory = {name: _flat(given[b.key]) for name, b in entry.buffers.items() if b.key in given}
        for buffer in entry.outputs:
            shape = [self.number(n) for n in buffer.shape]
            self.memory[buffer.name] = torch.empty(shape, dtype=DTYPES[buffer.dtype]).reshape(-1)
        self._arena()

    def _arena(self) -> None:
        for slot in self.entry.slots:
            nbytes = max(self.number(n) for n in slot.sizes)
            room = torch.empty(-(-nbytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
            for name in slot.buffers:
                if name not in self.memory:
                    self.memory[name] = room.view(DTYPES[self.entry.buffers[name].dtype])

    def number(self, value: Index) -> int:
        found = value.substitute(self.values).constant
        assert found is not None
        return found

    def run(self) -> dict[str, Tensor]:
        """The outputs by name; the flag says what went wrong."""
        for launch in self.entry.launches:
            guarded = launch.guard and self.memory[launch.guard][0] > 0
            if not guarded and self._fits(launch.when):
                self._launch(launch)
        return {b.key: self._output(b) for b in self.entry.outputs}

    def _fits(self, when: When | None) -> bool:
        return when is None or when[1] <= self.number(when[0]) <= when[2]

    def _output(self, buffer: Any) -> Tensor:
        shape = [self.number(n) for n in buffer.shape]
        flat = self.memory[buffer.name][: torch.Size(shape).numel()].reshape(shape)
        return flat.bool() if buffer.dtype == "b8" else flat

    def _launch(self, launch: Launch) -> None:
        if not launch.kernel.text:
            return
        names = list(launch.kernel.types)
        given = {name: self._argument(a) for name, a in zip(names, launch.arguments, strict=True)}
        grid = tuple(self.number(n) for n in launch.grid)
        if all(grid):
            interpret(launch.kernel, grid, given)

    def _argument(self, argument: Argument) -> Any:
        if isinstance(argument, ErrorFlag):
            return self.flag
        if isinstance(argument, Pointer):
            return self.memory[argument.buffer][self.number(argument.offset) :]
        return self.number(argument) if isinstance(argument, Index) else argument


def _flat(tensor: Tensor) -> Tensor:
    flat = tensor if tensor.dim() == 1 else tensor.reshape(-1)
    return flat.view(torch.uint8) if flat.dtype == torch.bool else flat

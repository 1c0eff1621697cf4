"""Runs WebAssembly modules in wasmtime: the calls of tests/kernel_harness.py on copies in linear memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import wasmtime

from tests.emulator import _memory

PAGE, FIRST = 1 << 16, 1 << 20
SCRATCH = 8 << 20
"""Bytes of scratch space for the only thread."""


def engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    config.wasm_relaxed_simd = True
    config.wasm_relaxed_simd_deterministic = False
    return wasmtime.Engine(config)


class Library:
    """A module without threads; `call` is that of an emulated library."""

    def __init__(self, path: Path) -> None:
        made = engine()
        self.engine, self.store = made, wasmtime.Store(made)
        self.module = wasmtime.Module.from_file(made, str(path))
        self.memory = wasmtime.Memory(self.store, wasmtime.MemoryType(wasmtime.Limits(4096, 65535)))
        seconds = wasmtime.Func(self.store, wasmtime.FuncType([], [wasmtime.ValType.f64()]), lambda: 0.0)
        given = {"memory": self.memory, "seconds": seconds}
        imports = [given[str(wanted.name)] for wanted in self.module.imports]
        self.exports = wasmtime.Instance(self.store, self.module, imports).exports(self.store)
        self.exports["_initialize"](self.store)
        self.error_value = 0

    def call(self, name: str, threads: int, integers: Sequence[int], arrays: Sequence[np.ndarray | None]) -> int:
        """`name(team, integers, pointers)` with a team of one; the arrays change as they would in memory of our own."""
        top, pointers, spans = FIRST, [], []
        for array in arrays:
            span, size, start, skew = _memory(array)
            top = -(-top // 64) * 64 + skew
            pointers.append(0 if size < 0 else top + start)
            spans.append((top, span, array is not None and array.flags.writeable))
            self._write(top, span.tobytes())
            top += max(size, 0)
        top = -(-top // 64) * 64
        self._write(top, np.array([*integers, 0], np.int64).tobytes())
        self._write(top + 8192, np.array([*pointers, 0], np.uint32).tobytes())
        team = self.exports["sv_team_place"](self.store, top + 16384, 1, SCRATCH)
        code = int(self.exports[name](self.store, team, top, top + 8192))
        self.error_value = int(self.exports["sv_team_error_value"](self.store, team))
        for at, span, writeable in spans:
            if writeable:
                span[:] = np.frombuffer(self.memory.read(self.store, at, at + span.size), np.uint8)
        return code

    def _write(self, at: int, data: bytes) -> None:
        missing = at + len(data) + 2 * SCRATCH - self.memory.data_len(self.store)
        if missing > 0:
            self.memory.grow(self.store, -(-missing // PAGE))
        self.memory.write(self.store, data, at)

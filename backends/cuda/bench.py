"""Candidates of one launch on a device: their results beside those of the default, and nanoseconds of their runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.compile import build
from sylvester.backends.cuda.device import Device
from sylvester.backends.cuda.problems import Site
from sylvester.codegen.gpu_lowering import Candidate
from sylvester.codegen.gpu_plan import Argument, ErrorFlag
from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Pointer
from sylvester.codegen.scalar import BYTES
from sylvester.codegen.space import Candidate as Named
from sylvester.compiler.errors import CompileError

Array = NDArray[Any]
TOLERANCE = 2e-2
"""Of the largest value of a result: candidates add in other orders."""
CACHE = 256 << 20
"""Bytes that are written between two runs, more than the caches of a GPU hold: weights are read from memory."""
FLOATS = ("f32", "bf16")


class Bench:
    """Memory of the launch on the device, of random values; use it in a `with`."""

    def __init__(self, site: Site, device: Device, arch: str, folder: Path) -> None:
        self.site, self.device, self.arch, self.folder = site, device, arch, folder
        self.candidates = site.candidates()
        self._functions: dict[Named, tuple[Any, int, int]] = {}
        self._given = {b: _values(site, b) for b in dict.fromkeys(a.buffer for a in self._pointers())}
        self._places: dict[str, int] = {}
        self._held = ExitStack()

    def __enter__(self) -> Bench:
        """`OutOfMemory` where the device has no room; what was taken is given back."""
        with ExitStack() as held:
            self._places = {b: self._taken(array.nbytes, held) for b, array in self._given.items()}
            self._flag, self._flush = self._taken(16, held), self._taken(CACHE, held)
            self._held = held.pop_all()
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _taken(self, nbytes: int, held: ExitStack) -> int:
        address = self.device.allocate(nbytes)
        held.callback(self.device.release, address)
        return address

    def _pointers(self) -> list[Pointer]:
        return [a for a in self.site.launch.arguments if isinstance(a, Pointer)]

    def _fill(self) -> None:
        for name, array in self._given.items():
            self.device.write(self._places[name], array)
        self.device.clear(self._flag, 16)

    def measure(self, candidate: Named, runs: int) -> list[int]:
        """Each run finds nothing of its operands in the caches."""
        found = []
        for _ in range(runs):
            self.device.clear(self._flush, CACHE)
            first = self.device.mark()
            self._run(candidate)
            found.append(round(1e6 * self.device.elapsed(first, self.device.mark())))
        return found

    def wrong(self) -> list[Named]:
        """Candidates that cannot be started on this device, or whose results are not those of the default."""
        first, *others = self.candidates
        exact = self._results(first)
        return [c for c in others if not self._agrees(c, exact)]

    def _agrees(self, candidate: Named, exact: Mapping[str, Array]) -> bool:
        try:
            found = self._results(candidate)
        except CompileError:
            return False
        return all(_close(found[name], exact[name]) for name in exact)

    def _results(self, candidate: Named) -> dict[str, Array]:
        self._fill()
        self._run(candidate)
        found = {name: np.empty_like(array) for name, array in self._given.items() if self._written(name)}
        for name, array in found.items():
            self.device.read(self._places[name], array)
        return found

    def _written(self, name: str) -> bool:
        return self.site.entry.buffers[name].kind in ("arena", "output", "state")

    def _run(self, candidate: Named) -> None:
        chosen = self.candidates[candidate]
        function, warps, shared = self._function(candidate, chosen)
        values = [self._argument(a) for a in self.site.launch.arguments]
        types = tuple(chosen.kernel.types.values())
        self.device.launch(function, self.site.grid(chosen), warps, shared, types, values)

    def _argument(self, argument: Argument) -> Any:
        if isinstance(argument, Pointer):
            size = BYTES[self.site.entry.buffers[argument.buffer].dtype]
            return self._places[argument.buffer] + size * self.site.number(argument.offset)
        if isinstance(argument, ErrorFlag):
            return self._flag
        return self.site.number(argument) if isinstance(argument, Index) else argument

    def _function(self, name: Named, candidate: Candidate) -> tuple[Any, int, int]:
        if name not in self._functions:
            made = build(candidate.kernel, self.arch)
            image = self.folder / f"{candidate.kernel.key[:16]}.cubin"
            image.write_bytes(made.image)
            self._functions[name] = self.device.function(image, made.function, made.shared), made.warps, made.shared
        return self._functions[name]


def _values(site: Site, name: str) -> Array:
    """Random values of a buffer; positions in caches leave room for what is read."""
    buffer = site.entry.buffers[name]
    count = site.number(buffer.elements)
    if buffer.kind == "weight" and name in site.entry.constants:
        return site.entry.constants[name].numpy()
    random = np.random.default_rng(count)
    if buffer.dtype == "bf16":
        return (random.standard_normal(count, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if buffer.dtype in ("f32", "f64"):
        return random.standard_normal(count, np.float32).astype(np.float64 if buffer.dtype == "f64" else np.float32)
    if buffer.dtype == "f16":
        return random.standard_normal(count, np.float32).astype(np.float16)
    if buffer.dtype == "fp8":
        finite: Array = random.integers(0, NAN8, count, np.uint8)
        return np.asarray(finite | random.integers(0, 2, count, np.uint8) << 7)
    if buffer.dtype in ("i64", "i32", "b8"):
        held = site.numbers.get("keys", 0) - site.numbers.get("rows", 0)
        return np.full(count, max(0, held // 2) if buffer.dtype == "i64" else 0, NUMPY[buffer.dtype])
    return random.integers(0, 256, count, np.uint8)


NAN8 = 0x7F
"""The first bits of float8 that are no number."""
NUMPY = {"i64": np.int64, "i32": np.int32, "b8": np.uint8}


def _close(found: Array, exact: Array) -> bool:
    """Of raw bytes of low-bit values a step is allowed."""
    if found.dtype == np.uint16:
        found, exact = ((a.astype(np.uint32) << 16).view(np.float32) for a in (found, exact))
    if found.dtype == np.uint8:
        steps = (found.view(np.int8).astype(np.int16) - exact.view(np.int8)).astype(np.int16)
        return bool((np.abs(steps) <= 1).all())
    most = float(np.abs(exact).max(initial=0))
    return bool(np.isfinite(found).all()) and float(np.abs(found - exact).max(initial=0)) <= TOLERANCE * most

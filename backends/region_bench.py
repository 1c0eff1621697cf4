"""Runs our function of a region and those of another compiler on the same data, side by side in one library."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.memory import aligned_zeros
from sylvester.backends.toolchain import Compiler, build_shared
from sylvester.codegen.isa import Isa
from sylvester.codegen.prelude import prelude, render
from sylvester.codegen.region import Region
from sylvester.codegen.space import Candidate
from sylvester.compiler.errors import CompileError

TOLERANCE = 1e-4
"""Largest difference from ours that the order of sums explains, as a part of the largest value."""
SHORT_NS, LONGEST_BATCH = 200_000, 64
GUARD = 1024
"""Elements before and behind every operand."""
ARRAYS = {"f32": "f4", "f64": "f8", "i64": "i8", "i32": "i4", "i8": "i1", "u8": "u1", "b8": "u1"}
LESS = (0, 1, 3)
"""What is taken from every open size of the example for the sizes that results are compared at."""

Texts = Mapping[Candidate, str]


def build(texts: Sequence[tuple[Region, Texts]], isa: Isa, folder: Path, compiler: Compiler) -> ctypes.CDLL:
    """One library of all functions: function c of region r has the number at place c after those of regions before."""
    functions, calls, number = [], [], 0
    for region, of in texts:
        for text in of.values():
            functions.append(text.replace("NAME", f"sv_region_{number}", 1))
            calls.append(f"case {number}: {_call(region, number)} break;")
            number += 1
    switch = "(void)cold;\n        switch (i[0]) {\n" + "\n".join(calls) + "\n        }"
    harness = render("tune.c.in", CALL=switch, SCRATCH="0", BYTES="0")
    source = "\n".join([prelude(isa), *functions, "#include <time.h>", harness])
    library = ctypes.CDLL(str(build_shared(source, folder / "regions.so", isa, compiler=compiler)))
    library.sv_team_new.restype = ctypes.c_void_p
    library.sv_team_free.argtypes = [ctypes.c_void_p]
    library.sv_tune_run.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, ctypes.c_void_p]
    return library


def _call(region: Region, number: int) -> str:
    pointers = [f"p[{n}]" for n in range(len(region.function.buffers))]
    sizes = [f"i[{n + 1}]" for n in range(len(region.function.sizes))]
    return f"sv_region_{number}({', '.join(['t', *pointers, *sizes])});"


class RegionBench:
    """Operands of one region and a team. `numbers`: candidate -> its function in the library. Close it."""

    def __init__(self, library: ctypes.CDLL, region: Region, numbers: Mapping[Candidate, int], threads: int) -> None:
        self._library, self._region, self._numbers, self._threads = library, region, numbers, threads
        self._batch = 1
        self._resize(0)
        self._team = library.sv_team_new(threads)
        if not self._team:
            raise CompileError(f"cannot start {threads} threads for tuning")

    def close(self) -> None:
        self._library.sv_team_free(self._team)

    def _resize(self, less: int) -> None:
        """Operands for the sizes of the example, or for ones that are smaller by `less`."""
        self._sizes = self._region.sizes(less)
        rng = np.random.default_rng(0)
        self._whole = {name: self._memory(name) for name in self._region.function.buffers}
        self.operands = {name: array[GUARD:-GUARD] for name, array in self._whole.items()}
        self.inputs = {name: self._filled(name, rng) for name in self.operands}

    def _memory(self, name: str) -> NDArray[Any]:
        """Zeros: a buffer between guards that nothing may write."""
        count = max(1, self._region.elements(name, self._sizes))
        return aligned_zeros((GUARD + count + GUARD,), ARRAYS[self._region.buffers[name].dtype])

    def _filled(self, name: str, rng: np.random.Generator) -> NDArray[Any]:
        dtype, shape = self._region.buffers[name].dtype, self.operands[name].shape
        if dtype in ("f32", "f64"):
            return rng.normal(size=shape).astype(ARRAYS[dtype])
        return rng.integers(0, 2 if dtype == "b8" else 100, shape).astype(ARRAYS[dtype])

    def _fill(self) -> None:
        for name, array in self.inputs.items():
            self.operands[name][:] = array

    def wrong(self, candidate: Candidate, ours: Candidate) -> str:
        """How a candidate differs from ours at any of the sizes, empty when it does not."""
        for less in LESS if self._region.function.sizes else LESS[:1]:
            self._resize(less)
            expected = self.result(ours)
            found = self.result(candidate)
            if any(array[:GUARD].any() or array[-GUARD:].any() for array in self._whole.values()):
                return f"writes outside its buffers at sizes {self._sizes}"
            for name in sorted(self._region.nest.writes & set(expected)):
                if text := difference(expected[name], found[name]):
                    return f"{text} at sizes {self._sizes}" if self._sizes else text
        return ""

    def ready(self, ours: Candidate) -> None:
        """Operands for the example, and how many runs are measured as one."""
        self._resize(0)
        self._fill()
        self._batch = min(LONGEST_BATCH, max(1, SHORT_NS // max(1, min(self.measure(ours, 3)))))

    def measure(self, candidate: Candidate, runs: int) -> list[int]:
        """Nanoseconds of each run; of a short region each is the mean of several."""
        ends = self._run(candidate, runs * self._batch + 1)
        return [int(ns) for ns in np.diff(ends).reshape(runs, self._batch).mean(1)]

    def result(self, candidate: Candidate) -> dict[str, NDArray[Any]]:
        """Copies of all operands after one run on the inputs."""
        self._fill()
        self._run(candidate, 1)
        return {name: array.copy() for name, array in self.operands.items()}

    def _run(self, candidate: Candidate, runs: int) -> NDArray[np.int64]:
        ends = np.zeros((self._threads, runs), np.int64)
        sizes = (ctypes.c_int64 * (1 + len(self._sizes)))(self._numbers[candidate], *self._sizes)
        pointers = (ctypes.c_void_p * len(self.operands))(*[o.ctypes.data for o in self.operands.values()])
        code = self._library.sv_tune_run(self._team, sizes, pointers, None, 1, 0, 0, runs, ends.ctypes.data)
        if code:
            raise CompileError(f"{candidate} of a region failed with code {code} while being timed")
        last: NDArray[np.int64] = ends.max(0)
        return last


def difference(expected: NDArray[Any], found: NDArray[Any]) -> str:
    """What is wrong with a result, empty when it is right up to rounding; integers must be equal."""
    if expected.dtype.kind != "f":
        count = int((expected != found).sum())
        return f"{count} of {expected.size} integers differ" if count else ""
    if not np.array_equal(np.isfinite(expected), np.isfinite(found)):
        return "infinities or NaN differ"
    finite = np.isfinite(expected)
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    error = float(np.abs(expected[finite] - found[finite]).max(initial=0.0))
    return "" if error <= TOLERANCE * largest else f"off by {error:.3g}, the largest value is {largest:.3g}"

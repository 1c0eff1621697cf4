"""Builds the candidates of a family and runs them on a problem with cold weights and the thread team of an artefact."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.fingerprint import last_level_cache
from sylvester.backends.memory import aligned_empty
from sylvester.backends.toolchain import Compiler, build_shared
from sylvester.codegen.isa import Isa
from sylvester.codegen.space import Candidate, Problem
from sylvester.codegen.tunable import Family
from sylvester.compiler.errors import CompileError

Library = ctypes.CDLL
MOST_COLD_BYTES = 256 << 20
SAFE_BYTES = (0x3C, 0x3D, 0xBC, 0xBD)
"""Small finite numbers in every weight format: as float32 or bfloat16 at most 0.13 in size, any integer is one."""
TOLERANCE = 1e-3
SHORT_NS, LONGEST_BATCH = 100_000, 16


class WrongCandidate(CompileError):
    """A candidate computes something else than the default: a bug in its kernel."""


def build(family: Family, isa: Isa, candidate: Candidate, folder: Path, compiler: Compiler) -> Library:
    """The library of one candidate; the text of its kernel is that of an artefact."""
    source = family.source(isa, candidate)
    path = build_shared(source, folder / f"{sha256(source.encode()).hexdigest()[:16]}.so", isa, compiler=compiler)
    library = ctypes.CDLL(str(path))
    library.sv_team_new.restype = ctypes.c_void_p
    library.sv_team_free.argtypes = [ctypes.c_void_p]
    library.sv_tune_bytes.restype = None
    numbers = [ctypes.c_int64] * 4
    pointers = [ctypes.c_void_p] * 4
    library.sv_tune_run.argtypes = [*pointers, *numbers, ctypes.c_void_p]
    return library


class Bench:
    """Operands of one problem, and a team that runs any candidate's code. Close it to stop the threads."""

    def __init__(self, libraries: Mapping[Candidate, Library], family: Family, problem: Problem, threads: int) -> None:
        self._libraries, self._problem, self._threads = libraries, problem, threads
        self._first = next(iter(libraries.values()))
        self._sizes = (ctypes.c_int64 * len(problem.shape))(*problem.shape)
        cold, *warm = self._bytes(len(family.bytes))
        rng = np.random.default_rng(0)
        self.operands = [_filled(n, rng) for n in warm]
        self._stride = -(-max(cold, 1) // 64) * 64
        self._copies = max(2, -(-min(2 * last_level_cache(), MOST_COLD_BYTES) // self._stride))
        self.cold = aligned_empty((self._copies * self._stride,), "uint8")
        self.cold.reshape(self._copies, self._stride)[:] = _filled(self._stride, rng)
        self._pointers = (ctypes.c_void_p * len(self.operands))(*[o.ctypes.data for o in self.operands])
        self._next, self._batch = 0, 1
        self._team = self._first.sv_team_new(threads)
        if not self._team:
            raise CompileError(f"cannot start {threads} threads for tuning")

    def close(self) -> None:
        self._first.sv_team_free(self._team)

    def measure(self, candidate: Candidate, runs: int) -> list[int]:
        """Nanoseconds of each run, from when the one before was done; one run ahead of them brings in the code.

        Of a short kernel each is the mean of several.
        """
        ends = self._run(candidate, runs * self._batch + 1)
        return [int(ns) for ns in np.diff(ends).reshape(runs, self._batch).mean(1)]

    def check(self) -> None:
        """Every candidate must agree with the first, up to the order of its sums."""
        expected = None
        self._batch = min(LONGEST_BATCH, max(1, SHORT_NS // max(1, min(self.measure(next(iter(self._libraries)), 3)))))
        for candidate in self._libraries:
            result = self._result(candidate)
            expected = result if expected is None else expected
            largest = float(np.abs(expected).max(initial=0.0))
            error = float(np.abs(result - expected).max(initial=0.0))
            if not error <= TOLERANCE * largest:
                raise WrongCandidate(
                    f"{candidate} of {self._problem} is off by {error:.3g}, the largest value is {largest:.3g}",
                    hint="report this; set SYLVESTER_TUNE=0 to use the defaults",
                )

    def _result(self, candidate: Candidate) -> NDArray[np.float32]:
        self.operands[0][:] = 0xFF
        self._next = 0
        self._run(candidate, 1)
        return self.operands[0].view(np.float32).copy()

    def _run(self, candidate: Candidate, runs: int) -> NDArray[np.int64]:
        """The time in nanoseconds at which the last thread was done with each run."""
        ends = np.zeros((self._threads, runs), np.int64)
        library, cold = self._libraries[candidate], self.cold.ctypes.data
        code = library.sv_tune_run(
            self._team,
            self._sizes,
            self._pointers,
            cold,
            self._copies,
            self._stride,
            self._next,
            runs,
            ends.ctypes.data,
        )
        if code:
            raise CompileError(f"{candidate} of {self._problem} failed with code {code} while being tuned")
        self._next = (self._next + runs) % self._copies
        last: NDArray[np.int64] = ends.max(0)
        return last

    def _bytes(self, count: int) -> Sequence[int]:
        """The largest need of any candidate for each operand."""
        sizes = []
        for library in self._libraries.values():
            found = (ctypes.c_int64 * count)()
            library.sv_tune_bytes(self._sizes, found)
            sizes.append(list(found))
        return [max(column) for column in zip(*sizes, strict=True)]


def _filled(size: int, rng: np.random.Generator) -> NDArray[Any]:
    array = aligned_empty((size,), "uint8")
    array[:] = np.asarray(SAFE_BYTES, np.uint8)[rng.integers(0, len(SAFE_BYTES), size, np.uint8)]
    return array

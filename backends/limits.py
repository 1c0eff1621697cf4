"""What this machine does at most: read bandwidth by working set, and peak arithmetic on registers; measured once."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from sylvester.backends import fingerprint
from sylvester.backends.toolchain import Compiler, build_shared, find_compiler
from sylvester.codegen.isa import Isa, of
from sylvester.codegen.prelude import render, system
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError
from sylvester.compiler.progress import Progress, silent
from sylvester.compiler.schema import SchemaError, load
from sylvester.compiler.target import host_architecture

MIB = 1 << 20
IN_L2 = MIB // 2
"""Working set per thread that the second-level cache of any server core holds."""
WORKING_SETS = (8 * MIB, 32 * MIB, 64 * MIB, 200 * MIB, 512 * MIB)
KINDS = (("f32", "vector"), ("int8", "vector"), ("bf16", "vector"), ("int8", "tile"), ("bf16", "tile"))
"""Arithmetic and unit, in the numbering of the probe."""
WAYS = ((0, 0), (0, 1024), (1, 1024))
"""Streams side by side or not, and bytes to prefetch ahead: CPUs differ in which is fastest."""
LOOPS = 1_000_000
REPEATS = 5
ENOUGH = 48 * MIB
"""Bytes to read at least before the fastest of several passes is trusted."""


@dataclass(frozen=True)
class Read:
    """The best rate at which `threads` threads read `bytes` over and over."""

    bytes: int
    huge_pages: bool
    threads: int
    bytes_per_second: float


@dataclass(frozen=True)
class Peak:
    """Operations per second of `threads` threads; a multiply-add is two. `unit`: "vector" or "tile"."""

    arithmetic: str
    unit: str
    threads: int
    operations_per_second: float


@dataclass(frozen=True)
class Limits:
    cpu: str
    threads: int
    toolchain: str
    reads: tuple[Read, ...]
    peaks: tuple[Peak, ...]

    def bandwidth(self, working_set: float, threads: int | None = None) -> float:
        """Bytes per second at a working set, from the nearest ones measured; the better kind of pages."""
        best: dict[int, float] = {}
        for read in self.reads:
            if read.threads == (threads or self.threads):
                best[read.bytes] = max(best.get(read.bytes, 0.0), read.bytes_per_second)
        return _between(sorted(best.items()), working_set)

    def peak(self, arithmetic: str, threads: int | None = None) -> float:
        """Operations per second of the fastest unit; float32 where the CPU has nothing for the arithmetic."""
        wanted = threads or self.threads
        rates = {
            kind: [p.operations_per_second for p in self.peaks if (p.arithmetic, p.threads) == (kind, wanted)]
            for kind in (arithmetic, "f32")
        }
        return max(rates[arithmetic] or rates["f32"])


def _between(points: Sequence[tuple[int, float]], at: float) -> float:
    """Linear in the logarithm of the size; the ends go on."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * math.log(at / x0) / math.log(x1 / x0)
    return points[0][1] if at < points[0][0] else points[-1][1]


def measure(threads: int | None = None, *, again: bool = False, progress: Progress = silent) -> Limits:
    """The limits of this machine with one and with `threads` threads (default: those a CPU artefact uses).

    They are measured once, in a few seconds, and kept in the cache folder. `ToolchainMissing` without a C compiler.
    """
    threads = knobs.threads() if threads is None else threads
    if threads < 1:
        raise CompileError(f"threads must be at least 1, found {threads}")
    compiler = find_compiler()
    isa = of(host_architecture())[0]
    facts = fingerprint.cpu(), threads, fingerprint.toolchain(compiler, isa)
    source = "\n".join([system(host_architecture()), render("limits.c.in")])
    key = hashlib.sha256(json.dumps([*facts, source]).encode()).hexdigest()[:16]
    path = knobs.cache_folder() / "limits" / f"{key}.json"
    kept = None if again else _read(path)
    if kept is not None:
        return kept
    with _probe(source, compiler, isa) as probe:
        counts = sorted({1, threads})
        found = Limits(*facts, *_run(probe, counts, progress))
    _write(path, found)
    return found


def _read(path: Path) -> Limits | None:
    """What an earlier run wrote; a file that does not hold limits counts as none."""
    try:
        found = load(Limits, json.loads(path.read_bytes()))
    except (OSError, ValueError, SchemaError):
        return None
    return found if found.reads and found.peaks else None


def _write(path: Path, limits: Limits) -> None:
    """Several processes may write at once; a folder that cannot be written to costs a measurement next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(asdict(limits), file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


@contextmanager
def _probe(source: str, compiler: Compiler, isa: Isa) -> Iterator[ctypes.CDLL]:
    """The compiled probe; one build of the baseline holds the variants of all instruction sets."""
    with tempfile.TemporaryDirectory(prefix="sylvester-") as folder:
        fast = replace(isa, flags=())
        code = build_shared(source, Path(folder, "limits.so"), fast, compiler=compiler)
        probe = ctypes.CDLL(str(code))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("sv_team_new", pointer, [ctypes.c_int]),
        ("sv_team_free", None, [pointer]),
        ("sv_limits_peak", ctypes.c_double, [pointer, ctypes.c_int, number]),
        ("sv_limits_read", ctypes.c_double, [pointer, pointer, number, ctypes.c_int, number]),
        ("sv_limits_map", pointer, [number, ctypes.c_int]),
        ("sv_limits_unmap", None, [pointer, number]),
    ):
        function = getattr(probe, name)
        function.restype, function.argtypes = result, arguments
    yield probe


def _run(probe: ctypes.CDLL, counts: Sequence[int], progress: Progress) -> tuple[tuple[Read, ...], tuple[Peak, ...]]:
    teams = {count: probe.sv_team_new(count) for count in counts}
    if not all(teams.values()):
        raise CompileError(f"cannot start {max(counts)} threads", hint=f"set {knobs.THREADS.name} to fewer")
    try:
        progress("limits: arithmetic", 0, 3)
        peaks = tuple(peak for count, team in teams.items() for peak in _peaks(probe, team, count))
        reads: list[Read] = []
        for stage, huge in enumerate((False, True), 1):
            progress(f"limits: memory in {'2 MB' if huge else '4 KB'} pages", stage, 3)
            reads += _reads(probe, teams, huge)
        progress("limits", 3, 3)
        return tuple(reads), peaks
    finally:
        for team in teams.values():
            probe.sv_team_free(team)


def _peaks(probe: ctypes.CDLL, team: int, threads: int) -> Iterator[Peak]:
    for number, (arithmetic, unit) in enumerate(KINDS):
        best = max(probe.sv_limits_peak(team, number, LOOPS) for _ in range(REPEATS))
        if best:
            yield Peak(arithmetic, unit, threads, best)


def _reads(probe: ctypes.CDLL, teams: dict[int, int], huge: bool) -> list[Read]:
    sizes = [n for n in WORKING_SETS if n <= _memory() // 4] or [WORKING_SETS[0]]
    memory = probe.sv_limits_map(sizes[-1], int(huge))
    if not memory:
        raise CompileError(f"cannot map {sizes[-1] // MIB} MiB of memory", hint="free some memory")
    try:
        wanted = [(count, size) for count in teams for size in (IN_L2 * count, *sizes) if size <= sizes[-1]]
        return [Read(size, huge, count, _fastest(probe, teams[count], memory, size)) for count, size in wanted]
    finally:
        probe.sv_limits_unmap(memory, sizes[-1])


def _fastest(probe: ctypes.CDLL, team: int, memory: int, size: int) -> float:
    passes = max(3, ENOUGH // size)
    return max(float(probe.sv_limits_read(team, memory, size, *way)) for way in WAYS for _ in range(passes))


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

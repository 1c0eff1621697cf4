"""Tiles that products on GPUs may be tuned over: the first is what guesses for an A100 or H100 give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sylvester.codegen.gpu_architectures import SHARED
from sylvester.codegen.gpu_matmul import BITS, Linear, Tile

PROCESSORS = 108
"""Of an A100; an H100 has 132. Fewer programs leave some idle."""
MOST_SPLITS = 16
LEAST_STEPS = 4
"""Of the depth that a part has."""
LINE = 512
"""Neighbouring bytes of a row that a warp reads at a time."""
RESIDENT = 8
"""Programs without tensor cores that a processor runs at once, about."""
IN_FLIGHT = 32 << 10
"""Bytes that a processor has asked for at a time where memory is busy: 3.35 TB/s take 18 KB at 700 ns of latency."""


def tiles(linear: Linear, m: int, n: int, k: int, arch: str = "sm_80") -> tuple[Tile, ...]:
    """Of `kernel` for up to m rows."""
    most = SHARED[arch]
    guess = _guess(linear, m, n, k)
    first = next(t for s in (guess.stages, 2, 1) if shared_bytes(linear, t := replace(guess, stages=s)) <= most)
    shapes = [(a, b) for a in (16, 32, 64, 128) for b in (32, 64, 128, 256) if a <= 2 * first.m and a * b <= 128 * 256]
    others = (
        replace(first, m=a, n=b, warps=_warps(a, b, linear), stages=stages, splits=_splits(a, b, first.k, m, n, k))
        for stages in (3, 4)
        for a, b in shapes
        if a >= first.m // 2
    )
    found = (first, *(replace(first, splits=s) for s in (1, 2, 4, 8) if s * LEAST_STEPS * first.k <= k), *others)
    return _distinct(tile for tile in found if shared_bytes(linear, tile) <= most)


def gemv_tiles(linear: Linear, m: int, n: int, k: int) -> tuple[Tile, ...]:
    """Of `gemv` for m rows of x."""
    rows = next((r for r in (8, 4) if n >= r * 4 * PROCESSORS), 2)
    whole = 1 << max(5, (k - 1).bit_length())
    least = min(LINE * 8 // BITS[linear.weight] if linear.weight != "i3" else 1024, whole)
    splits = 1 if n >= rows * PROCESSORS else parts(PROCESSORS * rows // max(1, n), k // least)
    step = least * _lines(linear, m, rows, n, k // splits // least)
    first = Tile(1, rows, step, 4, 2, splits)
    depths = dict.fromkeys((step, least, max(32, least // 2), min(2 * step, whole)))
    others = (replace(first, n=r, warps=w, k=s) for s in depths for r in (2, 4, 8, 16) for w in (2, 4, 8))
    return _distinct((first, *(replace(first, splits=s) for s in (1, 2, 4)), *others))


def _lines(linear: Linear, m: int, rows: int, n: int, there: int) -> int:
    """How many lines of a row are read at once: all that there are in the depth is a multiple of it, and a processor
    waits for as much as hides the latency of memory, unless registers run out, as they do for several rows of x."""
    programs = max(1, min(RESIDENT, n // (rows * PROCESSORS)))
    most = 1 if m > 1 or linear.weight == "i3" else 2 if linear.gated else 4
    fitting = [lines for lines in (1, 2, 4) if lines <= most and there % lines == 0]
    return next((lines for lines in fitting if lines * LINE * rows * programs >= IN_FLIGHT), max(fitting))


def shared_bytes(linear: Linear, tile: Tile) -> int:
    """Of tiles of x and W that are on their way at once; what Triton adds is small."""
    stored = BITS[linear.x] * tile.m + BITS[linear.weight] * tile.n * (2 if linear.gated else 1)
    return stored * tile.k // 8 * tile.stages


def _guess(linear: Linear, m: int, n: int, k: int) -> Tile:
    """128 bytes of a row at a time; narrower tiles where fewer than the processors would be busy, then parts."""
    step = 128 * 8 // max(BITS[linear.type], BITS[linear.x])
    step = min(step, linear.group or step)
    rows = min(128, max(16, 1 << (m - 1).bit_length()))
    widest = 64 if linear.gated or rows <= 32 or linear.type == "fp32" else 128
    columns = next((c for c in (widest, 64, 32) if -(-m // rows) * -(-n // c) >= PROCESSORS), 32)
    stages = 4 if rows <= 64 else 3
    return Tile(rows, columns, step, _warps(rows, columns, linear), stages, _splits(rows, columns, step, m, n, k))


def _warps(rows: int, columns: int, linear: Linear) -> int:
    return 8 if rows * columns * (2 if linear.gated else 1) >= 128 * 128 else 4


def _splits(rows: int, columns: int, step: int, m: int, n: int, k: int) -> int:
    programs = -(-m // rows) * -(-n // columns)
    return parts(PROCESSORS // programs, k // step)


def parts(wanted: int, steps: int) -> int:
    """How many programs share the depth: a power of two."""
    most = max(1, min(wanted, steps // LEAST_STEPS, MOST_SPLITS))
    return 1 << (most.bit_length() - 1)


def _distinct(found: Iterable[Tile]) -> tuple[Tile, ...]:
    return tuple(dict.fromkeys(found))

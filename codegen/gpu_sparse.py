"""Kernels for GPUs of a few rows over float32 weights of which zeros leave out a part, and their tiles."""

from __future__ import annotations

from dataclasses import replace

from sylvester.codegen.gpu_kernel import Constant, Kernel, text
from sylvester.codegen.gpu_matmul import FINISH_M, FINISH_N, Linear, Tile, gemv
from sylvester.codegen.gpu_matmul_space import MOST_SPLITS, PROCESSORS, gemv_tiles, parts

COLUMNS, DEPTH = 64, 32
"""Of a program of `skipping`: neighbours in memory, and rows of W^T whose zeros are looked for at a time."""
BUSY = 4
"""Programs of `skipping` that a processor should have."""
ROUNDING = ("scales", "up_scales", "x_scales", "BITS", "GROUP", "SCALED", "TYPE", "ROUND", "MOST", "LANES")
"""What `gemv` takes and kernels over float32 do not."""
AFTER = ("up", "up_bias", "residual", "residual_row", "ACTIVATION", "GATED", "ADDED", "SPLITS")
"""What follows a product, and not a gate."""


def few(linear: Linear, tile: Tile, m: int, k: int) -> Kernel:
    """The kernel of at most `MOST_ROWS` rows of a layer."""
    if linear.opening:
        return glu(linear, tile, m, k)
    return skipping(linear, tile, m, k) if linear.turned else gemv(linear, tile, m, k)


def few_tiles(linear: Linear, m: int, n: int, k: int) -> tuple[Tile, ...]:
    """Of `few` for m rows of x: the first is a guess."""
    if not linear.turned:
        found = gemv_tiles(linear, m, n, k)
        return tuple(dict.fromkeys(replace(tile, splits=1) for tile in found)) if linear.opening else found
    programs = -(-n // COLUMNS)
    first = Tile(1, COLUMNS, DEPTH, 4, 2, parts(BUSY * PROCESSORS // programs, k // DEPTH))
    others = [replace(first, n=n, k=k, warps=w) for n in (32, 64, 128) for k in (16, 32, 64) for w in (2, 4, 8)]
    splits = [replace(first, splits=s) for s in (1, 2, 4, 8, MOST_SPLITS) if s * DEPTH <= k]
    return tuple(dict.fromkeys((first, *splits, *others)))


def skipping(linear: Linear, tile: Tile, m: int, k: int) -> Kernel:
    """`gemv` over a transposed weight, whose rows it does not read where x is 0."""
    return _without(gemv(linear, tile, m, k), "skipping", ROUNDING, {})


def glu(linear: Linear, tile: Tile, m: int, k: int) -> Kernel:
    """a (x W^T + bias), a = act(gate) or 0 where that is small, without the rows of W where a is 0."""
    types = {"gate": "*fp32", "thresholds": "*fp32"}
    return _without(gemv(linear, tile, m, k), "sparse_glu", (*ROUNDING, *AFTER), types, linear.opening)


def opening(linear: Linear) -> Kernel:
    """The gate of `glu` over the result of a product."""
    types = dict.fromkeys(("y", "gate", "thresholds"), "*fp32") | dict.fromkeys(("m", "n", "y_row"), "i32")
    fixed: dict[str, Constant] = {"OPENING": linear.opening, "BLOCK_M": FINISH_M, "BLOCK_N": FINISH_N}
    return Kernel(text("sparse"), "open_rows", types, fixed)


def _without(
    kernel: Kernel, function: str, dropped: tuple[str, ...], added: dict[str, str], opened: str = ""
) -> Kernel:
    """Another function that takes what `kernel` does, but for some, and other pointers after its own."""
    pointers = {name: t for name, t in kernel.types.items() if t.startswith("*") and name not in dropped}
    sizes = {name: t for name, t in kernel.types.items() if not t.startswith("*") and name not in dropped}
    constants = {name: value for name, value in kernel.constants.items() if name not in dropped}
    constants |= {"OPENING": opened} if opened else {}
    return replace(kernel, text=text("sparse"), function=function, types=pointers | added | sizes, constants=constants)

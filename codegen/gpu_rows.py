"""Kernels for GPUs that round rows of x to whole numbers or float8, after a norm or without."""

from __future__ import annotations

from dataclasses import replace

from sylvester.codegen.gpu_kernel import Constant, Kernel, text
from sylvester.codegen.gpu_matmul import FLOATS, LARGEST, LARGEST_FLOAT8, Norm
from sylvester.compiler.errors import CompileError

WIDEST = 8192
"""Columns that a program holds at once; longer rows are read again, from the cache."""


def quantize_rows(
    x: str, k: int, norm: Norm | None = None, bits: int = 8, step: bool = False, numbers: str = "i8"
) -> Kernel:
    """int8 or fp8e4nv numbers [m, k] and float32 scales [m] of x [m, k], as compiler/quantized_rows.py says.

    `step`: every scale is the one number of the argument of that name. `bits` are those of whole numbers.
    """
    if x not in FLOATS or bits not in LARGEST:
        raise CompileError(f"found rows in {x!r} to {bits} bits, expected {list(FLOATS)} to one of {list(LARGEST)}")
    weight, bias = (norm.weight, norm.bias) if norm else ("", "")
    types = {"x": f"*{x}", "numbers": f"*{numbers}", "scales": "*fp32"} | ({"step": "*fp32"} if step else {})
    types |= {name: f"*{held}" for name, held in (("norm_weight", weight), ("norm_bias", bias)) if held}
    types |= dict.fromkeys(("m", "k", "x_row", "numbers_row"), "i32")
    block = min(WIDEST, max(32, 1 << (k - 1).bit_length()))
    constants: dict[str, Constant] = dict.fromkeys(
        (n for n in ("step", "norm_weight", "norm_bias") if n not in types), 0
    )
    constants |= {
        "eps": norm.eps if norm else 0.0,
        "NORM": norm.kind if norm else "none",
        "WEIGHTED": bool(weight),
        "SHIFTED": bool(bias),
        "STEP": step,
        "MOST": LARGEST[bits] if numbers == "i8" else LARGEST_FLOAT8,
        "EVEN": k % block == 0,
        "ROWS": rows_of(k),
        "BLOCK_K": block,
    }
    aligned = ("x", "numbers", *(("k", "x_row", "numbers_row") if k % 16 == 0 else ()))
    name = "quantize_rows" if k <= block else "quantize_long_rows"
    return Kernel(text("rows"), name, types, constants, aligned, warps=8 if block >= 4096 else 4, stages=1)


def candidates(
    x: str, k: int, norm: Norm | None = None, bits: int = 8, step: bool = False, numbers: str = "i8"
) -> tuple[Kernel, ...]:
    """Kernels that it may be tuned over, the default first."""
    first = quantize_rows(x, k, norm, bits, step, numbers)
    return (first, *(replace(first, warps=w) for w in (first.warps // 2, first.warps * 2)))


def rows_of(k: int) -> int:
    """Rows of a program: short ones are taken together."""
    return max(1, min(16, 1024 // (1 << (k - 1).bit_length())))


def quantize_grid(m: int, k: int) -> tuple[int]:
    return (-(-m // rows_of(k)),)

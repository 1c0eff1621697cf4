"""Norms, softmax, rotary positions and the choice of tokens on GPUs: kernels over rows and their grids."""

from __future__ import annotations

from typing import Literal

from sylvester.codegen.gpu_attention import POINTERS
from sylvester.codegen.gpu_kernel import Constant, Kernel, alone, text

WIDEST = 32768
"""The longest row that one program holds at once."""
APART = ("y", "x", "total", "heads", "y_batch", "y_head", "y_row", "x_batch", "x_head", "x_row")
"""Arguments of `rope` that differ between queries and keys."""
TILE = 4096
"""Values that a program takes where rows are short."""
ROPE_ROWS, PARTS, SCANNED, READ = 8, 16, 1024, 4096
"""Rows of a program of `rope`; parts of a row of logits, and how many logits are read at once."""


def norm(
    kind: Literal["rms", "layer"],
    n: int,
    x: str,
    *,
    weight: str | None = None,
    bias: str | None = None,
    summed: bool = False,
) -> Kernel:
    """Rows of n values of a float type; `weight` and `bias` are float types. `summed`: of x + other, which goes into
    `total`, both of the type of x."""
    if n > WIDEST:
        raise ValueError(f"rows of {n} values, expected at most {WIDEST}")
    pointers = {
        "y": x, "total": x if summed else None, "x": x, "other": x if summed else None, "weight": weight, "bias": bias,
    }  # fmt: skip
    types = {name: POINTERS[dtype] for name, dtype in pointers.items() if dtype is not None}
    wide = block(n)
    constants: dict[str, Constant] = {
        "BLOCK": wide, "ROWS": _rows(wide), "CENTRED": kind == "layer", "SUMMED": summed,
        "WEIGHTED": weight is not None, "BIASED": bias is not None, **{m: 0 for m in pointers if m not in types},
    }  # fmt: skip
    types |= {**dict.fromkeys(("rows", "n", "x_row"), "i32"), "eps": "fp32"}
    return _kernel("norms", "norm", types, constants, n, _warps(wide))


def norm_grid(n: int, rows: int) -> tuple[int]:
    return (-(-rows // rows_of(n)),)


def rows_of(n: int) -> int:
    """Rows of n values that a program takes."""
    return _rows(block(n))


def softmax(n: int, x: str, y: str) -> Kernel:
    """Of rows of n values, over `softmax_grid` programs; rows past `WIDEST` are read twice."""
    types = {"y": POINTERS[y], "x": POINTERS[x]}
    if n > WIDEST:
        return _kernel("norms", "long_softmax", {**types, "n": "i32"}, {"BLOCK": READ}, n, 8)
    wide = block(n)
    constants: dict[str, Constant] = {"BLOCK": wide, "ROWS": _rows(wide)}
    return _kernel("norms", "softmax", {**types, "rows": "i32", "n": "i32"}, constants, n, _warps(wide))


def softmax_grid(n: int, rows: int) -> tuple[int]:
    return (rows,) if n > WIDEST else norm_grid(n, rows)


def rope(
    d: int,
    rotary: int,
    x: str,
    y: str,
    angles: str,
    *,
    interleaved: bool = False,
    halved: bool = False,
    aligned: tuple[str, ...] = (),
) -> Kernel:
    """The first `rotary` of d features turn; cos and sin hold an angle a feature, or `halved` an angle a pair.

    The strides of a batch that shares its angles are 0. y must not be x. `aligned` arguments, strides too, are
    multiples of 16.
    """
    if rotary % 2 or rotary > d:
        raise ValueError(f"rotary size must be even and at most the head size {d}, got {rotary}")
    numbers = ("total", "heads", "rows", "y_batch", "y_head", "y_row", "x_batch", "x_head", "x_row", "angle_batch")
    types = {
        "y": POINTERS[y], "x": POINTERS[x], "cos": POINTERS[angles], "sin": POINTERS[angles],
        **dict.fromkeys((*numbers, "angle_row"), "i32"),
    }  # fmt: skip
    constants: dict[str, Constant] = {
        "D": d, "ROTARY": rotary, "BLOCK_D": block(d), "ROWS": ROPE_ROWS, "INTERLEAVED": interleaved, "HALVED": halved,
        **alone(APART),
    }  # fmt: skip
    return Kernel(text("rope"), "rope", types, constants, aligned, warps=4, stages=1)


def rope_grid(total: int) -> tuple[int]:
    """Programs for `total` rows of the batch and its heads."""
    return (-(-total // ROPE_ROWS),)


def best(aligned: tuple[str, ...] = ()) -> tuple[Kernel, Kernel]:
    """The first place of the largest of each row of float32 logits, as `torch.argmax`, or -1 - it where that logit is
    not finite: over `(rows, PARTS)` programs into int64 [rows, PARTS], then over `(rows,)` into int64 ids. `aligned`:
    of x, n, stride, multiples of 16."""
    types = {"parts": "*i64", "x": "*fp32", "n": "i32", "stride": "i32"}
    first = Kernel(text("sampling"), "best_parts", types, {"BLOCK": SCANNED, "PARTS": PARTS}, aligned)
    types = {"ids": "*i64", "parts": "*i64"}
    return first, Kernel(text("sampling"), "best_of_parts", types, {"PARTS": PARTS}, ("parts",), warps=1)


def draw(*, top_k: bool, top_p: bool, read: int = READ, aligned: tuple[str, ...] = ()) -> Kernel:
    """A token of each row of float32 logits, over `(rows,)` programs, `read` logits at once; -1 - id where rounding, or
    a logit that is not finite, leaves it to the host.

    The host gives the larger of the temperature and `compiler.sampling.LEAST`, and a float64 number in [0, 1) a row.
    Without `top_k`, or `top_p`, that number is not read. `aligned`: of x, n, stride, multiples of 16.
    """
    types = {
        "ids": "*i64", "x": "*fp32", "uniform": "*i64", "n": "i32", "stride": "i32", "temperature": "fp32",
        "top_k": "i32", "top_p": "fp32",
    }  # fmt: skip
    return Kernel(text("sampling"), "draw", types, {"BLOCK": read, "KEPT": top_k, "NUCLEUS": top_p}, aligned, warps=16)


def block(n: int) -> int:
    """The power of two, 16 or more, that holds n."""
    return max(16, 1 << (n - 1).bit_length())


def _rows(wide: int) -> int:
    return max(1, min(16, TILE // wide))


def _warps(wide: int) -> int:
    return max(4, min(16, wide // 1024))


def _kernel(
    module: str, function: str, types: dict[str, str], constants: dict[str, Constant], n: int, warps: int
) -> Kernel:
    """Rows are aligned where their length is."""
    aligned = ("n", *(name for name in types if types[name].startswith("*"))) if n % 16 == 0 else ()
    return Kernel(text(module), function, types, constants, aligned, warps, stages=1)

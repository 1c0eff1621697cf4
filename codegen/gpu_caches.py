"""Writing rows of keys and values into caches on GPUs."""

from __future__ import annotations

from sylvester.codegen.gpu_attention import POINTERS
from sylvester.codegen.gpu_kernel import Constant, Kernel, alone, text

ROWS = 8
"""Rows that one program writes."""
RECORDS = ("q8", "q4")
APART = ("cache", "x", "x_batch", "x_head", "x_row")
"""Arguments that differ between keys and values."""


def kv_update(d: int, x: str, cache: str, aligned: tuple[str, ...] = ()) -> Kernel:
    """Rows of `d` features of a float type into a cache of a float type, or of records "q8" or "q4".

    The cache is changed in place; rows that do not fit in it are left out. `aligned` arguments, strides
    too, are multiples of 16.
    """
    numbers = ("total", "heads", "rows", "keys", "cache_batch", "cache_head", "cache_row", "x_batch", "x_head", "x_row")
    types = {"cache": POINTERS[cache], "x": POINTERS[x], "past": "*i64", **dict.fromkeys(numbers, "i32")}
    fixed: dict[str, Constant] = {
        "D": d, "BLOCK_D": max(32, 1 << (d - 1).bit_length()), "ROWS": ROWS,
        "STORED": cache if cache in RECORDS else "plain", **alone(APART),
    }  # fmt: skip
    return Kernel(text("caches"), "kv_update", types, fixed, aligned, warps=4, stages=1)


def grid(total: int) -> tuple[int]:
    """Programs for `total` rows of the batch and its heads."""
    return (-(-total // ROWS),)

"""bf16 weights in panels [ceil(n / 32)][ceil(k / 2)][32][2], and float32 -> bf16 rounding, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sylvester.codegen.isa import Isa
from sylvester.codegen.layout import PANEL
from sylvester.codegen.prelude import render


def header(isa: Isa) -> str:
    """C text of the format: `sv_bf16_row_bytes`, `_panel_bytes`, `_pack_row` and `_panel`; follows gemm.h.in."""
    rows = range(1, isa.gemm_rows + 1)

    def tiles(kind: str) -> str:
        return "\n".join(f"SV_BF16_{kind}TILE({r})" for r in rows)

    def names(kind: str) -> str:
        return ", ".join(f"sv_bf16_{kind}tile_{r}" for r in rows)

    return render(
        "bf16.h.in",
        TILES=tiles(""),
        TILE_NAMES=names(""),
        STEADY_TILES=tiles("STEADY_"),
        STEADY_NAMES=names("steady_"),
    )


def panel_bytes_bf16(k: int) -> int:
    """Bytes of one panel of depth k; a multiple of 64."""
    return (k + 1) // 2 * PANEL * 4


def pack_bf16(weight: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """bf16 bits [n, k] -> [ceil(n / 32), panel_bytes_bf16(k) / 2]; missing columns and the odd k are zeros."""
    if weight.ndim != 2 or weight.dtype != np.uint16:
        raise ValueError(f"a bf16 weight is uint16 with 2 axes, got {weight.dtype} of shape {weight.shape}")
    n, k = weight.shape
    panels, pairs = -(-n // PANEL), -(-k // 2)
    packed = np.zeros((panels, pairs, PANEL, 2), np.uint16)
    for panel in range(panels):
        rows = weight[panel * PANEL : (panel + 1) * PANEL]
        packed[panel, :, : len(rows), 0] = rows[:, 0::2].T
        packed[panel, : k // 2, : len(rows), 1] = rows[:, 1::2].T
    return packed.reshape(panels, panel_bytes_bf16(k) // 2)


def offset_bf16(row: Any, column: Any, k: Any) -> Any:
    """Place of element (row, column) of the weight [n, k], in bf16 values of the packed tensor; also takes symbols."""
    return row // PANEL * ((k + 1) // 2 * PANEL * 2) + column // 2 * (PANEL * 2) + row % PANEL * 2 + column % 2


def bf16_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bf16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, bits >> 16 | 0x40, rounded).astype(np.uint16)


def bf16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bf16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

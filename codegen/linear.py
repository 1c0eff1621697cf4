"""y = x W^T + bias with the weight packed once into panels of 32 output columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sylvester.codegen.prelude import render

PANEL = 32

_EPILOGUE = """for (int64_t i = 0; i < rows; i++) {
            float *out = c + i * ldy;
            #pragma omp simd
            for (int64_t j = 0; j < cols; j++) out[j] = %s;
        }"""


def linear(name: str = "sv_linear", epilogue: str | None = None) -> str:
    """C text of one instance; `epilogue` is an expression of `out[j]` (row + i, col + j is its place in y)."""
    return render("linear.c.in", NAME=name, EPILOGUE=_EPILOGUE % epilogue if epilogue else "")


def pack(weight: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """[n, k] -> [ceil(n / 32), k, 32], the last panel padded with zeros."""
    if weight.ndim != 2:
        raise ValueError(f"a linear weight has 2 axes, got shape {weight.shape}")
    n, k = weight.shape
    panels = -(-n // PANEL)
    padded = np.zeros((panels * PANEL, k), np.float32)
    padded[:n] = weight
    return np.ascontiguousarray(padded.reshape(panels, PANEL, k).transpose(0, 2, 1))

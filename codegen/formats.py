"""Weight formats of the linear kernels: their C text, and stored tensors packed for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.codegen import bfloat16, quantized
from sylvester.codegen.isa import Isa
from sylvester.codegen.layout import PANEL, Format, FormatName, Layout
from sylvester.codegen.linear import pack
from sylvester.codegen.prelude import render

Array = NDArray[Any]
PIECE = 1 << 20
"""Values that are packed at a time, which bounds the memory it takes."""


def format_headers(formats: Collection[FormatName], isa: Isa) -> list[str]:
    """C text that linear layers in these formats build on; follows the prelude."""
    low_bit = [name for name in ("q8", "q4") if name in formats]
    parts = ["qrow", "qtile", "amx_quantized", *low_bit] if low_bit else []
    wide = [bfloat16.header(isa)] if "bf16" in formats else []
    return [render("amx.h.in"), *wide, *(render(f"{part}.h.in") for part in parts)] if low_bit or wide else []


def panel_bytes(form: Format, k: int) -> int:
    """Bytes of 32 output features of depth k with their scales."""
    if form.name == "f32":
        return k * PANEL * 4
    if form.name == "bf16":
        return bfloat16.panel_bytes_bf16(k)
    return int((quantized.panel_bytes_q8 if form.name == "q8" else quantized.panel_bytes_q4)(k, form.group))


def packed(layout: Layout, weights: Sequence[Array], scales: Sequence[Array]) -> Iterator[Array]:
    """The stored tensor of a `panels` layout, some panels at a time: bytes [panels, bytes], f32 [panels, k, 32]."""
    whole = sum(w.shape[0] for w in weights) if layout.ways == 1 else weights[0].shape[0]
    step = PANEL * max(1, PIECE // max(1, layout.ways * weights[0].shape[1] * PANEL))
    for start in range(0, whole, step):
        rows = slice(start, start + step)
        if layout.ways == 1:
            yield _pack(layout.format, _rows(weights, rows), _rows(scales, rows) if scales else None)
            continue
        each = [
            _pack(layout.format, weight[rows], scales[way][rows] if scales else None)
            for way, weight in enumerate(weights)
        ]
        yield np.stack(each, 1).reshape(len(each) * len(each[0]), *each[0].shape[1:])


def _rows(parts: Sequence[Array], rows: slice) -> Array:
    """Rows of the arrays laid end to end."""
    found, start = [], 0
    for part in parts:
        found.append(part[max(rows.start - start, 0) : max(rows.stop - start, 0)])
        start += part.shape[0]
    return np.concatenate(found)


def _pack(form: Format, weight: Array, scales: Array | None) -> Array:
    if form.name == "f32":
        return pack(weight)
    if form.name == "bf16":
        return bfloat16.pack_bf16(weight).view(np.uint8)
    assert scales is not None, "low-bit weights have scales"
    return (quantized.pack_q8 if form.name == "q8" else quantized.pack_q4)(weight, scales)

"""Weight formats of the linear kernels: their C text, and stored tensors packed for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.codegen import bfloat16, panels, quantized, sparse
from sylvester.codegen.isa import Isa
from sylvester.codegen.layout import PANEL, Format, FormatName, Layout
from sylvester.codegen.panels import pack_f32
from sylvester.codegen.prelude import render

Array = NDArray[Any]
PACKERS: Mapping[str, Callable[[Array, Array], Array]] = {
    "q8": panels.pack_q8,
    "q4": panels.pack_q4,
    "q3": panels.pack_q3,
}
PIECE = 1 << 20
"""Values that are packed at a time, which bounds the memory it takes."""


def format_headers(formats: Collection[FormatName], isa: Isa) -> list[str]:
    """C text that linear layers in these formats build on; follows the prelude."""
    wide = [bfloat16.header(isa)] if "bf16" in formats else []
    low_bit = quantised_headers(formats)
    strided = [] if set(formats).isdisjoint(("rows", "columns")) else [sparse.strided_header()]
    return [*strided, *([render("amx.h.in"), render("amx_panel.h.in"), *wide, *low_bit] if low_bit or wide else [])]


def quantised_headers(formats: Collection[FormatName]) -> list[str]:
    """C text of the formats with whole numbers; follows the tiles of AMX."""
    found = [render("q8.h.in")] if "q8" in formats else []
    found += [render("qlow.h.in", BITS=bits, ZERO=1 << bits - 1) for bits in (4, 3) if f"q{bits}" in formats]
    shared = [render(f"{part}.h.in") for part in ("qrow", "qtile", "amx_quantized")]
    return [*shared, *found] if found else []


def panel_bytes(form: Format, k: int) -> int:
    """Bytes of 32 output features of depth k with their scales."""
    if form.name == "f32":
        return k * PANEL * 4
    if form.name == "bf16":
        return bfloat16.panel_bytes_bf16(k)
    sizes = {"q8": quantized.panel_bytes_q8, "q4": quantized.panel_bytes_q4, "q3": quantized.panel_bytes_q3}
    return int(sizes[form.name](k, form.group))


def depth(form: Format, columns: int) -> int:
    """Input features of a stored weight with so many columns."""
    return {"q4": 2 * columns, "q3": columns // 3 * 8}.get(form.name, columns)


def packed(layout: Layout, weights: Sequence[Array], scales: Sequence[Array]) -> Iterator[Array]:
    """The stored tensor of a `panels` layout, some panels at a time: bytes [panels, bytes], f32 [panels, k, 32]."""
    whole = sum(w.shape[0] for w in weights) if layout.ways == 1 else weights[0].shape[0]
    step = PANEL * max(1, PIECE // max(1, layout.ways * weights[0].shape[1] * PANEL))
    for start in range(0, whole, step):
        rows = slice(start, start + step)
        if layout.ways == 1:
            yield _pack(layout.format, _rows(weights, rows), _rows(_as_wide(scales), rows) if scales else None)
            continue
        each = [
            _pack(layout.format, weight[rows], scales[way][rows] if scales else None)
            for way, weight in enumerate(weights)
        ]
        yield np.stack(each, 1).reshape(len(each) * len(each[0]), *each[0].shape[1:])


def _as_wide(scales: Sequence[Array]) -> list[Array]:
    """As many columns in each: one scale of a whole row counts for every group of it."""
    groups = max(s.shape[1] for s in scales)
    return [np.broadcast_to(s, (s.shape[0], groups)) for s in scales]


def _rows(parts: Sequence[Array], rows: slice) -> Array:
    """Rows of the arrays laid end to end."""
    found, start = [], 0
    for part in parts:
        found.append(part[max(rows.start - start, 0) : max(rows.stop - start, 0)])
        start += part.shape[0]
    return np.concatenate(found)


def _pack(form: Format, weight: Array, scales: Array | None) -> Array:
    if form.name == "f32":
        return pack_f32(weight)
    if form.name == "bf16":
        return bfloat16.pack_bf16(weight).view(np.uint8)
    assert scales is not None, "low-bit weights have scales"
    return PACKERS[form.name](weight, scales)

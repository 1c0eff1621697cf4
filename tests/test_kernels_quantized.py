"""q8 and q4 panels against exact integer sums: every group, row count, remainder and extreme value."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest

from sylvester.codegen.isa import AVX512
from sylvester.codegen.prelude import render
from sylvester.codegen.quantized import (
    pack_q4,
    pack_q8,
    panel_bytes_q4,
    panel_bytes_q8,
    place_q4,
    place_q8,
    scale_place_q4,
    scale_place_q8,
)
from tests.kernel_harness import load, supported

VNNI = replace(AVX512, name="vnni", level=3, flags=(*AVX512.flags, "-mavx512vnni"))
TINY = 2.0**-100
ENTRY = """
SV_EXPORT int64_t %(f)s_row_bytes(int64_t k, int64_t group) { return sv_%(f)s_row_bytes(k, group); }
SV_EXPORT int64_t %(f)s_panel_bytes(int64_t k, int64_t group) { return sv_%(f)s_panel_bytes(k, group); }
SV_EXPORT void %(f)s_pack(char *row, const float *x, int64_t k, int64_t group) { sv_%(f)s_pack_row(row, x, k, group); }
SV_EXPORT void %(f)s_run(const sv_product *o) { sv_%(f)s_panel(o); }
SV_EXPORT int64_t %(f)s_wide(void) { return SV_%(F)s_WIDE; }
"""
PARTS = [render(f"{part}.h.in") for part in ("qrow", "qtile", "q8", "q4")]
SOURCE = "".join(PARTS) + "".join(ENTRY % {"f": name, "F": name.upper()} for name in ("q8", "q4"))


def has_vnni() -> bool:
    with open("/proc/cpuinfo", encoding="ascii") as info:
        return "avx512_vnni" in info.read()


ISAS = (*supported(), *([VNNI] if has_vnni() and AVX512 in supported() else []))
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


class Product(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("panel", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("ldc", "m", "cols", "k", "group")],
        ("bias", ctypes.c_void_p),
    ]


def library(isa):
    lib = load(SOURCE, isa)
    for name in ("q8", "q4"):
        for size in ("row_bytes", "panel_bytes", "wide"):
            getattr(lib, f"{name}_{size}").restype = ctypes.c_int64
        getattr(lib, f"{name}_pack").argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return lib


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    raw = np.full(size + 64, 0xEE, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].reshape(shape)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, kept as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = np.abs(x).max(1, initial=0).astype(np.float32)
    scale = np.where(top < TINY, np.float32(0), top / np.float32(127)).astype(np.float32)
    safe = np.where(scale == 0, np.float32(1), scale)[:, None]
    return np.where(scale[:, None] == 0, 0, np.rint(x / safe)).astype(np.int64), scale


def pack_rows(lib, name: str, x: np.ndarray, group: int) -> np.ndarray:
    m, k = x.shape
    rows = aligned((m, getattr(lib, f"{name}_row_bytes")(ctypes.c_int64(k), ctypes.c_int64(group))))
    for r in range(m):
        getattr(lib, f"{name}_pack")(rows[r].ctypes.data, x[r].ctypes.data, k, group)
    return rows


def multiply(lib, name, rows, packed, bias, shape, group) -> np.ndarray:
    """All panels of C; the last two columns stay NaN."""
    m, n, k = shape
    c = np.full((m, n + 2), np.nan, np.float32)
    for p, panel in enumerate(packed):
        at = p * 32
        product = Product(
            rows.ctypes.data, rows.shape[1], panel.ctypes.data, c[:, at:].ctypes.data, n + 2, m, min(32, n - at)
        )
        product.k, product.group = k, group
        product.bias = None if bias is None else bias[at:].ctypes.data
        getattr(lib, f"{name}_run")(ctypes.byref(product))
    return c


def weights(rng, name: str, n: int, k: int, group: int, extreme: bool):
    """Integer weights, scales as the kernel sees them, and the packed tensor."""
    low, high = (-128, 127) if name == "q8" else (-8, 7)
    w = rng.choice([low, high], (n, k)) if extreme else rng.integers(low, high + 1, (n, k))
    scales = rng.uniform(0.01, 1, (n, k // group if group else 1)).astype(np.float32)
    if name == "q8":
        packed = pack_q8(w.astype(np.int8), scales, group)
    else:
        packed = pack_q4(((w[:, ::2] + 8) | (w[:, 1::2] + 8) << 4).astype(np.uint8), scales)
    copy = aligned(packed.shape)
    copy[:] = packed
    return w, bfloat16(scales) if group else scales, copy


def check(lib, name: str, shape, group: int, *, extreme: bool = False, biased: bool = True) -> None:
    m, n, k = shape
    rng = np.random.default_rng([m, n, k, group])
    x = rng.standard_normal((m, k), np.float32)
    if extreme:
        x = np.where(rng.random((m, k)) < 0.5, np.float32(-3), np.float32(3))
        x[0] = 3
    x[m // 2] *= m % 3
    w, scales, packed = weights(rng, name, n, k, group, extreme)
    bias = rng.standard_normal(n, np.float32) if biased else None
    c = multiply(lib, name, pack_rows(lib, name, x, group), packed, bias, shape, group)
    q, scale = quantise(x)
    parts = group or max(k, 1)
    sums = np.einsum("mgk,ngk->mng", q.reshape(m, -1, parts), w.reshape(n, -1, parts)) * scales.astype(np.float64)
    exact = sums.sum(-1) * scale[:, None] + (0 if bias is None else bias)
    terms = np.abs(sums).sum(-1) * scale[:, None] + (0 if bias is None else np.abs(bias))
    assert (np.abs(c[:, :n] - exact) <= 2.0**-23 * (3 + np.sqrt(sums.shape[-1])) * terms).all(), (shape, group)
    assert np.isnan(c[:, n:]).all()


@each_isa
@pytest.mark.parametrize(("name", "group"), [("q8", 0), ("q8", 32), ("q8", 64), ("q8", 128), ("q4", 32), ("q4", 64), ("q4", 128)])
def test_every_row_count(isa, name, group):
    lib = library(isa)
    for m in range(1, 21):
        check(lib, name, (m, (32, 33, 70)[m % 3], 384), group, biased=m % 4 > 0)
        check(lib, name, (m, 31, 128), group, extreme=True)


@each_isa
def test_q8_of_any_depth(isa):
    lib = library(isa)
    for k in (1, 2, 3, 5, 31, 33, 63, 64, 65, 100, 127, 257, 2049):
        check(lib, "q8", (k % 7 + 1, k % 40 + 1, k), 0)
        check(lib, "q8", (3, 32, k), 0, extreme=True)

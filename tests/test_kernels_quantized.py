"""q8 and q4 panels against exact integer sums: every group, row count, remainder and extreme value."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.codegen.isa import DOTPROD, NEON
from sylvester.codegen.layout import Format
from sylvester.codegen.linear import record_bytes
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
from sylvester.compiler.target import host_architecture
from tests import emulator
from tests.kernel_harness import export, load, run, supported, team

# p: y, x, packed weight, bias, row records, sizes [record, panel, wide, zero]; i: m, n, k, ldy, group
BODY = """
    int64_t m = i[0], n = i[1], k = i[2], ldy = i[3], group = i[4], *sizes = p[5];
    const float *x = p[1], *bias = p[3];
    char *rows = p[4];
    sizes[0] = sv_%(f)s_row_bytes(k, group), sizes[1] = sv_%(f)s_panel_bytes(k, group);
    sizes[2] = SV_%(F)s_WIDE, sizes[3] = SV_%(F)s_ZERO;
    for (int64_t r = 0; r < m; r++) sv_%(f)s_pack_row(rows + r * sizes[0], x + r * k, k, group);
    for (int64_t col = 0; col < n; col += SV_PANEL) {
        const char *panel = (const char *)p[2] + col / SV_PANEL * sizes[1];
        sv_product o = {rows, sizes[0], panel, (float *)p[0] + col, ldy, m, 0, k, group, bias ? bias + col : NULL};
        o.cols = n - col < SV_PANEL ? n - col : SV_PANEL;
        sv_%(f)s_panel(&o);
    }
"""
HEADERS = "".join(render(f"{part}.h.in") for part in ("qrow", "qtile", "q8", "q4"))
SOURCE = HEADERS + "".join(export(f, BODY % {"f": f, "F": f.upper()}) for f in ("q8", "q4"))
TALL = "#define SV_Q8_ROWS 12\n#define SV_Q8_GROUPED_ROWS 12\n#define SV_Q4_ROWS 12\n"
LOW = "#define SV_Q8_ROWS 1\n#define SV_Q8_GROUPED_ROWS 2\n#define SV_Q4_ROWS 1\n#define SV_Q8_AHEAD 0\n"
FORMATS = [("q8", group) for group in (0, 32, 64, 128)] + [("q4", group) for group in (32, 64, 128)]
SMALLEST = 2.0**-100

ISAS = supported("q8", "q4")
ARM = [] if host_architecture() == "aarch64" or emulator.missing() else [NEON, DOTPROD]
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
each_format = pytest.mark.parametrize(("name", "group"), FORMATS, ids=str)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, kept as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = np.abs(x).max(1, initial=0).astype(np.float32)
    scale = np.where(top < SMALLEST, np.float32(0), top / np.float32(127)).astype(np.float32)
    safe = np.where(scale == 0, np.float32(1), scale)[:, None]
    return np.where(scale[:, None] == 0, 0, np.rint(x / safe)).astype(np.int64), scale


def nibbles(weight: np.ndarray) -> np.ndarray:
    return ((weight[:, ::2] + 8) | (weight[:, 1::2] + 8) << 4).astype(np.uint8)


def pack(name: str, weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return pack_q8(weight.astype(np.int8), scales) if name == "q8" else pack_q4(nibbles(weight), scales)


def multiply(made_of, name, x, packed, bias, n, group):
    """C with two columns to spare, the row records, and the sizes the kernel reports."""
    lib, made = made_of
    m, k = x.shape
    y = np.full((m, n + 2), np.nan, np.float32)
    rows = np.full(m * record_bytes(Format(name, group), k) + 64, 0xEE, np.uint8)
    rows = rows[-rows.ctypes.data % 64 :]
    sizes = np.zeros(4, np.int64)
    assert run(lib, made, name, [m, n, k, n + 2, group], [y, x, packed, bias, rows, sizes]) == 0
    assert sizes[0] <= record_bytes(Format(name, group), k)
    return y, rows[: m * sizes[0]].reshape(m, sizes[0]), sizes


def check(made_of, name: str, shape, group: int, *, extreme: bool = False, biased: bool = True) -> None:
    m, n, k = shape
    rng = np.random.default_rng([m, n, k, group])
    x = rng.standard_normal((m, k), np.float32)
    low, high = (-128, 127) if name == "q8" else (-8, 7)
    weight = rng.choice([low, high], (n, k)) if extreme else rng.integers(low, high + 1, (n, k))
    if extreme:
        x = np.where(weight[rng.integers(0, n, m)] > 0, np.float32(3), np.float32(-3))
    if m:
        x[m // 2] *= m % 3
    scales = rng.uniform(0.01, 1, (n, k // group if group else 1)).astype(np.float32)
    bias = rng.standard_normal(n, np.float32) if biased else None
    y, _, _ = multiply(made_of, name, x, pack(name, weight, scales), bias, n, group)
    (q, scale), seen = quantise(x), (bfloat16(scales) if group else scales).astype(np.float64)
    parts = (k // group, group) if group else (1, k)
    sums = np.einsum("mgk,ngk->mng", q.reshape(m, *parts), weight.reshape(n, *parts)) * seen
    offset = 0 if bias is None else bias.astype(np.float64)
    expected = sums.sum(-1) * scale[:, None] + offset
    terms = np.abs(sums).sum(-1) * scale[:, None] + np.abs(offset)
    assert (np.abs(y[:, :n] - expected) <= 2.0**-23 * (3 + np.sqrt(parts[0])) * terms).all(), (name, shape, group)
    assert np.isnan(y[:, n:]).all()


@each_isa
@each_format
def test_every_row_count(isa, name, group):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for m in range(21):
            check((lib, made), name, (m, (32, 33, 70)[m % 3], 384), group, biased=m % 4 > 0)
            check((lib, made), name, (m, 31, 256), group, extreme=True)


@each_isa
def test_q8_of_any_depth(isa):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for k in (0, 1, 2, 3, 5, 31, 33, 63, 64, 65, 100, 127, 257, 2049):
            check((lib, made), "q8", (k % 7 + 1, k % 40 + 1, k), 0)
            check((lib, made), "q8", (3, 32, k), 0, extreme=True)


@pytest.mark.parametrize("tuned", [TALL, LOW], ids=["tall", "low"])
@each_isa
def test_other_heights_of_tiles(isa, tuned):
    lib = load(tuned + SOURCE, isa)
    with team(lib, 1) as made:
        for name, group in FORMATS:
            for m in (1, 2, 7, 11, 12, 25):
                check((lib, made), name, (m, 45, 256), group)


@pytest.mark.parametrize("isa", ARM, ids=lambda isa: isa.name)
def test_under_emulation(isa):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for name, group in FORMATS:
            for m in (1, 2, 3, 5, 8, 13):
                check((lib, made), name, (m, 35, 256), group, biased=m % 2 > 0)
                check((lib, made), name, (m, 32, 256), group, extreme=True)
        check((lib, made), "q8", (3, 5, 77), 0)


@each_isa
@each_format
def test_row_records(isa, name, group):
    rng = np.random.default_rng(7)
    k = 256 if group else 203
    x = rng.standard_normal((9, k), np.float32) * np.float32(10) ** rng.integers(-20, 20, (9, 1)).astype(np.float32)
    x[3] = 0
    x[4] = rng.uniform(-(2.0**-101), 2.0**-101, k)
    x[5] = np.rint(x[5] / np.abs(x[5]).max() * 254) / 2
    x[5, 0] = 127
    x[6, 100], x[7, 50], x[8, 0] = np.nan, np.inf, -np.inf
    lib = load(SOURCE, isa)
    packed = pack(name, np.zeros((32, k), np.int64), np.ones((32, k // group if group else 1), np.float32))
    with team(lib, 1) as made:
        y, rows, (record, _, wide, zero) = multiply((lib, made), name, x, packed, None, 32, group)
    q, scale = quantise(x[:6])
    groups = k // group if group else 1
    start = 64 + -(-4 * groups // 64) * 64
    values = rows[:, start:].view(np.int16).reshape(9, -1, 4)[:, :, [0, 2, 1, 3]].reshape(9, -1)
    values = values if wide else rows[:, start:].view(np.int8)
    np.testing.assert_array_equal(rows[:6, :4].view(np.float32)[:, 0], scale)
    np.testing.assert_array_equal(values[:6, :k], q)
    assert not values[:, k : -(-k // 4) * 4].any()
    corrections = np.ascontiguousarray(rows[:6, 64 : 64 + 4 * groups]).view(np.int32)
    np.testing.assert_array_equal(corrections, -zero * q.reshape(6, groups, -1).sum(2))
    assert record % 64 == 0
    assert np.isnan(y[6:, :32]).all()


@pytest.mark.parametrize("isa", ISAS[:1], ids=lambda isa: isa.name)
@each_format
def test_places_of_weights_and_scales(isa, name, group):
    rng = np.random.default_rng(3)
    n, k = 75, 384 if group else 101
    weight = rng.integers(-128, 128, (n, k)) if name == "q8" else rng.integers(-8, 8, (n, k))
    scales = rng.uniform(0.01, 1, (n, k // group if group else 1)).astype(np.float32)
    packed = pack(name, weight, scales)
    flat, (row, column) = packed.reshape(-1), np.indices((n, k))
    if name == "q8":
        found, at = flat[place_q8(row, column, k, group)].astype(int) - 128, scale_place_q8(row, column, k, group)
    else:
        place, shift = place_q4(row, column, k, group)
        found, at = (flat[place] >> shift & 15).astype(int) - 8, scale_place_q4(row, column, k, group)
    np.testing.assert_array_equal(found, weight)
    width, kind = (2, np.uint16) if group else (4, np.float32)
    stored = flat[at[..., None] + np.arange(width)].view(kind)[..., 0]
    stored = (stored.astype(np.uint32) << 16).view(np.float32) if group else stored
    np.testing.assert_array_equal(stored, np.repeat(bfloat16(scales) if group else scales, group or k, 1))
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        _, _, sizes = multiply((lib, made), name, np.ones((1, k), np.float32), packed, None, n, group)
    assert packed.shape == (3, sizes[1])
    assert sizes[1] == (panel_bytes_q8 if name == "q8" else panel_bytes_q4)(k, group)


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (np.zeros((4, 64), np.uint8), np.ones((4, 1), np.float32), "int8"),
        (np.zeros(64, np.int8), np.ones((4, 1), np.float32), "int8"),
        (np.zeros((4, 64), np.int8), np.ones((4, 1)), "scales"),
        (np.zeros((4, 64), np.int8), np.ones((3, 2), np.float32), "scales"),
        (np.zeros((4, 96), np.int8), np.ones((4, 2), np.float32), "groups"),
        (np.zeros((4, 64), np.int8), np.full((4, 2), np.inf, np.float32), "finite"),
    ],
)
def test_pack_q8_refuses(weight, scales, message):
    with pytest.raises(ValueError, match=message):
        pack_q8(weight, scales)


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (np.zeros((4, 64), np.int8), np.ones((4, 2), np.float32), "uint8"),
        (np.zeros((4, 128), np.uint8), np.ones((4, 1), np.float32), "groups"),
        (np.zeros((4, 64), np.uint8), np.ones((4, 0), np.float32), "groups"),
    ],
)
def test_pack_q4_refuses(weight, scales, message):
    with pytest.raises(ValueError, match=message):
        pack_q4(weight, scales)

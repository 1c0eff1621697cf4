"""q8, q4 and q3 panels against exact integer sums: every group, number and kind of rows, remainder, extreme value."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.codegen.formats import panel_bytes, quantised_headers
from sylvester.codegen.isa import DOTPROD, NEON
from sylvester.codegen.layout import Format
from sylvester.codegen.linear import record_bytes
from sylvester.codegen.panels import pack_q3, pack_q4, pack_q8
from sylvester.codegen.quantized import (
    group_of,
    place_q3,
    place_q4,
    place_q8,
    scale_place_q3,
    scale_place_q4,
    scale_place_q8,
)
from sylvester.compiler.target import host_architecture
from tests import emulator
from tests.kernel_harness import export, load, run, supported, team

# p: y, x, packed weight, bias, row records, sizes [record, panel, wide, zero], step; i: m, n, k, ldy, group, bits
BODY = """
    int64_t m = i[0], n = i[1], k = i[2], ldy = i[3], group = i[4], bits = i[5], *sizes = p[5];
    const float *x = p[1], *bias = p[3];
    char *rows = p[4];
    sizes[0] = sv_%(f)s_row_bytes(k, group), sizes[1] = sv_%(f)s_panel_bytes(k, group);
    sizes[2] = SV_%(F)s_WIDE, sizes[3] = SV_%(F)s_ZERO;
    int64_t record = sizes[0] * (bits == 16 ? 2 : 1);
    for (int64_t r = 0; r < m; r++) sv_%(f)s_pack_row(rows + r * record, x + r * k, k, group, bits, p[6]);
    for (int64_t col = 0; col < n; col += SV_PANEL) {
        const char *panel = (const char *)p[2] + col / SV_PANEL * sizes[1];
        sv_product o = {rows, sizes[0], panel, (float *)p[0] + col, ldy, m, 0, k, group, bias ? bias + col : NULL};
        o.cols = n - col < SV_PANEL ? n - col : SV_PANEL;
        if (bits == 16) sv_q_twice(&o, sv_%(f)s_panel);
        else sv_%(f)s_panel(&o);
    }
"""
NAMES = ("q8", "q4", "q3")
HEADERS = "".join(quantised_headers(NAMES))
SOURCE = HEADERS + "".join(export(f, BODY % {"f": f, "F": f.upper()}) for f in NAMES)
TALL = "".join(f"#define SV_{f}_ROWS 12\n" for f in ("Q8", "Q8_GROUPED", "Q4", "Q3"))
LOW = "".join(f"#define SV_{f}_ROWS 1\n" for f in ("Q8", "Q4", "Q3"))
LOW += "#define SV_Q8_GROUPED_ROWS 2\n#define SV_Q8_AHEAD 0\n#define SV_Q3_AHEAD 0\n"
FORMATS = [("q8", 0), *((name, group) for name in NAMES for group in (32, 64, 128))]
ROWS = ((8, False), (4, False), (16, False), (8, True), (4, True))
"""Bits of the numbers of a row, and whether its scale is given."""
PACKS = {"q8": pack_q8, "q4": pack_q4, "q3": pack_q3}
LIMITS = {"q8": 128, "q4": 8, "q3": 4}
SMALLEST = 2.0**-100

ISAS = supported(*NAMES)
ARM = [] if host_architecture() == "aarch64" or emulator.missing() else [NEON, DOTPROD]
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
each_format = pytest.mark.parametrize(("name", "group"), FORMATS, ids=str)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, kept as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def divided(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Whole numbers of x over the scale of each row; 0 where that is 0."""
    safe = np.where(scale == 0, np.float32(1), scale)[:, None]
    return np.where(scale[:, None] == 0, 0, np.rint(x / safe)).astype(np.int64)


def quantise(x: np.ndarray, bits: int = 8, step: float | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The records of rows: numbers and scales, two of each for rows of 16 bits."""
    most = np.float32(7 if bits == 4 else 127)
    if step is not None:
        scale = np.full(len(x), step, np.float32)
        return [(np.clip(divided(x, scale), -int(most), int(most)), scale)]
    top = np.abs(x).max(1, initial=0).astype(np.float32)
    scale = np.where(top < SMALLEST, np.float32(0), top / most).astype(np.float32)
    q = divided(x, scale)
    if bits != 16:
        return [(q, scale)]
    rest, second = (x - q * scale[:, None].astype(np.float64)).astype(np.float32), scale / np.float32(254)
    return [(q, scale), (divided(rest, second), second)]


def stored(name: str, weight: np.ndarray) -> np.ndarray:
    """Whole numbers as the ops store them."""
    if name == "q8":
        return weight.astype(np.int8)
    if name == "q4":
        return ((weight[:, ::2] + 8) | (weight[:, 1::2] + 8) << 4).astype(np.uint8)
    bits = np.unpackbits((weight + 4).astype(np.uint8)[..., None], axis=2, bitorder="little")[..., :3]
    planes = bits[..., :2].reshape(len(weight), -1), bits[..., 2]
    return np.concatenate([np.packbits(plane, 1, "little") for plane in planes], 1)


def pack(name: str, weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return PACKS[name](stored(name, weight), scales)


def multiply(made_of, name, x, packed, bias, n, group, bits=8, step=None):
    """C with two columns to spare, the row records, and the sizes the kernel reports."""
    lib, made = made_of
    m, k = x.shape
    form = Format(name, group, bits)
    y = np.full((m, n + 2), np.nan, np.float32)
    rows = np.full(m * record_bytes(form, k) + 64, 0xEE, np.uint8)
    rows = rows[-rows.ctypes.data % 64 :]
    sizes = np.zeros(4, np.int64)
    scale = None if step is None else np.array([step], np.float32)
    assert run(lib, made, name, [m, n, k, n + 2, group, bits], [y, x, packed, bias, rows, sizes, scale]) == 0
    assert sizes[0] * form.records <= record_bytes(form, k)
    return y, rows[: m * form.records * sizes[0]].reshape(m * form.records, sizes[0]), sizes


def by_group(values: np.ndarray, group: int) -> np.ndarray:
    """[rows, k] -> [rows, groups, group], filled with zeros."""
    rows, k = values.shape
    size = group or max(1, k)
    groups = -(-k // size) if group else 1
    return np.pad(values, ((0, 0), (0, groups * size - k))).reshape(rows, groups, size)


def check(made_of, name, shape, group, *, rows=ROWS[0], extreme=False, biased=True, whole=False) -> None:
    m, n, k = shape
    (bits, static), rng = rows, np.random.default_rng([m, n, k, group])
    x = rng.standard_normal((m, k), np.float32)
    low, high = -LIMITS[name], LIMITS[name] - 1
    weight = rng.choice([low, high], (n, k)) if extreme else rng.integers(low, high + 1, (n, k))
    if extreme:
        x = np.where(weight[rng.integers(0, n, m)] > 0, np.float32(3), np.float32(-3))
    if m:
        x[m // 2] *= m % 3
    step = 0.8 / (7 if bits == 4 else 127) if static else None
    groups = 1 if whole else by_group(weight, group).shape[1]
    group = group_of(k, groups, whole=name == "q8")
    scales = rng.uniform(0.01, 1, (n, groups)).astype(np.float32)
    bias = rng.standard_normal(n, np.float32) if biased else None
    y, _, _ = multiply(made_of, name, x, pack(name, weight, scales), bias, n, group, bits, step)
    seen, offset = (bfloat16(scales) if group else scales).astype(np.float64), 0 if bias is None else bias.astype(float)
    expected, terms = np.zeros((m, n)) + offset, np.zeros((m, n)) + np.abs(offset)
    for q, scale in quantise(x, bits, step):
        sums = np.einsum("mgk,ngk->mng", by_group(q, group), by_group(weight, group)) * seen * scale[:, None, None]
        expected, terms = expected + sums.sum(-1), terms + np.abs(sums).sum(-1)
    slack = 2.0**-23 * (3 + np.sqrt(k // group if group else 1)) * terms
    if bits == 16:  # where the remainder of a value is half a step, the kernel may round it to the other side
        slack = slack + np.abs(scale[:, None]) * np.abs(weight).max(initial=0) * seen.max(initial=0)
    assert (np.abs(y[:, :n] - expected) <= slack).all(), (name, shape, group, rows)
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
@each_format
def test_every_kind_of_rows(isa, name, group):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for rows in ROWS:
            for m in (0, 1, 2, 3, 5, 9, 49, 97):
                check((lib, made), name, (m, (32, 33, 7)[m % 3], 384), group, rows=rows, biased=m % 2 > 0)
            check((lib, made), name, (5, 40, 256), group, rows=rows, extreme=True)


@each_isa
def test_last_groups_that_are_shorter(isa):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for name, group in FORMATS[1:]:
            for k in (8, 40, 48, 104, 120, 136, 328):
                for rows in (ROWS[0], ROWS[2]):
                    check((lib, made), name, (k % 7 + 1, k % 40 + 1, k), group, rows=rows)
        check((lib, made), "q8", (3, 33, 99), 32)
        check((lib, made), "q4", (3, 33, 98), 64)


@each_isa
def test_one_scale_per_row_of_few_bits(isa):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for name in ("q4", "q3"):
            check((lib, made), name, (3, 40, 328), 128, whole=True)


@each_isa
def test_q8_of_any_depth(isa):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for k in (0, 1, 2, 3, 5, 31, 33, 63, 64, 65, 100, 127, 257, 2049):
            check((lib, made), "q8", (k % 7 + 1, k % 40 + 1, k), 0, rows=ROWS[k % 5])
            check((lib, made), "q8", (3, 32, k), 0, extreme=True)


@pytest.mark.parametrize("tuned", [TALL, LOW], ids=["tall", "low"])
@each_isa
def test_other_heights_of_tiles(isa, tuned):
    lib = load(tuned + SOURCE, isa)
    with team(lib, 1) as made:
        for name, group in FORMATS:
            for m in (1, 2, 7, 11, 12, 25):
                check((lib, made), name, (m, 45, 256), group, rows=ROWS[m % 3])


@pytest.mark.parametrize("isa", ARM, ids=lambda isa: isa.name)
def test_under_emulation(isa):
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        for name, group in FORMATS:
            for m in (1, 2, 3, 5, 8, 13):
                check((lib, made), name, (m, 35, 256), group, rows=ROWS[m % 5], biased=m % 2 > 0)
                check((lib, made), name, (m, 32, 256), group, extreme=True)
        check((lib, made), "q8", (3, 5, 77), 0)
        check((lib, made), "q3", (3, 5, 104), 64, rows=ROWS[2])


@pytest.mark.parametrize("bits", [8, 4, 16])
@each_isa
@each_format
def test_row_records(isa, name, group, bits):
    rng = np.random.default_rng(7)
    k, records = 264 if group else 203, 1 + (bits == 16)
    x = rng.standard_normal((9, k), np.float32) * np.float32(10) ** rng.integers(-20, 20, (9, 1)).astype(np.float32)
    x[3] = 0
    x[4] = rng.uniform(-(2.0**-101), 2.0**-101, k)
    x[5] = np.rint(x[5] / np.abs(x[5]).max() * 254) / 2
    x[5, 0] = 127
    x[6, 100], x[7, 50], x[8, 0] = np.nan, np.inf, -np.inf
    lib = load(SOURCE, isa)
    weight = np.zeros((32, k), np.int64)
    packed = pack(name, weight, np.ones((32, by_group(weight, group).shape[1]), np.float32))
    with team(lib, 1) as made:
        y, rows, (record, _, wide, zero) = multiply((lib, made), name, x, packed, None, 32, group, bits)
    groups = -(-k // group) if group else 1
    start = 64 + -(-4 * groups // 64) * 64
    for number, (q, scale) in enumerate(quantise(x[:6], bits)):
        mine = np.ascontiguousarray(rows[number::records])
        values = mine[:, start:].view(np.int16).reshape(9, -1, 4)[:, :, [0, 2, 1, 3]].reshape(9, -1)
        values = values if wide else mine[:, start:].view(np.int8)
        np.testing.assert_array_equal(mine[:6, :4].view(np.float32)[:, 0], scale)
        assert (np.abs(values[:6, :k] - q) <= number).all()  # of a remainder, half a step may go either way
        assert (values[:6, :k] != q).mean() <= number / 100
        assert not values[:, k : -(-k // (group or 4)) * (group or 4)].any()
        corrections = np.ascontiguousarray(mine[:6, 64 : 64 + 4 * groups]).view(np.int32)
        np.testing.assert_array_equal(corrections, -zero * by_group(values[:6, :k].astype(int), group).sum(2))
    assert record % 64 == 0
    assert np.isnan(y[6:, :32]).all()


@pytest.mark.parametrize("bits", [8, 4])
@each_isa
def test_rows_of_a_stored_scale(isa, bits):
    lib, k, most = load(SOURCE, isa), 70, 7 if bits == 4 else 127
    x = np.zeros((4, k), np.float32)
    x[0, :6] = 0.25 * np.array([0.5, 1.5, -2.5, most, -most - 0.4, 0])
    x[0, 64:68] = [1e30, -1e30, np.inf, -np.inf]
    x[1, 69], x[2, 0] = np.nan, 1
    packed = pack("q8", np.eye(k, dtype=np.int64), np.ones((k, 1), np.float32))
    with team(lib, 1) as made:
        y, _, _ = multiply((lib, made), "q8", x, packed, None, k, 0, bits, 0.25)
        zero, _, _ = multiply((lib, made), "q8", x[:1], packed, None, k, 0, bits, 0.0)
    np.testing.assert_array_equal(y[0, :6] / 0.25, [0, 2, -2, most, -most, 0])
    np.testing.assert_array_equal(y[0, 64:68] / 0.25, [most, -most, most, -most])
    assert np.isnan(y[1, :k]).all()
    assert y[2, 0] == min(4, most) * 0.25
    assert not y[3, :k].any()
    assert not zero[0, :k].any()


@pytest.mark.parametrize("isa", ISAS[:1], ids=lambda isa: isa.name)
@pytest.mark.parametrize("k", [384, 328])
@each_format
def test_places_of_weights_and_scales(isa, name, group, k):
    rng = np.random.default_rng(3)
    n, k = 75, k if group else 101
    weight = rng.integers(-LIMITS[name], LIMITS[name], (n, k))
    scales = rng.uniform(0.01, 1, (n, -(-k // group) if group else 1)).astype(np.float32)
    packed = pack(name, weight, scales)
    flat, (row, column) = packed.reshape(-1), np.indices((n, k))
    if name == "q8":
        found, at = flat[place_q8(row, column, k, group)].astype(int), scale_place_q8(row, column, k, group)
    elif name == "q4":
        place, shift = place_q4(row, column, k, group)
        found, at = (flat[place] >> shift & 15).astype(int), scale_place_q4(row, column, k, group)
    else:
        places = place_q3(row, column, k, group)
        found = sum((flat[place] >> shift & 1).astype(int) << bit for bit, (place, shift) in enumerate(places))
        at = scale_place_q3(row, column, k, group)
    np.testing.assert_array_equal(found - LIMITS[name], weight)
    width, kind = (2, np.uint16) if group else (4, np.float32)
    held = flat[at[..., None] + np.arange(width)].view(kind)[..., 0]
    held = (held.astype(np.uint32) << 16).view(np.float32) if group else held
    np.testing.assert_array_equal(held, np.repeat(bfloat16(scales) if group else scales, group or k, 1)[:, :k])
    lib = load(SOURCE, isa)
    with team(lib, 1) as made:
        _, _, sizes = multiply((lib, made), name, np.ones((1, k), np.float32), packed, None, n, group)
    assert packed.shape == (3, sizes[1])
    assert sizes[1] == panel_bytes(Format(name, group), k)


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (np.zeros((4, 64), np.uint8), np.ones((4, 1), np.float32), "int8"),
        (np.zeros(64, np.int8), np.ones((4, 1), np.float32), "int8"),
        (np.zeros((4, 64), np.int8), np.ones((4, 1)), "scales"),
        (np.zeros((4, 64), np.int8), np.ones((3, 2), np.float32), "scales"),
        (np.zeros((4, 96), np.int8), np.ones((4, 4), np.float32), "groups"),
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
        (np.zeros((4, 128), np.uint8), np.ones((4, 3), np.float32), "groups"),
        (np.zeros((4, 64), np.uint8), np.ones((4, 0), np.float32), "groups"),
    ],
)
def test_pack_q4_refuses(weight, scales, message):
    with pytest.raises(ValueError, match=message):
        pack_q4(weight, scales)


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (np.zeros((4, 48), np.int8), np.ones((4, 1), np.float32), "uint8"),
        (np.zeros((4, 49), np.uint8), np.ones((4, 1), np.float32), "3 k / 8"),
        (np.zeros((4, 48), np.uint8), np.ones((4, 3), np.float32), "groups"),
        (np.zeros((4, 48), np.uint8), np.full((4, 1), np.nan, np.float32), "finite"),
    ],
)
def test_pack_q3_refuses(weight, scales, message):
    with pytest.raises(ValueError, match=message):
        pack_q3(weight, scales)

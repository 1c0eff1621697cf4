"""Tile kernels of bf16, q8, q4, q3: on AMX where there is some, else on emulated tiles, which trap on a bad shape."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.codegen.bfloat16 import bf16_bits, bf16_values, header, pack_bf16
from sylvester.codegen.formats import quantised_headers
from sylvester.codegen.isa import AMX, Isa
from sylvester.codegen.prelude import render
from tests.kernel_harness import export, load, run, supported, team
from tests.test_kernels_quantized import by_group, pack

BF16 = """
    int64_t m = i[0], n = i[1], k = i[2], ldy = i[3], row_bytes = sv_bf16_row_bytes(k, 0);
    const float *x = p[1], *bias = p[3];
    for (int64_t r = 0; r < m; r++) sv_bf16_pack_row((char *)p[4] + r * row_bytes, x + r * k, k, 0);
    for (int64_t col = 0; col < n; col += SV_PANEL) {
        const char *panel = (const char *)p[2] + col / SV_PANEL * sv_bf16_panel_bytes(k, 0);
        sv_product o = {p[4], row_bytes, panel, (float *)p[0] + col, ldy, m, 0, k, 0, bias ? bias + col : NULL};
        o.cols = n - col < SV_PANEL ? n - col : SV_PANEL;
        sv_amx_bf16_panel(&o);
    }
"""
QUANTIZED = """
    int64_t m = i[0], n = i[1], k = i[2], ldy = i[3], group = i[4], bits = i[5];
    int64_t row_bytes = sv_q_row_bytes(k, group, 0);
    const float *x = p[1], *bias = p[3];
    for (int64_t r = 0; r < m; r++)
        sv_q_pack_row((char *)p[4] + r * row_bytes, x + r * k, k, group, 1 << (bits - 1), 0, 8, NULL);
    for (int64_t col = 0; col < n; col += SV_PANEL) {
        const char *panel = (const char *)p[2] + col / SV_PANEL * i[6];
        sv_product o = {p[4], row_bytes, panel, (float *)p[0] + col, ldy, m, 0, k, group, bias ? bias + col : NULL};
        o.cols = n - col < SV_PANEL ? n - col : SV_PANEL;
        if (bits == 8) sv_amx_q8_panel(&o);
        else if (bits == 4) sv_amx_q4_panel(&o);
        else sv_amx_q3_panel(&o);
    }
    memcpy(p[5], (int64_t[]){row_bytes, sv_q_values(k, group)}, 16);
"""
EMULATE = "#define SV_AMX_EMULATE 1\n"
DOT = "#define SV_BF16_DOT 1\n"


def _builds() -> list[tuple[Isa, str]]:
    """The instructions themselves, or every variant with emulated ones; with few steps per pass, k takes several."""
    found = supported("bf16", "q8", "q4")
    builds = [(AMX, "")] if AMX in found else [(isa, EMULATE + DOT) for isa in found]
    return [*builds, (builds[-1][0], builds[-1][1] + "#define SV_AMX_STEPS 3\n")]


def _name(value: object) -> str:
    return value.name if isinstance(value, Isa) else "passes" if "STEPS" in str(value) else "one-pass"


each_build = pytest.mark.parametrize(("isa", "text"), _builds(), ids=_name)


def library(isa: Isa, text: str):
    parts = [text, render("amx.h.in"), render("amx_panel.h.in"), header(isa), *quantised_headers(("q8",))]
    return load("".join([*parts, export("bf16", BF16), export("quantized", QUANTIZED)]), isa)


def sample(rng: np.random.Generator, m: int, n: int, k: int):
    """x with a zero row, y of NaNs with two columns more, and room for the row records."""
    x = rng.standard_normal((m, k), np.float32)
    x[m // 2] *= m % 3
    return x, np.full((m, n + 2), np.nan, np.float32), np.full((m, 5 * k + 768), 0xEE, np.uint8)


@each_build
def test_bf16(isa, text):
    rng = np.random.default_rng(0)
    lib = library(isa, text)
    shapes = [(m, 33, 70) for m in (1, 2, 8, 15, 16, 17, 31, 32, 33, 48, 65)]
    shapes += [(20, 64, k) for k in (0, 1, 2, 31, 32, 33, 63, 64, 65, 257, 600)] + [
        (40, 1, 97),
        (33, 64, 224),
        (65, 33, 331),
    ]
    with team(lib, 1) as made:
        for m, n, k in shapes:
            x, y, rows = sample(rng, m, n, k)
            weight, bias = bf16_bits(rng.standard_normal((n, k), np.float32)), rng.standard_normal(n, np.float32)
            offset = bias if m % 4 else None
            run(lib, made, "bf16", [m, n, k, n + 2], [y, x, pack_bf16(weight), offset, rows])
            left, right = bf16_values(bf16_bits(x)).astype(np.float64), bf16_values(weight).T.astype(np.float64)
            expected = left @ right + (0 if offset is None else offset)
            bound = 2e-7 * (2 + np.sqrt(k)) * (np.abs(left) @ np.abs(right)) + 1e-6
            assert (np.abs(y[:, :n] - expected) <= bound).all(), (m, n, k)
            assert np.isnan(y[:, n:]).all()


def quantized(rng: np.random.Generator, bits: int, n: int, k: int, group: int):
    """Integer weights, their scales as the kernel sees them [n, groups], and the packed tensor."""
    w = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k))
    scales = rng.uniform(0.01, 1, (n, -(-k // group) if group else 1)).astype(np.float32)
    scales = bf16_values(bf16_bits(scales)) if group else scales
    return w, scales, pack(f"q{bits}", w, scales)


def check_quantized(lib, made, bits: int, shape: tuple[int, int, int], group: int) -> None:
    """Against exact integer sums of what the row records hold."""
    m, n, k = shape
    rng = np.random.default_rng([bits, m, n, k, group])
    x, y, rows = sample(rng, m, n, k)
    w, scales, packed = quantized(rng, bits, n, k, group)
    bias, sizes = rng.standard_normal(n, np.float32) if m % 4 else None, np.zeros(2, np.int64)
    run(lib, made, "quantized", [m, n, k, n + 2, group, bits, packed.shape[1]], [y, x, packed, bias, rows, sizes])
    records = rows.reshape(-1)[: m * sizes[0]].reshape(m, sizes[0])
    q = records[:, sizes[1] : sizes[1] + k].view(np.int8).astype(np.int64)
    scale = np.ascontiguousarray(records[:, :4]).view(np.float32).astype(np.float64)
    sums = np.einsum("mgk,ngk->mng", by_group(q, group), by_group(w, group)) * scales.astype(np.float64)
    exact, terms = sums.sum(-1) * scale, np.abs(sums).sum(-1) * scale
    expected, terms = (exact, terms) if bias is None else (exact + bias, terms + np.abs(bias))
    assert (np.abs(y[:, :n] - expected) <= 2.0**-23 * (3 + np.sqrt(sums.shape[-1])) * terms).all(), (shape, group)
    assert np.isnan(y[:, n:]).all()


@each_build
@pytest.mark.parametrize(("bits", "group"), [(8, 0), *((bits, group) for bits in (8, 4, 3) for group in (32, 64, 128))])
def test_quantized(isa, text, bits, group):
    lib = library(isa, text)
    with team(lib, 1) as made:
        for m in (1, 8, 15, 16, 17, 32, 33, 50):
            check_quantized(lib, made, bits, (m, (32, 33, 70, 7)[m % 4], (384, 328)[m % 2]), group)


@each_build
def test_q8_of_any_depth(isa, text):
    lib = library(isa, text)
    with team(lib, 1) as made:
        for k in (1, 3, 4, 63, 64, 65, 100, 191, 257):
            check_quantized(lib, made, 8, (k % 40 + 1, k % 37 + 1, k), 0)

"""The bf16 linear format against float64 with bf16 operands, on shapes with every kind of remainder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sylvester.codegen.bfloat16 import bf16_bits, bf16_values, header, offset_bf16, pack_bf16, panel_bytes_bf16
from sylvester.codegen.isa import Isa
from tests.kernel_harness import export, load, run, supported, team

BODY = """
    int64_t m = i[0], n = i[1], k = i[2], ldy = i[3], row_bytes = sv_bf16_row_bytes(k, 0);
    const float *x = p[1], *bias = p[3];
    char *rows = p[4];
    for (int64_t r = 0; r < m; r++) sv_bf16_pack_row(rows + r * row_bytes, x + r * k, k, 0);
    for (int64_t col = 0; col < n; col += SV_PANEL) {
        const char *panel = (const char *)p[2] + col / SV_PANEL * sv_bf16_panel_bytes(k, 0);
        sv_product o = {rows, row_bytes, panel, (float *)p[0] + col, ldy, m, 0, k, 0, bias ? bias + col : NULL};
        o.cols = n - col < SV_PANEL ? n - col : SV_PANEL;
        sv_bf16_panel(&o);
    }
"""
SHAPES = [(m, 33, 67) for m in range(1, 21)] + [(1, 1, 1), (1, 64, 3), (3, 31, 2), (2, 95, 1031), (40, 40, 2049)]
SHAPES += [(13, 32, 32), (25, 7, 1), (4, 5, 0), (29, 64, 1100), (0, 32, 8)]


def _variants() -> list[tuple[Isa, str]]:
    """Every build this CPU runs: as it is, rounding or widening against its habit, with several passes over k."""
    return [
        (isa, text)
        for isa in supported("bf16")
        for text in ("", f"#define SV_BF16_DOT {int(not _rounds_rows(isa, ''))}\n", "#define SV_BF16_KC 96\n")
    ]


def _rounds_rows(isa: Isa, text: str) -> bool:
    return "DOT 1" in text or ("avx512bf16" in isa.features and "DOT 0" not in text)


def _name(value: object) -> str:
    return value.name if isinstance(value, Isa) else str(value)[8:].strip().replace(" ", "_") or "default"


def bound(k: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A float32 dot product is off by at most about k eps sum |a b|; rounding errors grow with the root of k."""
    return 2e-7 * (2 + np.sqrt(k)) * (np.abs(left) @ np.abs(right)) + 1e-6


def _rounded(x: np.ndarray) -> np.ndarray:
    return bf16_values(bf16_bits(x))


@pytest.mark.parametrize(("isa", "text"), _variants(), ids=_name)
def test_panels(isa, text):
    rng = np.random.default_rng(0)
    lib = load(text + header(isa) + export("bf16", BODY), isa)
    with team(lib, 1) as made:
        for m, n, k in SHAPES:
            x, bias = rng.standard_normal((m, k), np.float32), rng.standard_normal(n, np.float32)
            weight = bf16_bits(rng.standard_normal((n, k), np.float32))
            rows = np.full((m, 4 * k + 256), 0xFF, np.uint8)
            for offset in (None, bias):
                y = np.full((m, n + 3), np.nan, np.float32)
                run(lib, made, "bf16", [m, n, k, n + 3], [y, x, pack_bf16(weight), offset, rows])
                left = (_rounded(x) if _rounds_rows(isa, text) else x).astype(np.float64)
                right = bf16_values(weight).T.astype(np.float64)
                expected = left @ right + (0 if offset is None else offset)
                assert (np.abs(y[:, :n] - expected) <= bound(k, left, right)).all(), (m, n, k)
                assert np.isnan(y[:, n:]).all()


def test_rounding_is_that_of_torch():
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [
            rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32),
            np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 1], np.uint32).view(
                np.float32
            ),
        ]
    )
    number = ~np.isnan(x)

    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.uint16).numpy()

    np.testing.assert_array_equal(bf16_bits(x)[number], expected[number])
    assert np.isnan(bf16_values(bf16_bits(x)[~number])).all()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 7), (64, 12)])
def test_offset_finds_every_element(n, k):
    weight = np.arange(1, n * k + 1, dtype=np.uint16).reshape(n, k)
    rows, columns = np.indices((n, k))

    packed = pack_bf16(weight)

    assert packed.nbytes == -(-n // 32) * panel_bytes_bf16(k)
    np.testing.assert_array_equal(packed.reshape(-1)[offset_bf16(rows, columns, k)], weight)
    assert packed.astype(np.int64).sum() == weight.astype(np.int64).sum()


def test_pack_refuses_floats():
    with pytest.raises(ValueError, match="uint16 with 2 axes, got float32"):
        pack_bf16(np.zeros((2, 2), np.float32))

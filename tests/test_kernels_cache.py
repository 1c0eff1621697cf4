"""Rotary embedding and the key/value cache write."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sylvester.codegen.bfloat16 import bf16_bits
from sylvester.codegen.kv_update import kv_update
from sylvester.codegen.rope import rope, rope_header
from tests.kernel_harness import export, load, run, strides, supported, team

FORMS = [(8, 8, False, False), (8, 8, False, True), (10, 6, True, False), (10, 6, True, True), (64, 64, False, False)]
SOURCE = (
    rope_header()
    + "".join(
        rope(f"rope{n}", d, rotary, interleaved=pairs, half=half) + export(f"rope{n}", f"rope{n}(t, p[0]);")
        for n, (d, rotary, pairs, half) in enumerate(FORMS)
    )
    + kv_update("update")
    + kv_update("rounded", "bf16")
    + export("rounded", "rounded_past(t, p[0], p[1], p[2], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7]);")
    + export("update", "update(t, p[0], p[1], i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], 42);")
)


class RopeArgs(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("y", "x", "cos", "sin")]
        + [(name, ctypes.c_int64) for name in ("batch", "heads", "rows")]
        + [("y_stride", ctypes.c_int64 * 3), ("x_stride", ctypes.c_int64 * 3)]
        + [("cos_stride", ctypes.c_int64 * 2), ("sin_stride", ctypes.c_int64 * 2)]
    )


def rotate(x, angle, rotary, interleaved):
    """x as complex pairs times e^(i angle), in float64; angle [batch, rows, rotary / 2]."""
    head = x[..., :rotary].astype(np.float64)
    u, v = (head[..., ::2], head[..., 1::2]) if interleaved else np.split(head, 2, -1)
    turned = (u + 1j * v) * np.exp(1j * angle)[:, None]
    halves = (turned.real, turned.imag)
    mixed = np.stack(halves, -1).reshape(head.shape) if interleaved else np.concatenate(halves, -1)
    return np.concatenate([mixed, x[..., rotary:]], -1)


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_rope(isa, form):
    d, rotary, interleaved, half = FORMS[form]
    rng = np.random.default_rng(form)
    x = rng.standard_normal((2, 5, 3, d), np.float32).swapaxes(1, 2)
    angle = rng.uniform(-9, 9, (2, 5, rotary // 2))
    full = angle if half else np.repeat(angle, 2, -1) if interleaved else np.concatenate([angle, angle], -1)
    cos, sin = np.cos(full).astype(np.float32), np.sin(full).astype(np.float32)
    expected = rotate(x, angle, rotary, interleaved)
    lib = load(SOURCE, isa)
    for y in (np.full((2, 3, 5, d), np.nan, np.float32), x):
        pointers = [a.ctypes.data for a in (y, x, cos, sin)]
        steps = [(ctypes.c_int64 * n)(*strides(a, n)) for a, n in ((y, 3), (x, 3), (cos, 2), (sin, 2))]
        args = RopeArgs(*pointers, 2, 3, 5, *steps)
        with team(lib, 2) as made:
            assert run(lib, made, f"rope{form}", [], [np.frombuffer(args, np.uint8)]) == 0
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)


def test_odd_rotary_size_is_refused():
    with pytest.raises(ValueError, match="even"):
        rope("r", 9)


def test_cache_rows_are_written_in_place():
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, 3, 10, 5), np.float32)
    new = rng.standard_normal((2, 4, 3, 5), np.float32).swapaxes(1, 2)
    expected = cache.copy()
    expected[:, :, 6:10] = new
    lib = load(SOURCE, supported()[0])
    with team(lib, 2) as made:
        assert run(lib, made, "update", [2, 3, 4, 5, 10, 6, *strides(new, 3)], [cache, new]) == 0

    np.testing.assert_array_equal(cache, expected)


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_rows_are_rounded_into_a_bf16_cache(isa):
    rng = np.random.default_rng(0)
    cache = rng.integers(0, 2**16, (2, 3, 10, 21), np.uint16)
    new = rng.standard_normal((2, 4, 3, 21), np.float32).swapaxes(1, 2)
    new[0, 0, :, :8] = [0.0, -0.0, np.inf, -np.inf, 3.4e38, 1.00390625, 1.01171875, 1e-40]
    expected = cache.copy()
    expected[:, :, 6:10] = bf16_bits(new)
    new[0, 0, 0, 8] = np.nan
    lib, sizes = load(SOURCE, isa), [2, 3, 4, 21, 10, *strides(new, 3)]
    with team(lib, 2) as made:
        assert run(lib, made, "rounded", sizes, [cache, new, np.array(6)]) == 0
        written = cache.copy()
        for outside in (-1, 7):
            assert run(lib, made, "rounded", sizes, [cache, new, np.array(outside)]) == 1
            assert lib.sv_team_error_value(made) == outside

    assert np.isnan((written[0, 0, 6, 8].astype(np.uint32) << 16).view(np.float32))
    written[0, 0, 6, 8] = expected[0, 0, 6, 8]
    np.testing.assert_array_equal(written, expected)
    np.testing.assert_array_equal(np.delete(cache.ravel(), 6 * 21 + 8), np.delete(expected.ravel(), 6 * 21 + 8))


def test_cache_overflow_is_an_error_and_writes_nothing():
    cache, new = np.zeros((1, 1, 4, 2), np.float32), np.ones((1, 1, 2, 2), np.float32)
    lib = load(SOURCE, supported()[0])
    with team(lib, 2) as made:
        assert run(lib, made, "update", [1, 1, 2, 2, 4, 3, *strides(new, 3)], [cache, new]) == 42
        assert lib.sv_team_error_value(made) == 5

    assert not cache.any()

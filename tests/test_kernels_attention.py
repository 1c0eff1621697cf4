"""attention against a float64 reference: grouped heads, causal limits, windows, masks, odd sizes, decode."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sylvester.codegen.attention import attention, attention_header
from tests.kernel_harness import export, load, run, strides, supported, team

DIMS = [(64, 64), (7, 5), (40, 33)]
MASKS = ("none", "float", "bool")
SOURCE = attention_header() + "".join(
    attention(f"att_{d}_{v}_{mask}", d, v, mask)
    + export(f"att_{d}_{v}_{mask}", f"att_{d}_{v}_{mask}(t, p[0]);", f"att_{d}_{v}_{mask}_scratch")
    for d, v in DIMS
    for mask in MASKS
)
# batch, heads, key heads, queries, cache rows, valid keys, causal, offset, window
CASES = [
    (1, 2, 2, 5, 5, 5, 1, 0, 0),
    (2, 4, 2, 37, 64, 40, 1, 3, 0),
    (1, 3, 1, 130, 200, 200, 1, 70, 50),
    (2, 6, 2, 1, 300, 299, 1, 298, 0),
    (1, 2, 2, 1, 300, 257, 0, 0, 0),
    (1, 2, 1, 150, 300, 257, 0, 0, 0),
    (1, 1, 1, 10, 10, 10, 1, -3, 0),
    (1, 2, 1, 2, 400, 390, 1, 388, 130),
    (1, 200, 1, 2, 40, 33, 0, 0, 0),
]


class Args(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("y", "q", "k", "v", "mask")]
        + [(name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "rows", "keys")]
        + [(f"{name}_stride", ctypes.c_int64 * 3) for name in "yqkv"]
        + [("mask_stride", ctypes.c_int64 * 4), ("scale", ctypes.c_float), ("causal", ctypes.c_int)]
        + [("offset", ctypes.c_int64), ("window", ctypes.c_int64)]
    )


def reference(q, k, v, mask, case):
    _, heads, kv_heads, rows, _, keys, causal, offset, window = case
    k, v = (np.repeat(x[:, :, :keys], heads // kv_heads, 1).astype(np.float64) for x in (k, v))
    score = q.astype(np.float64) @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    last, j = np.arange(rows)[:, None] + offset, np.arange(keys)[None]
    visible = np.ones((rows, keys), bool)
    visible &= (j <= last) if causal else True
    visible &= (j > last - window) if window else True
    score = np.where(visible, score, -np.inf)
    if mask is not None:
        score = np.where(mask, score, -np.inf) if mask.dtype == bool else score + mask
    top = score.max(-1, keepdims=True)
    weight = np.exp(score - np.where(np.isinf(top), 0, top))
    total = weight.sum(-1, keepdims=True)
    return weight / np.where(total == 0, 1, total) @ v


def make_mask(rng, kind, shape):
    batch, _, rows, keys = shape
    if kind == "none":
        return None
    if kind == "bool":
        return np.broadcast_to(rng.random((batch, 1, 1, keys)) < 0.8, shape)
    hidden = rng.random((batch, 1, rows, keys)) < 0.2
    values = rng.standard_normal(hidden.shape, np.float32)
    return np.broadcast_to(np.where(hidden, np.float32(-np.inf), values), shape)


def pack_args(y, q, k, v, mask, case):
    batch, heads, kv_heads, rows, _, keys, causal, offset, window = case
    four = [0] * 4 if mask is None else strides(mask, 4)
    address = None if mask is None else mask.ctypes.data
    steps = [(ctypes.c_int64 * 3)(*strides(x, 3)) for x in (y, q, k, v)]
    pointers = [x.ctypes.data for x in (y, q, k, v)]
    sizes = (batch, heads, kv_heads, rows, keys)
    scale = q.shape[-1] ** -0.5
    return Args(*pointers, address, *sizes, *steps, (ctypes.c_int64 * 4)(*four), scale, causal, offset, window)


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_attention(isa, threads, mask_kind):
    rng = np.random.default_rng(0)
    lib = load(SOURCE, isa)
    with team(lib, threads) as made:
        for (d, dv), case in [(dims, case) for dims in DIMS for case in CASES]:
            batch, heads, kv_heads, rows, most, keys, *_ = case
            q = rng.standard_normal((batch, rows, heads, d), np.float32).swapaxes(1, 2)
            k = rng.standard_normal((batch, kv_heads, most, d), np.float32)
            v = rng.standard_normal((batch, kv_heads, most, dv), np.float32)
            mask = make_mask(rng, mask_kind, (batch, heads, rows, keys))
            y = np.full((batch, rows, heads, dv), np.nan, np.float32).swapaxes(1, 2)
            args = pack_args(y, q, k, v, mask, case)
            block = np.frombuffer(args, np.uint8)
            assert run(lib, made, f"att_{d}_{dv}_{mask_kind}", [], [block]) == 0
            np.testing.assert_allclose(y, reference(q, k, v, mask, case), rtol=1e-5, atol=3e-6, err_msg=str((d, case)))


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_rows_that_see_nothing_are_zero_and_nan_stays(isa):
    lib = load(SOURCE, isa)
    case = (1, 1, 1, 8, 8, 8, 1, -2, 0)
    q, k, v = (np.ones((1, 1, 8, d), np.float32) for d in (7, 7, 5))
    k[0, 0, 4, 0] = np.nan
    y = np.full((1, 1, 8, 5), np.nan, np.float32)
    with team(lib, 1) as made:
        assert run(lib, made, "att_7_5_none", [], [np.frombuffer(pack_args(y, q, k, v, None, case), np.uint8)]) == 0

    assert (y[0, 0, :2] == 0).all()
    assert (y[0, 0, 2:6] == 1).all()
    assert np.isnan(y[0, 0, 6:]).all()

"""attention against a float64 reference: grouped heads, causal limits, windows, masks, odd sizes, bf16 caches."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from sylvester.codegen.attention import Tuning, attention, attention_header, part_floats
from sylvester.codegen.bfloat16 import bf16_bits, bf16_values, header
from tests.kernel_harness import export, load, run, strides, supported, team

DIMS = [(64, 64), (7, 5), (40, 33)]
MASKS = ("none", "float", "bool")
INSTANCES = [(*dims, mask, "f32") for dims in DIMS for mask in MASKS] + [(*dims, "none", "bf16") for dims in DIMS]


def name_of(d, dv, mask, cache):
    return f"att_{d}_{dv}_{mask}_{cache}"


def source(instances, tuning=None):
    parts = [attention_header(tuning)]
    for instance in instances:
        name = name_of(*instance)
        parts += [attention(name, *instance), export(name, f"{name}(t, p[0]);", f"{name}_scratch")]
    return "".join(parts)


SOURCE = source(INSTANCES)
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
    (1, 8, 1, 1, 2100, 2051, 1, 2050, 0),
    (1, 4, 2, 2, 1100, 1090, 1, 1088, 700),
    (1, 1, 1, 3, 600, 600, 0, 0, 0),
]


class Args(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("y", "q", "k", "v", "mask")]
        + [("part", ctypes.c_void_p), ("part_floats", ctypes.c_int64)]
        + [(name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "rows", "keys")]
        + [(f"{name}_stride", ctypes.c_int64 * 3) for name in "yqkv"]
        + [("mask_stride", ctypes.c_int64 * 4), ("scale", ctypes.c_float), ("causal", ctypes.c_int)]
        + [(name, ctypes.c_int64) for name in ("offset", "window", "shared", "begin")]
        + [("steady", ctypes.c_int)]
        + [("softcap", ctypes.c_float), ("depths", ctypes.c_void_p)]
    )


def reference(q, k, v, mask, case, softcap=0.0):
    _, heads, kv_heads, rows, _, keys, causal, offset, window = case
    k, v = (np.repeat(x[:, :, :keys], heads // kv_heads, 1).astype(np.float64) for x in (k, v))
    score = q.astype(np.float64) @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    score = softcap * np.tanh(score / softcap) if softcap else score
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


def pack_args(y, q, k, v, mask, case, part=None, softcap=0.0):
    batch, heads, kv_heads, rows, _, keys, causal, offset, window = case
    four = [0] * 4 if mask is None else strides(mask, 4)
    address = None if mask is None else mask.ctypes.data
    steps = [(ctypes.c_int64 * 3)(*strides(x, 3)) for x in (y, q, k, v)]
    pointers = [x.ctypes.data for x in (y, q, k, v)]
    sizes = (batch, heads, kv_heads, rows, keys)
    scale = q.shape[-1] ** -0.5
    shared = (None, 0) if part is None else (part.ctypes.data, part.size)
    by_mask = (ctypes.c_int64 * 4)(*four)
    return Args(*pointers, address, *shared, *sizes, *steps, by_mask, scale, causal, offset, window, 0, 0, 0, softcap)


def make_operands(rng, d, dv, cache, case):
    """q and y token-major, k and v as caches; k and v also as the float values they hold."""
    batch, heads, kv_heads, rows, most, *_ = case
    q = rng.standard_normal((batch, rows, heads, d), np.float32).swapaxes(1, 2)
    y = np.full((batch, rows, heads, dv), np.nan, np.float32).swapaxes(1, 2)
    k, v = (rng.standard_normal((batch, kv_heads, most, n), np.float32) for n in (d, dv))
    if cache == "f32":
        return y, q, (k, v), (k, v)
    k, v = bf16_bits(k), bf16_bits(v)
    return y, q, (k, v), (bf16_values(k), bf16_values(v))


def check(lib, made, instance, case, part=None, softcap=0.0):
    d, dv, mask_kind, cache = instance
    rng = np.random.default_rng(0)
    batch, heads, _, rows, _, keys, *_ = case
    y, q, stored, (k, v) = make_operands(rng, d, dv, cache, case)
    mask = make_mask(rng, mask_kind, (batch, heads, rows, keys))
    args = pack_args(y, q, *stored, mask, case, part, softcap)
    assert run(lib, made, name_of(*instance), [], [np.frombuffer(args, np.uint8)]) == 0
    exact = reference(q, k, v, mask, case, softcap)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=3e-6, err_msg=str((instance, case)))


@pytest.mark.parametrize("instance", INSTANCES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_attention(isa, threads, instance):
    lib = load(SOURCE, isa)
    with team(lib, threads) as made:
        for case in CASES:
            check(lib, made, instance, case)


@pytest.mark.parametrize("threads", [2, 5, 8])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_keys_split_among_threads(isa, threads):
    lib = load(SOURCE, isa)
    with team(lib, threads) as made:
        for instance in INSTANCES:
            part = np.full(part_floats(instance[1]), np.nan, np.float32)
            for case in CASES:
                check(lib, made, instance, case, part)
            assert not np.isnan(part[0])


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_scores_with_a_soft_cap(isa, softcap):
    lib = load(SOURCE, isa)
    with team(lib, 3) as made:
        for instance in INSTANCES:
            part = np.zeros(part_floats(instance[1]), np.float32)
            for case in CASES:
                check(lib, made, instance, case, part, softcap)


def test_room_for_parts_is_respected():
    lib, case = load(SOURCE, supported()[0]), (1, 8, 1, 1, 2100, 2051, 1, 2050, 0)
    part = np.full(1000, np.nan, np.float32)
    with team(lib, 4) as made:
        for room in (0, 8 * 66 - 1, 8 * 66 * 2 - 1):
            check(lib, made, (64, 64, "none", "f32"), case, part[:room])
            assert np.isnan(part).all()
        check(lib, made, (64, 64, "none", "f32"), case, np.full(8 * 66 * 2, np.nan, np.float32))


@pytest.mark.parametrize("tuning", [Tuning(1, 32, 0, 32), Tuning(2, 64, 3, 64), Tuning(40, 512, 8, 1024)], ids=str)
def test_every_tuning_is_right(tuning):
    instance = (40, 33, "float", "f32")
    lib = load(source([instance], tuning), supported()[-1])
    part = np.zeros(part_floats(33), np.float32)
    with team(lib, 2) as made:
        for case in CASES:
            check(lib, made, instance, case, part)


def test_asking_for_memory_ahead_changes_nothing():
    instances = [(64, 64, "none", "f32"), (7, 5, "none", "bf16")]
    lib = load("#define SV_ATT_FAR 1\n" + source(instances), supported()[-1])
    with team(lib, 2) as made:
        for instance in instances:
            for case in CASES:
                check(lib, made, instance, case)


def test_wrong_tuning_is_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        Tuning(keys=100)


@pytest.mark.parametrize("isa", supported(), ids=lambda isa: isa.name)
def test_rows_that_see_nothing_are_zero_and_nan_stays(isa):
    lib = load(SOURCE, isa)
    case = (1, 1, 1, 8, 8, 8, 1, -2, 0)
    q, k, v = (np.ones((1, 1, 8, d), np.float32) for d in (7, 7, 5))
    k[0, 0, 4, 0] = np.nan
    y = np.full((1, 1, 8, 5), np.nan, np.float32)
    with team(lib, 1) as made:
        assert run(lib, made, "att_7_5_none_f32", [], [np.frombuffer(pack_args(y, q, k, v, None, case), np.uint8)]) == 0

    assert (y[0, 0, :2] == 0).all()
    assert (y[0, 0, 2:6] == 1).all()
    assert np.isnan(y[0, 0, 6:]).all()


def rounded(x):
    return bf16_values(bf16_bits(x))


def check_short(lib, made, instance, case, *, rounds):
    """Few rows are computed as ever; many are near the exact result, and not it where operands are rounded."""
    d, dv, mask_kind, cache = instance
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, rows, _, keys, *_ = case
    y, q, stored, (k, v) = make_operands(rng, d, dv, cache, case)
    mask = make_mask(rng, mask_kind, (batch, heads, rows, keys))
    args = pack_args(y, q, *stored, mask, case)
    assert run(lib, made, name_of(*instance), [], [np.frombuffer(args, np.uint8)]) == 0
    exact = reference(q, k, v, mask, case)
    if not rounds or rows * heads // kv_heads <= 8:
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=3e-6, err_msg=str((instance, case)))
        return
    short = reference(rounded(q), rounded(k), rounded(v), mask, case)
    np.testing.assert_allclose(y, short, rtol=0, atol=2e-2, err_msg=str((instance, case)))
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert (1e-4 if rows > 30 else 0) < error < 8e-3, (instance, case)


def short_source(dot, isa):
    """Instances with bfloat16 products, after the pairs of the instruction set, portable ones, or none."""
    parts = [f"#define SV_BF16_DOT {int(dot)}\n", header(isa), attention_header()]
    for instance in SHORT:
        name = name_of(*instance)
        parts += [attention(name, *instance, products="bf16"), export(name, f"{name}(t, p[0]);", f"{name}_scratch")]
    return "".join(parts)


SHORT = [(64, 64, "none", "f32"), (7, 5, "float", "f32"), (40, 33, "bool", "bf16"), (7, 5, "none", "bf16")]


@pytest.mark.parametrize("dot", [True, False], ids=["rounded", "float32"])
@pytest.mark.parametrize("isa", supported("bf16"), ids=lambda isa: isa.name)
def test_bfloat16_products(isa, dot):
    lib = load(short_source(dot, isa), isa)
    with team(lib, 2) as made:
        for instance in SHORT:
            for case in CASES:
                check_short(lib, made, instance, case, rounds=dot)

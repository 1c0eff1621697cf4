"""Rows of x on their way to a product: normalised, then rounded to whole numbers or float8 times a scale."""

import triton
import triton.language as tl

from sylvester.codegen.triton.rounding import nearest
from sylvester.codegen.triton.weights import stored_tile


@triton.jit
def statistics(x, at, k, eps, NORM: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / deviation of rows that begin at x + at [rows], in float32; an RMS norm has no mean."""
    none = tl.zeros((at.shape[0], BLOCK_K), tl.float32)
    mean = tl.zeros(at.shape, tl.float32)
    if NORM == "layer":
        sums = none
        for start in range(0, k, BLOCK_K):
            sums += stored_tile(x, at, start, k, False, BLOCK_K).to(tl.float32)
        mean = tl.sum(sums, 1) / k
    squares = none
    for start in range(0, k, BLOCK_K):
        v = stored_tile(x, at, start, k, False, BLOCK_K).to(tl.float32)
        if NORM == "layer":
            v = tl.where((start + tl.arange(0, BLOCK_K))[None, :] < k, v - mean[:, None], 0.0)
        squares += v * v
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / k + eps)


@triton.jit
def normalised(
    v, j, k, mean, factor, norm_weight, norm_bias,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Columns j of normalised rows, 0 past k."""
    if NORM != "none":
        v = (v - mean[:, None]) * factor[:, None]
        if WEIGHTED:
            v *= tl.load(norm_weight + j, j < k, 0.0).to(tl.float32)[None, :]
        if SHIFTED:
            v += tl.load(norm_bias + j, j < k, 0.0).to(tl.float32)[None, :]
        if not EVEN:
            v = tl.where(j[None, :] < k, v, 0.0)
    return v


@triton.jit
def float_tile(
    x, at, start, k, mean, factor, norm_weight, norm_bias,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [rows, BLOCK_K] of normalised rows from column `start`, 0 past k."""
    j = start + tl.arange(0, BLOCK_K)
    v = stored_tile(x, at, start, k, EVEN, BLOCK_K).to(tl.float32)
    return normalised(v, j, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN)


@triton.jit
def to_numbers(v, scale, MOST: tl.constexpr):
    """Numbers of v [rows, columns] by scales [rows], cut at MOST; 0 for a scale that is not positive.

    They are int8 or, with MOST of 448, float8, where NaN stays one.
    """
    positive = scale > 0
    v = tl.div_rn(v, tl.where(positive, scale, 1.0)[:, None])
    if MOST == 448:
        v = tl.maximum(v, -448.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.minimum(v, 448.0, propagate_nan=tl.PropagateNan.ALL)
        v = tl.where(positive[:, None] | (v != v), v, 0.0).to(tl.float8e4nv)
    else:
        v = tl.minimum(tl.maximum(nearest(v), -MOST * 1.0), MOST * 1.0)
        v = tl.where(positive[:, None], v, 0.0).to(tl.int8)
    return v


@triton.jit
def row_scales(
    x, at, k, mean, factor, norm_weight, norm_bias,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Largest size of each normalised row over MOST."""
    top = tl.zeros((at.shape[0], BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        v = float_tile(x, at, start, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN, BLOCK_K)
        top = tl.maximum(top, tl.abs(v))
    return tl.div_rn(tl.max(top, 1), tl.full(at.shape, MOST, tl.float32))


@triton.jit
def quantize_rows(
    x, numbers, scales, step, norm_weight, norm_bias, m, k, x_row, numbers_row, eps,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Numbers [m, k <= BLOCK_K] of normalised rows of x, read once, and their scales [m]."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = r < m
    r = tl.minimum(r, m - 1).to(tl.int64)
    j = tl.arange(0, BLOCK_K)
    v = stored_tile(x, r * x_row, 0, k, EVEN, BLOCK_K).to(tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    factor = mean
    if NORM == "layer":
        mean = tl.sum(v, 1) / k
    if NORM != "none":
        centred = v if NORM == "rms" else tl.where(j[None, :] < k, v - mean[:, None], 0.0)
        factor = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / k + eps)
    v = normalised(v, j, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN)
    if STEP:
        scale = tl.zeros((ROWS,), tl.float32) + tl.load(step)
    else:
        scale = tl.div_rn(tl.max(tl.abs(v), 1), tl.full((ROWS,), MOST, tl.float32))
    tl.store(scales + r, scale, inside)
    place = numbers + (r * numbers_row)[:, None] + j[None, :]
    tl.store(place, to_numbers(v, scale, MOST), inside[:, None] & (j[None, :] < k))


@triton.jit
def quantize_long_rows(
    x, numbers, scales, step, norm_weight, norm_bias, m, k, x_row, numbers_row, eps,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, STEP: tl.constexpr, MOST: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`quantize_rows` of one row a program and any k: a part of it at a time, from the cache after the first time."""
    r = tl.program_id(0) + tl.arange(0, ROWS).to(tl.int64)
    at = r * x_row
    mean = tl.zeros((ROWS,), tl.float32)
    factor = mean
    if NORM != "none":
        mean, factor = statistics(x, at, k, eps, NORM, BLOCK_K)
    if STEP:
        scale = tl.zeros((ROWS,), tl.float32) + tl.load(step)
    else:
        scale = row_scales(x, at, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN, BLOCK_K, MOST)
    tl.store(scales + r, scale)
    for start in range(0, k, BLOCK_K):
        v = float_tile(x, at, start, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN, BLOCK_K)
        j = start + tl.arange(0, BLOCK_K)
        tl.store(numbers + (r * numbers_row)[:, None] + j[None, :], to_numbers(v, scale, MOST), j[None, :] < k)

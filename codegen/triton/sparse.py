"""Products of a few rows that do not read the weights which meet zeros in all of them, and gates that make zeros."""

import triton
import triton.language as tl

from sylvester.codegen.triton.epilogue import activated, emit
from sylvester.codegen.triton.rows import float_tile, statistics
from sylvester.codegen.triton.weights import turned_tile


@triton.jit
def skipping(
    x, w, up, y, norm_weight, norm_bias, bias, up_bias, residual, m, n, k, x_row, w_row, y_row, residual_row, eps,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, ADDED: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`gemv` over W^T [k, w_row]: a program BLOCK_N columns of y and part of k, of which it reads the rows of W^T where
    a row of x is not 0."""
    r = tl.arange(0, ROWS)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.minimum(r, m - 1).to(tl.int64) * x_row
    mean = tl.zeros((ROWS,), tl.float32)
    factor = mean
    if NORM != "none":
        mean, factor = statistics(x, at, k, eps, NORM, 2048 // ROWS)
    acc = tl.zeros((ROWS, BLOCK_K, BLOCK_N), tl.float32)
    up_acc = acc
    part = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, k), BLOCK_K):
        a = float_tile(x, at, start, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN, BLOCK_K)
        j = start + tl.arange(0, BLOCK_K)
        needed = (tl.max((a != 0.0).to(tl.int32), 0) > 0) & (j < k)
        acc += a[:, :, None] * turned_tile(w, j, c, w_row, needed, n)[None, :, :]
        if GATED:
            up_acc += a[:, :, None] * turned_tile(up, j, c, w_row, needed, n)[None, :, :]
    emit(
        y, tl.sum(acc, 1), tl.sum(up_acc, 1), bias, up_bias, residual, r, c, m, n, y_row, residual_row,
        BIASED, ACTIVATION, GATED, ADDED, SPLITS,
    )  # fmt: skip


@triton.jit
def opened(gate, thresholds, r, c, m, n, row, OPENING: tl.constexpr):
    """a = act(gate) at rows r and columns c, 0 where |a| is at most its threshold, and outside."""
    inside = (r[:, None] < m) & (c[None, :] < n)
    a = activated(tl.load(gate + (r.to(tl.int64) * row)[:, None] + c[None, :], inside, 0.0), OPENING)
    level = tl.load(thresholds + c, c < n, 0.0)
    return tl.where(inside & ((tl.abs(a) <= level[None, :]) == 0), a, 0.0)


@triton.jit
def sparse_glu(
    x, w, y, norm_weight, norm_bias, bias, gate, thresholds, m, n, k, x_row, w_row, y_row, eps,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr, OPENING: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = a (x W^T + bias), a as in `opened`: a program BLOCK_N rows of W, of which it reads those that are open."""
    r = tl.arange(0, ROWS)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = opened(gate, thresholds, r, c, m, n, y_row, OPENING)
    needed = tl.max((a != 0.0).to(tl.int32), 0) > 0
    end = tl.where(tl.max(needed.to(tl.int32), 0) > 0, k, 0)
    at = tl.minimum(r, m - 1).to(tl.int64) * x_row
    mean = tl.zeros((ROWS,), tl.float32)
    factor = mean
    if NORM != "none":
        mean, factor = statistics(x, at, k, eps, NORM, 2048 // ROWS)
    acc = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    rows = w + (tl.minimum(c, n - 1).to(tl.int64) * w_row)[:, None]
    for start in range(0, end, BLOCK_K):
        v = float_tile(x, at, start, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN, BLOCK_K)
        j = start + tl.arange(0, BLOCK_K)
        tile = tl.load(rows + j[None, :], needed[:, None] & (j[None, :] < k), 0.0)
        acc += v[:, None, :] * tile[None, :, :]
    u = tl.sum(acc, 2)
    if BIASED:
        u += tl.load(bias + c, c < n, 0.0)[None, :]
    inside = (r[:, None] < m) & (c[None, :] < n)
    tl.store(y + (r.to(tl.int64) * y_row)[:, None] + c[None, :], tl.where(a == 0.0, 0.0, a * u), inside)


@triton.jit
def open_rows(
    y, gate, thresholds, m, n, y_row, OPENING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y times a, as in `opened`, in its place."""
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    a = opened(gate, thresholds, r, c, m, n, y_row, OPENING)
    inside = (r[:, None] < m) & (c[None, :] < n)
    place = y + (r.to(tl.int64) * y_row)[:, None] + c[None, :]
    tl.store(place, tl.where(a == 0.0, 0.0, a * tl.load(place, inside, 0.0)), inside)

"""`matmul` for a few rows, without tensor cores: each program reads some rows of W once, for all rows of x."""

import triton
import triton.language as tl

from sylvester.codegen.triton.epilogue import emit
from sylvester.codegen.triton.matmul import prologue, x_tile
from sylvester.codegen.triton.weights import by_columns, convert, weight_tile


@triton.jit
def by_groups(a, w, scales, c, start, k, acc, GROUP: tl.constexpr, LANES: tl.constexpr, SUM: tl.constexpr):
    """acc [rows, n, BLOCK_K / LANES] + sums of LANES products of a [rows, BLOCK_K] and w [n, BLOCK_K]."""
    UNITS: tl.constexpr = a.shape[1] // LANES
    a = tl.reshape(a.to(SUM), (a.shape[0], 1, UNITS, LANES))
    w = tl.reshape(w.to(SUM), (1, w.shape[0], UNITS, LANES))
    sums = tl.sum(a * w, 3).to(acc.dtype)
    if GROUP > 0:
        groups = tl.cdiv(k, GROUP)
        g = (start + tl.arange(0, UNITS) * LANES) // GROUP
        s = tl.load(scales + (c * groups)[:, None] + g[None, :], g[None, :] < groups, 0.0)
        sums *= s.to(tl.float32)[None, :, :]
    return acc + sums


@triton.jit
def columns(
    program, x, w, up, y, scales, up_scales, x_scales, norm_weight, norm_bias, bias, up_bias, residual,
    m, n, k, x_row, w_row, y_row, residual_row, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, ROUND: tl.constexpr, MOST: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of y and part of k, for all m <= ROWS rows."""
    r = tl.arange(0, ROWS)
    c = program * BLOCK_N + tl.arange(0, BLOCK_N)
    r_in, c_in = tl.minimum(r, m - 1), tl.minimum(c, n - 1)
    x_at, w_at = r_in.to(tl.int64) * x_row, c_in.to(tl.int64) * w_row
    mean, factor, scale = prologue(
        x, x_at, r_in, x_scales, norm_weight, norm_bias, k, eps, NORM, WEIGHTED, SHIFTED, ROUND, MOST
    )  # fmt: skip
    SUM: tl.constexpr = tl.int32 if TYPE == "i8" else tl.float32
    acc = tl.zeros((ROWS, BLOCK_N, BLOCK_K // LANES), tl.int32 if TYPE == "i8" and GROUP == 0 else tl.float32)
    up_acc = acc
    part = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, k), BLOCK_K):
        a = convert(x_tile(
            x, x_at, start, k, mean, factor, scale, norm_weight, norm_bias,
            NORM, WEIGHTED, SHIFTED, ROUND, MOST, EVEN, BLOCK_K,
        ), TYPE)  # fmt: skip
        b = weight_tile(w, w_at, start, k, BITS, EVEN, BLOCK_K)
        acc = by_groups(a, b, scales, c_in, start, k, acc, GROUP, LANES, SUM)
        if GATED:
            b = weight_tile(up, w_at, start, k, BITS, EVEN, BLOCK_K)
            up_acc = by_groups(a, b, up_scales, c_in, start, k, up_acc, GROUP, LANES, SUM)
    g = tl.sum(acc, 2).to(tl.float32)
    u = tl.sum(up_acc, 2).to(tl.float32)
    if ROUND != "none":
        g *= scale[:, None]
        u *= scale[:, None]
    if SCALED:
        g = by_columns(g, scales, c_in, GROUP)
        if GATED:
            u = by_columns(u, up_scales, c_in, GROUP)
    emit(
        y, g, u, bias, up_bias, residual, r, c, m, n, y_row, residual_row,
        BIASED, ACTIVATION, GATED, ADDED, SPLITS,
    )  # fmt: skip


@triton.jit
def gemv(
    x, w, up, y, scales, up_scales, x_scales, norm_weight, norm_bias, bias, up_bias, residual,
    m, n, k, x_row, w_row, y_row, residual_row, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, ROUND: tl.constexpr, MOST: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program BLOCK_N columns of y and part of k."""
    columns(
        tl.program_id(0), x, w, up, y, scales, up_scales, x_scales, norm_weight, norm_bias, bias, up_bias, residual,
        m, n, k, x_row, w_row, y_row, residual_row, eps, BITS, GROUP, SCALED, TYPE, NORM, WEIGHTED, SHIFTED, ROUND,
        MOST, BIASED, ACTIVATION, GATED, ADDED, EVEN, SPLITS, ROWS, BLOCK_N, BLOCK_K, LANES,
    )  # fmt: skip


@triton.jit
def gemv_group(
    x, w, w_b, w_c, up, y, y_b, y_c, scales, scales_b, scales_c, up_scales, x_scales, norm_weight, norm_bias,
    bias, bias_b, bias_c, up_bias, residual, m, n, n_b, n_c, k, x_row, w_row, y_row, residual_row, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, ROUND: tl.constexpr, MOST: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`gemv` of two or three weights over the same rows, one after another; y has no columns in between."""
    program = tl.program_id(0)
    second = tl.cdiv(n, BLOCK_N)
    third = second + tl.cdiv(n_b, BLOCK_N)
    if program >= third:
        program, w, y, n = program - third, w_c, y_c, n_c
        if SCALED:
            scales = scales_c
        if BIASED:
            bias = bias_c
    elif program >= second:
        program, w, y, n = program - second, w_b, y_b, n_b
        if SCALED:
            scales = scales_b
        if BIASED:
            bias = bias_b
    columns(
        program, x, w, up, y, scales, up_scales, x_scales, norm_weight, norm_bias, bias, up_bias, residual,
        m, n, k, x_row, w_row, n, residual_row, eps, BITS, GROUP, SCALED, TYPE, NORM, WEIGHTED, SHIFTED, ROUND,
        MOST, BIASED, ACTIVATION, GATED, ADDED, EVEN, SPLITS, ROWS, BLOCK_N, BLOCK_K, LANES,
    )  # fmt: skip

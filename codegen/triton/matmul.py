"""y = residual + act(x W^T + bias) (x U^T + bias): x is normalised and rounded on the way in, W stored in few bits."""

import triton
import triton.language as tl

from sylvester.codegen.triton.epilogue import emit
from sylvester.codegen.triton.rows import float_tile, row_scales, statistics, to_numbers
from sylvester.codegen.triton.weights import by_columns, convert, stored_tile, tile_of_either


@triton.jit
def tile_of(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of the tile of this program; GROUP_M rows of tiles share their columns in the level 2 cache."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    p = tl.program_id(0)
    first = p // (GROUP_M * columns) * GROUP_M
    height = tl.minimum(rows - first, GROUP_M)
    inner = p % (GROUP_M * columns)
    return first + inner % height, inner // height


@triton.jit
def x_tile(
    x, at, start, k, mean, factor, scale, norm_weight, norm_bias,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, ROUND: tl.constexpr, MOST: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_K] of x: normalised, then where MOST > 0 in units of its scale, as `to_numbers` gives them."""
    if NORM == "none" and (ROUND == "none" or ROUND == "given"):
        v = stored_tile(x, at, start, k, EVEN, BLOCK_K)
    else:
        v = float_tile(x, at, start, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, EVEN, BLOCK_K)
        if MOST > 0:
            v = to_numbers(v, scale, MOST)
    return v


@triton.jit
def prologue(
    x, at, r, x_scales, norm_weight, norm_bias, k, eps,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, ROUND: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Mean, 1 / deviation and scale of rows r that begin at x + at."""
    BLOCK_K: tl.constexpr = 64 if at.shape[0] > 32 else 2048 // at.shape[0]
    mean = tl.zeros(at.shape, tl.float32)
    factor = mean
    scale = mean
    if NORM != "none":
        mean, factor = statistics(x, at, k, eps, NORM, BLOCK_K)
    if ROUND == "given":
        scale = tl.load(x_scales + r)
    elif ROUND == "step":
        scale += tl.load(x_scales)
    elif ROUND == "rows":
        scale = row_scales(
            x, at, k, mean, factor, norm_weight, norm_bias, NORM, WEIGHTED, SHIFTED, False, BLOCK_K, MOST
        )  # fmt: skip
    return mean, factor, scale


@triton.jit
def product(a, w, scales, rows, start, k, acc, GROUP: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a [m, BLOCK_K] w [n, BLOCK_K]^T, by the scales of the one group that the columns are in."""
    b = tl.trans(convert(w, TYPE))
    if GROUP > 0:
        s = tl.load(scales + rows * tl.cdiv(k, GROUP) + start // GROUP).to(tl.float32)
        acc += tl.dot(a, b, input_precision=PRECISION).to(tl.float32) * s[None, :]
    elif TYPE == "i8":
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, max_num_imprecise_acc=a.shape[1])
    return acc


@triton.jit
def matmul(
    x, w, up, y, scales, up_scales, x_scales, norm_weight, norm_bias, bias, up_bias, residual,
    m, n, k, x_row, w_row, y_row, residual_row, eps,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    NORM: tl.constexpr, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr, ROUND: tl.constexpr, MOST: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr, TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program a tile of y and part of k; with SPLITS > 1, y is float32 [SPLITS, 1 or 2, m, n] of sums for `join`."""
    i, j = tile_of(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    r = i * BLOCK_M + tl.arange(0, BLOCK_M)
    c = j * BLOCK_N + tl.arange(0, BLOCK_N)
    r_in, c_in = tl.minimum(r, m - 1), tl.minimum(c, n - 1)
    x_at, w_at = r_in.to(tl.int64) * x_row, c_in.to(tl.int64) * w_row
    mean, factor, scale = prologue(
        x, x_at, r_in, x_scales, norm_weight, norm_bias, k, eps, NORM, WEIGHTED, SHIFTED, ROUND, MOST
    )  # fmt: skip
    SUM: tl.constexpr = tl.int32 if TYPE == "i8" and GROUP == 0 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    up_acc = acc
    part = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLITS) * BLOCK_K
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, k), BLOCK_K):
        a = convert(x_tile(
            x, x_at, start, k, mean, factor, scale, norm_weight, norm_bias,
            NORM, WEIGHTED, SHIFTED, ROUND, MOST, EVEN, BLOCK_K,
        ), TYPE)  # fmt: skip
        b = tile_of_either(w, w_at, c, w_row, start, n, k, TURNED, BITS, EVEN, BLOCK_K)
        acc = product(a, b, scales, c_in, start, k, acc, GROUP, TYPE, PRECISION)
        if GATED:
            b = tile_of_either(up, w_at, c, w_row, start, n, k, TURNED, BITS, EVEN, BLOCK_K)
            up_acc = product(a, b, up_scales, c_in, start, k, up_acc, GROUP, TYPE, PRECISION)
    g = acc.to(tl.float32)
    u = up_acc.to(tl.float32)
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

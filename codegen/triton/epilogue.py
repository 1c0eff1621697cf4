"""What follows the sums of a product: bias, activation, gate, residual; or sums of parts of k, which `join` adds up."""

import triton
import triton.language as tl

from sylvester.codegen.triton.pointwise import gelu, gelu_tanh, silu


@triton.jit
def activated(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        v = silu(v)
    if ACTIVATION == "gelu":
        v = gelu(v)
    if ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return v


@triton.jit
def finish(
    y, g, u, bias, up_bias, residual, r, c, m, n, y_row, residual_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """y = act(g + bias) (u + up_bias) + residual at rows r and columns c; without GATED there is no u."""
    inside = (r[:, None] < m) & (c[None, :] < n)
    if BIASED:
        g += tl.load(bias + c, c < n, 0.0).to(tl.float32)[None, :]
    v = activated(g, ACTIVATION)
    if GATED:
        if BIASED:
            u += tl.load(up_bias + c, c < n, 0.0).to(tl.float32)[None, :]
        v *= u
    r = r.to(tl.int64)
    if ADDED:
        v += tl.load(residual + (r * residual_row)[:, None] + c[None, :], inside, 0.0).to(tl.float32)
    tl.store(y + (r * y_row)[:, None] + c[None, :], v.to(y.dtype.element_ty), inside)


@triton.jit
def emit(
    y, g, u, bias, up_bias, residual, r, c, m, n, y_row, residual_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`finish`, or the sums of part tl.program_id(1) into y [SPLITS, 1 or 2, m, n]."""
    if SPLITS == 1:
        finish(y, g, u, bias, up_bias, residual, r, c, m, n, y_row, residual_row, BIASED, ACTIVATION, GATED, ADDED)
    else:
        KINDS: tl.constexpr = 2 if GATED else 1
        inside = (r[:, None] < m) & (c[None, :] < n)
        place = y + tl.program_id(1).to(tl.int64) * m * n * KINDS + (r.to(tl.int64) * n)[:, None] + c[None, :]
        tl.store(place, g, inside)
        if GATED:
            tl.store(place + m.to(tl.int64) * n, u, inside)


@triton.jit
def join(
    parts, y, bias, up_bias, residual, m, n, y_row, residual_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y from sums of parts [SPLITS, 1 or 2, m, n], added in their order: the same bits each time."""
    KINDS: tl.constexpr = 2 if GATED else 1
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (r[:, None] < m) & (c[None, :] < n)
    size = tl.cast(m, tl.int64) * n
    place = parts + (r.to(tl.int64) * n)[:, None] + c[None, :]
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = g
    for s in range(SPLITS):
        g += tl.load(place + s * size * KINDS, inside, 0.0)
        if GATED:
            u += tl.load(place + s * size * KINDS + size, inside, 0.0)
    finish(y, g, u, bias, up_bias, residual, r, c, m, n, y_row, residual_row, BIASED, ACTIVATION, GATED, ADDED)

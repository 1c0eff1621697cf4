"""Norms and softmax of rows [rows, n], contiguous but for those that a norm reads."""

import triton
import triton.language as tl


@triton.jit
def norm(
    y, total, x, other, weight, bias, rows, n, x_row, eps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CENTRED: tl.constexpr, SUMMED: tl.constexpr, WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """y = rms_norm(x) * weight, or CENTRED layer_norm(x) * weight + bias; a row fits in BLOCK, those of x are `x_row`
    apart.

    SUMMED: of x + other, rounded to the type of `total`, into which it goes as well.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (d < n)
    at = r * n + d
    value = tl.load(x + r * x_row + d, mask=inside, other=0.0).to(tl.float32)
    if SUMMED:
        value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        narrow = value.to(total.dtype.element_ty)
        tl.store(total + at, narrow, mask=inside)
        value = narrow.to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - (tl.sum(value, 1) / n)[:, None], 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 1) / n + eps)[:, None]
    if WEIGHTED:
        if not CENTRED:
            value = value.to(y.dtype.element_ty).to(tl.float32)
        value = value * tl.load(weight + d, mask=d < n, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + d, mask=d < n, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def softmax(y, x, rows, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Of rows that fit in BLOCK."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (d < n)
    value = tl.load(x + r * n + d, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.where(inside, tl.exp(value - tl.max(value, 1)[:, None]), 0.0)
    tl.store(y + r * n + d, (p / tl.sum(p, 1)[:, None]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def long_softmax(y, x, n, BLOCK: tl.constexpr):
    """Of one row a program, read twice."""
    x += tl.program_id(0).to(tl.int64) * n
    y += tl.program_id(0).to(tl.int64) * n
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        d = first + tl.arange(0, BLOCK)
        value = tl.load(x + d, mask=d < n, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = new
    most = tl.max(top, 0)
    total = tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - most)), 0)
    for first in range(0, n, BLOCK):
        d = first + tl.arange(0, BLOCK)
        value = tl.load(x + d, mask=d < n, other=float("-inf")).to(tl.float32)
        tl.store(y + d, (tl.exp(value - most) / total).to(y.dtype.element_ty), mask=d < n)

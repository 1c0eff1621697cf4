"""Tiles of keys and of scores, and the softmax over them as FlashAttention-2 (Dao, 2023) keeps it.

Scores are times log2(e), so that weights are powers of two.
"""

import triton
import triton.language as tl

from sylvester.codegen.triton.pointwise import tanh


@triton.jit
def tile_rows(
    at, stride, held, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, STORED: tl.constexpr, CHECKED: tl.constexpr
):
    """N rows from `at` on [N, BLOCK]: floats, or records of 8 or 4 bits. Zeros past D, and where not `held`."""
    rows = at + tl.arange(0, N)[:, None] * stride
    d = tl.arange(0, BLOCK)[None, :]
    keep = tl.full([N, BLOCK], 1, tl.int1)
    if BLOCK != D:
        keep = keep & (d < D)
    if CHECKED:
        keep = keep & held[:, None]
    if STORED == "q8":
        whole = held[:, None] if CHECKED else tl.full([N, 1], 1, tl.int1)
        scale = tl.load(rows.to(tl.pointer_type(tl.float32)), mask=whole, other=0.0)
        found = tl.load((rows + 4 + d).to(tl.pointer_type(tl.int8)), mask=keep, other=0).to(tl.float32) * scale
    elif STORED == "q4":
        header = (rows + d // 64 * 4).to(tl.pointer_type(tl.bfloat16))
        scale = tl.load(header, mask=keep, other=0.0).to(tl.float32)
        least = tl.load(header + 1, mask=keep, other=0.0).to(tl.float32)
        pair = tl.load(rows + (D + 63) // 64 * 4 + d // 32 * 16 + d % 16, mask=keep, other=0)
        found = ((pair >> (d // 16 % 2 * 4).to(tl.uint8)) & 15).to(tl.float32) * scale + least
    else:
        found = tl.load(rows + d, mask=keep, other=0.0)
    return found


@triton.jit
def cast_to(x, PRODUCTS: tl.constexpr):
    """x as tensor cores multiply it."""
    if PRODUCTS == "bf16":
        y = x.to(tl.bfloat16)
    elif PRODUCTS == "f16":
        y = x.to(tl.float16)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def tiles_of(first, last, start, limit, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Tiles of keys for queries first .. last, a <= b <= c <= e: some of a .. e - 1 is seen, all of b .. c - 1."""
    most, sure = limit, limit
    if CAUSAL:
        most = tl.minimum(limit, last + start + 1)
        sure = tl.minimum(limit, first + start + 1)
    e = tl.cdiv(tl.maximum(most, 0), BLOCK_N)
    a, b = 0, 0
    if WINDOWED:
        a = tl.minimum(tl.maximum(first + start - window + 1, 0) // BLOCK_N, e)
        b = tl.minimum(tl.cdiv(tl.maximum(last + start - window + 1, 0), BLOCK_N), e)
    c = tl.maximum(tl.maximum(sure, 0) // BLOCK_N, b)
    return a, b, c, e


@triton.jit
def part_of(a, b, c, e, split, SPLITS: tl.constexpr):
    """The tiles a .. e - 1 that one of `SPLITS` programs reads, with the others' cut off."""
    if SPLITS > 1:
        share = tl.cdiv(e - a, SPLITS)
        low = tl.minimum(a + split * share, e)
        high = tl.minimum(low + share, e)
        a, b = low, tl.minimum(tl.maximum(b, low), high)
        c, e = tl.minimum(tl.maximum(c, low), high), high
    return a, b, c, e


@triton.jit
def biased(s, masks, at_key, j, held, softcap, CAPPED: tl.constexpr, MASK: tl.constexpr):
    """Scores s [M, N] after their soft-cap, with the mask: `masks` are addresses of the rows [M]."""
    if CAPPED:
        s = softcap * 1.4426950408889634 * tanh(s)
    if MASK != "none":
        bias = tl.load(masks[:, None] + (j * at_key)[None, :], mask=held[None, :], other=0)
        if MASK == "float":
            s += 1.4426950408889634 * bias.to(tl.float32)
        else:
            s = tl.where(bias != 0, s, float("-inf"))
    return s


@triton.jit
def hidden(s, j, held, position, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Scores s [M, N] of keys j, minus infinity where a query at `position` does not see them."""
    seen = held[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= position[:, None])
    if WINDOWED:
        seen = seen & (j[None, :] > position[:, None] - window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def weighed(s, top, total):
    """Scores [M, N] of one more tile -> their weights, what the sums so far shrink by, `top` and `total` [M]."""
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    return p, shrink, new, total * shrink + tl.sum(p, 1)

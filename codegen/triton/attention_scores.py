"""Scores of tiles of keys, and the softmax over them as FlashAttention-2 (Dao, 2023) keeps it.

Scores are times log2(e), so that weights are powers of two.
"""

import triton
import triton.language as tl

from sylvester.codegen.triton.pointwise import tanh


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
def in_tree(s, tree, depths, row, start, rows, j, window, WINDOWED: tl.constexpr):
    """Scores s [M, N] of keys j, minus infinity where a token of a tree does not see them: those from `start` on are of
    its tokens, of which each sees what `tree` [rows, rows] says; it stands at start plus its depth."""
    t = j - start
    inner = (t >= 0) & (t < rows)
    own = row < rows
    seen = tl.load(tree + row[:, None] * rows + t[None, :], mask=inner[None, :] & own[:, None], other=0) != 0
    seen = seen | (t < 0)[None, :]
    if WINDOWED:
        place = tl.where(inner, start + tl.load(depths + t, mask=inner, other=0).to(tl.int32), j)
        position = start + tl.load(depths + row, mask=own, other=0).to(tl.int32)
        seen = seen & (place[None, :] > position[:, None] - window)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def weighed(s, top, total):
    """Scores [M, N] of one more tile -> their weights, what the sums so far shrink by, `top` and `total` [M]."""
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    return p, shrink, new, total * shrink + tl.sum(p, 1)

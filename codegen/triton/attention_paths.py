"""Queries that are computed each by itself, over the text that ends in it: the path to a token of a tree, or a line."""

import triton
import triton.language as tl

from sylvester.codegen.triton.attention_tiles import packed


@triton.jit
def alone(rows, kv_heads, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """As `packed`, where a program computes one query for the heads that share a key: its block is the query."""
    query = tl.program_id(0) % rows
    group = tl.program_id(0) // rows
    r = tl.arange(0, BLOCK_M)
    head = (group % kv_heads).to(tl.int64) * GROUP + r % GROUP
    return query, group, (group // kv_heads).to(tl.int64), r < GROUP, r * 0 + query, head


@triton.jit
def either(rows, kv_heads, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, APART: tl.constexpr):
    """As `alone` with APART > 0, else as `packed`."""
    if APART > 0:
        query, group, batch, inside, row, head = alone(rows, kv_heads, BLOCK_M, GROUP)
    else:
        query, group, batch, inside, row, head = packed(rows, kv_heads, BLOCK_M, GROUP)
    return query, group, batch, inside, row, head


@triton.jit
def standing(offset, past, depths, block, row, rows, keys, PAST: tl.constexpr, APART: tl.constexpr):
    """Where the first query and that of this program stand, how many keys there are for it, and its block and rows as
    counted from there."""
    base = offset
    limit = keys
    if PAST:
        base += tl.load(past).to(tl.int32)
        limit = tl.minimum(keys, base + rows)
    start = base
    if APART > 0:
        start += tl.load(depths + block).to(tl.int32)
        limit = tl.minimum(keys, start + 1)
        block, row = block * 0, row * 0
    return base, start, limit, block, row


@triton.jit
def path_rows(j, depths, query, past, MOST: tl.constexpr):
    """The row of a cache that holds position j [N] of the text that ends in a token of a tree, of MOST tokens at most:
    past + i for the last token i up to that one which is so deep."""
    i = tl.arange(0, MOST)
    depth = tl.load(depths + i, mask=i <= query, other=-1).to(tl.int32)
    token = tl.max(tl.where(depth[None, :] == (j - past)[:, None], i[None, :], 0), 1)
    return tl.where(j < past, j, past + token)

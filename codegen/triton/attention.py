"""softmax(q k^T scale + mask) v with products of floats, for many queries or, by parts of the keys, for few.

A program computes BLOCK_M rows of one key head: row r is query r // GROUP of head r % GROUP of those that share it, so
that a key is read once for all of them.
"""

import triton
import triton.language as tl

from sylvester.codegen.triton.attention_paths import either, path_rows, standing
from sylvester.codegen.triton.attention_scores import biased, hidden, in_tree, weighed
from sylvester.codegen.triton.attention_tiles import cast_to, part_of, queries, tile_rows, tiles_of, write_rows


@triton.jit
def over_tiles(
    acc, top, total, x, first, last, k, v, masks, k_row, v_row, mask_key, row, start, limit, window, softcap,
    tree, depths, rows, shared, k_batch, v_batch, lists, query, base,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr, PRODUCTS: tl.constexpr,
    STORED: tl.constexpr, PRECISION: tl.constexpr, TREE: tl.constexpr, SHARED: tl.constexpr,
    LISTED: tl.constexpr, APART: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """The sums acc [M, DV] and total [M] with the tiles first .. last - 1 of keys, or of those LISTED; all of them are
    seen unless CHECKED."""
    for step in range(first, last):
        tile = tl.load(lists + step).to(tl.int32) if LISTED else step
        at = tl.cast(tile, tl.int64) * BLOCK_N
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        held = j < limit
        keys, values = k + at * k_row, v + at * v_row
        place = tl.arange(0, BLOCK_N)
        if CHECKED and APART > 0:
            place = path_rows(j, depths, query, base, APART) - tile * BLOCK_N
        if SHARED:
            keys -= (j < shared).to(tl.int64)[:, None] * k_batch
            values -= (j < shared).to(tl.int64)[:, None] * v_batch
        key = cast_to(tile_rows(keys, k_row, place, held, D, BLOCK_D, BLOCK_N, STORED, CHECKED), PRODUCTS)
        s = tl.dot(x, tl.trans(key), input_precision=PRECISION)
        s = biased(s, masks, mask_key, j, held, softcap, CAPPED, MASK)
        if CHECKED:
            s = hidden(s, j, held, row + start, window, CAUSAL and not TREE, WINDOWED and not TREE)
        if CHECKED and TREE:
            s = in_tree(s, tree, depths, row, start, rows, j, window, WINDOWED)
        p, shrink, top, total = weighed(s, top, total)
        value = cast_to(tile_rows(values, v_row, place, held, DV, BLOCK_DV, BLOCK_N, STORED, CHECKED), PRODUCTS)
        acc = tl.dot(cast_to(p, PRODUCTS), value, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def length(numbers, most):
    """How many of the numbers come before those below 0."""
    found = tl.zeros([], tl.int32)
    for first in range(0, most, 64):
        i = first + tl.arange(0, 64)
        found += tl.sum((tl.load(numbers + i, mask=i < most, other=-1) >= 0).to(tl.int32), 0)
    return found


@triton.jit
def attention(
    y, tops, q, k, v, mask, past, tree, depths, shared, lists,
    kv_heads, rows, keys, offset,
    y_batch, y_head, y_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_key, list_batch, list_head, most,
    scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, MASK: tl.constexpr, PAST: tl.constexpr, PRODUCTS: tl.constexpr, STORED: tl.constexpr,
    PRECISION: tl.constexpr, TREE: tl.constexpr, SHARED: tl.constexpr, LISTED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Query i stands at `offset` + *past + i and, with PAST, there are keys up to the last query. With TREE the queries
    are a tree of tokens, with their ancestors in `tree` [rows, rows] and their depths. With SHARED the keys before
    *shared are those of the first row of the batch. LISTED > 0 tells how many heads share a key head, while GROUP is 1
    and kv_heads are all heads; a block of 64 queries sees the tiles of 64 keys in lists [batch, heads, blocks, most],
    up to the first below 0. With APART > 0, the most tokens of a tree, each query is computed by itself, over what it
    would see at the end of a text: its bits are those of single tokens, whose depth is 0.

    With SPLITS > 1, y is float32 [key heads of the batch, rows * GROUP, SPLITS, DV], sums before their division, and
    tops [..., SPLITS, 2] their greatest score and total weight.
    """
    query, group, batch, inside, row, head = either(rows, kv_heads, BLOCK_M, GROUP, APART)
    base, start, limit, block, line = standing(offset, past, depths, query, row, rows, keys, PAST, APART)
    factor = scale / softcap if CAPPED else scale * 1.4426950408889634
    x = queries(q + batch * q_batch, q_row, q_head, row, head, inside, factor, D, BLOCK_D)
    x = cast_to(x, PRODUCTS)
    kv_head = (group % kv_heads).to(tl.int64)
    if LISTED:
        lists += batch * list_batch + kv_head * list_head + (block * BLOCK_M // 64).to(tl.int64) * most
        kv_head = kv_head // LISTED
    k_batch, v_batch = batch * k_batch, batch * v_batch
    k += k_batch + kv_head * k_head
    v += v_batch + kv_head * v_head
    common = 0
    if SHARED:
        common = tl.load(shared).to(tl.int32)
    masks = 0
    if MASK != "none":
        masks = mask + batch * mask_batch + tl.where(inside, head * mask_head + row.to(tl.int64) * mask_row, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    a, b, c, e = tiles_of(block, rows, start, limit, window, BLOCK_M, BLOCK_N, GROUP, CAUSAL, WINDOWED, TREE)
    if APART > 0:
        c = tl.maximum(tl.minimum(c, base // BLOCK_N), b)
    if LISTED:
        a, b, c, e = 0, 0, 0, length(lists, most)
    split = tl.program_id(1)
    a, b, c, e = part_of(a, b, c, e, split, SPLITS)
    if WINDOWED and not LISTED:
        acc, top, total = over_tiles(
            acc, top, total, x, a, b, k, v, masks, k_row, v_row, mask_key, line, start, limit, window, softcap,
            tree, depths, rows, common, k_batch, v_batch, lists, query, base,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOWED, CAPPED, MASK, PRODUCTS, STORED,
            PRECISION, TREE, SHARED, LISTED, APART, True,
        )  # fmt: skip
    acc, top, total = over_tiles(
        acc, top, total, x, b, c, k, v, masks, k_row, v_row, mask_key, line, start, limit, window, softcap,
        tree, depths, rows, common, k_batch, v_batch, lists, query, base,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOWED, CAPPED, MASK, PRODUCTS, STORED,
        PRECISION, TREE, SHARED, LISTED, APART, False,
    )  # fmt: skip
    acc, top, total = over_tiles(
        acc, top, total, x, c, e, k, v, masks, k_row, v_row, mask_key, line, start, limit, window, softcap,
        tree, depths, rows, common, k_batch, v_batch, lists, query, base,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOWED, CAPPED, MASK, PRODUCTS, STORED,
        PRECISION, TREE, SHARED, LISTED, APART, True,
    )  # fmt: skip
    if SPLITS > 1:
        r = block * BLOCK_M + tl.arange(0, BLOCK_M)
        place = (group.to(tl.int64) * rows * GROUP + r) * SPLITS + split
        tl.store(tops + place * 2, top, mask=inside)
        tl.store(tops + place * 2 + 1, total, mask=inside)
        write_rows(y, acc, DV, 0, place, head, inside, DV, BLOCK_DV)
    else:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        write_rows(y + batch * y_batch, out, y_row, y_head, row, head, inside, DV, BLOCK_DV)


@triton.jit
def joined(
    y, part, tops, kv_heads, rows, y_batch, y_head, y_row,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of y from its parts, always in the same order."""
    place = tl.program_id(0).to(tl.int64)
    r = (place % (rows * GROUP)).to(tl.int32)
    group = place // (rows * GROUP)
    s = tl.arange(0, SPLITS)
    e = tl.arange(0, BLOCK_DV)
    top = tl.load(tops + (place * SPLITS + s) * 2)
    total = tl.load(tops + (place * SPLITS + s) * 2 + 1)
    sums = tl.load(part + (place * SPLITS + s)[:, None] * DV + e[None, :], mask=(e < DV)[None, :], other=0.0)
    most = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(most == float("-inf"), 0.0, most))
    whole = tl.sum(weight * total, 0)
    out = tl.sum(sums * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    head = (group % kv_heads) * GROUP + r % GROUP
    at = y + (group // kv_heads) * y_batch + head * y_head + (r // GROUP).to(tl.int64) * y_row
    tl.store(at + e, out.to(y.dtype.element_ty), mask=e < DV)


@triton.jit
def ancestors(tree, depths, rows, BLOCK: tl.constexpr):
    """tree [rows, rows] of the depths of tokens in preorder: token j is i, or all after it up to i are deeper; BLOCK
    tokens i a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    least = tl.full([BLOCK], 2147483647, tl.int32)
    for back in range(rows):
        j = rows - 1 - back
        depth = tl.load(depths + j).to(tl.int32)
        tl.store(tree + i * rows + j, ((i == j) | ((i > j) & (least > depth))).to(tl.uint8), mask=i < rows)
        least = tl.where(i >= j, tl.minimum(least, depth), least)

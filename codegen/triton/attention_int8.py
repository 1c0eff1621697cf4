"""Attention with products of int8 queries and keys and of float8 or float16 weights and values: SageAttention2 (Zhang
et al., 2024). Two launches pack keys and values, a third attends over what they wrote.

Keys are less their mean over all keys, with a scale a row; values are less their mean, with a scale a channel, and
turned round, as tensor cores read values of 8 bits.
"""

import triton
import triton.language as tl

from sylvester.codegen.triton.attention_scores import biased, hidden, weighed
from sylvester.codegen.triton.attention_tiles import packed, queries, tiles_of, write_rows
from sylvester.codegen.triton.rounding import nearest


@triton.jit
def rows_at(x, first, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr):
    """Rows first .. first + N - 1 of x in float32 [N, BLOCK_D], zeros past D and past `limit`."""
    n = tl.arange(0, N)
    d = tl.arange(0, BLOCK_D)
    at = x + tl.cast(first, tl.int64) * stride + n[:, None] * stride + d[None, :]
    return tl.load(at, mask=(first + n < limit)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def keys_held(past, rows, keys, PAST: tl.constexpr):
    limit = keys
    if PAST:
        limit = tl.minimum(keys, tl.load(past).to(tl.int32) + rows)
    return limit


@triton.jit
def summaries(
    parts, k, v, past, kv_heads, rows, keys, k_batch, k_head, k_row, v_batch, v_head, v_row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """parts [key heads of the batch, PARTS, BLOCK_D + 3 BLOCK_DV]: sums of keys, sums, maxima and minima of values."""
    part, group = tl.program_id(0), tl.program_id(1)
    batch, head = (group // kv_heads).to(tl.int64), (group % kv_heads).to(tl.int64)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    limit = keys_held(past, rows, keys, PAST)
    share = tl.cdiv(tl.cdiv(limit, N), PARTS) * N
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_DV], tl.float32)
    high = tl.full([BLOCK_DV], float("-inf"), tl.float32)
    low = tl.full([BLOCK_DV], float("inf"), tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, limit), N):
        held = (first + tl.arange(0, N) < limit)[:, None]
        key_sum += tl.sum(rows_at(k, first, k_row, limit, D, BLOCK_D, N), 0)
        value = rows_at(v, first, v_row, limit, DV, BLOCK_DV, N)
        value_sum += tl.sum(value, 0)
        high = tl.maximum(high, tl.max(tl.where(held, value, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(held, value, float("inf")), 0))
    at = parts + (group * PARTS + part) * (BLOCK_D + 3 * BLOCK_DV)
    tl.store(at + tl.arange(0, BLOCK_D), key_sum)
    at += BLOCK_D + tl.arange(0, BLOCK_DV)
    tl.store(at, value_sum)
    tl.store(at + BLOCK_DV, high)
    tl.store(at + 2 * BLOCK_DV, low)


@triton.jit
def pack(
    keys8, key_scales, values8, channels, parts, k, v, past, kv_heads, rows, keys, room,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, N: tl.constexpr,
    PARTS: tl.constexpr, PAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """For each key head of the batch, keys8 [room, BLOCK_D], key_scales [room], values8 [BLOCK_DV, room] of sizes up to
    LARGEST, and channels [BLOCK_D + 2 BLOCK_DV]: the mean of keys, the mean and the scale of values. Zeros past the
    keys up to a multiple of 128, nothing past that."""
    first, group = tl.program_id(0) * N, tl.program_id(1).to(tl.int64)
    batch, head = group // kv_heads, group % kv_heads
    limit = keys_held(past, rows, keys, PAST)
    if first >= tl.cdiv(tl.maximum(limit, 1), 128) * 128:
        return
    d, e, n, s = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, N), tl.arange(0, PARTS)
    at = parts + (group * PARTS + s)[:, None] * (BLOCK_D + 3 * BLOCK_DV)
    count = tl.maximum(limit, 1).to(tl.float32)
    key_mean = tl.sum(tl.load(at + d[None, :]), 0) / count
    at += BLOCK_D + e[None, :]
    value_mean = tl.sum(tl.load(at), 0) / count
    high, low = tl.max(tl.load(at + BLOCK_DV), 0), tl.min(tl.load(at + 2 * BLOCK_DV), 0)
    top = tl.maximum(high - value_mean, value_mean - low)
    scale = tl.where(top > 0, top, 1.0) / LARGEST
    held = (first + n < limit)[:, None]
    key = rows_at(k + batch * k_batch + head * k_head, first, k_row, limit, D, BLOCK_D, N)
    key = tl.where(held, key - key_mean[None, :], 0.0)
    most = tl.max(tl.abs(key), 1)
    step = tl.where(most > 0, most, 1.0) / 127.0
    place = group * room + first + n
    tl.store(keys8 + place[:, None] * BLOCK_D + d[None, :], nearest(key / step[:, None]).to(tl.int8))
    tl.store(key_scales + place, step)
    value = rows_at(v + batch * v_batch + head * v_head, first, v_row, limit, DV, BLOCK_DV, N)
    value = tl.where(held, (value - value_mean[None, :]) / scale[None, :], 0.0)
    turned = values8 + group * BLOCK_DV * room + (first + n)[:, None] + e.to(tl.int64)[None, :] * room
    tl.store(turned, value.to(values8.dtype.element_ty))
    channels += group * (BLOCK_D + 2 * BLOCK_DV)
    tl.store(channels + d, key_mean, mask=d * 0 + first == 0)
    tl.store(channels + BLOCK_D + e, value_mean, mask=e * 0 + first == 0)
    tl.store(channels + BLOCK_D + BLOCK_DV + e, scale, mask=e * 0 + first == 0)


@triton.jit
def over_tiles8(
    acc, top, total, x, step, shift, first, last, keys8, key_scales, values8, masks, room, mask_key, position, limit,
    window, softcap,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, MASK: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """As `over_tiles` of floats. The products of one tile with values are summed apart from those of others."""
    n, d, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for tile in range(first, last):
        at = tl.cast(tile, tl.int64) * BLOCK_N
        j = tile * BLOCK_N + n
        key = tl.load(keys8 + at * BLOCK_D + n[:, None] * BLOCK_D + d[None, :])
        s = tl.dot(x, tl.trans(key)).to(tl.float32) * (step[:, None] * tl.load(key_scales + at + n)[None, :])
        if CAPPED:
            s += shift[:, None]
        s = biased(s, masks, mask_key, j, j < limit, softcap, CAPPED, MASK)
        if CHECKED:
            s = hidden(s, j, j < limit, position, window, CAUSAL, WINDOWED)
        p, shrink, top, total = weighed(s, top, total)
        value = tl.trans(tl.load(values8 + at + n[None, :] + e.to(tl.int64)[:, None] * room))
        if values8.dtype.element_ty == tl.float8e4nv:
            p = p * 448.0
        acc = acc * shrink[:, None] + tl.dot(p.to(values8.dtype.element_ty), value)
    return acc, top, total


@triton.jit
def attention_int8(
    y, q, keys8, key_scales, values8, channels, mask, past,
    kv_heads, rows, keys, room, offset,
    y_batch, y_head, y_row, q_batch, q_head, q_row, mask_batch, mask_head, mask_row, mask_key, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    MASK: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """As `attention`, over what `pack` wrote; queries are int8 with a scale a row. What the mean of keys adds to the
    scores of a query is the same for all keys, and counts only where they are capped."""
    block, group, batch, inside, row, head = packed(rows, kv_heads, BLOCK_M, GROUP)
    start = offset
    limit = keys_held(past, rows, keys, PAST)
    if PAST:
        start += tl.load(past).to(tl.int32)
    factor = scale / softcap if CAPPED else scale * 1.4426950408889634
    x = queries(q + batch * q_batch, q_row, q_head, row, head, inside, factor, D, BLOCK_D)
    group = group.to(tl.int64)
    channels += group * (BLOCK_D + 2 * BLOCK_DV)
    shift = 0.0
    if CAPPED:
        shift = tl.sum(x * tl.load(channels + tl.arange(0, BLOCK_D))[None, :], 1)
    most = tl.max(tl.abs(x), 1)
    step = tl.where(most > 0, most, 1.0) / 127.0
    x = nearest(x / step[:, None]).to(tl.int8)
    keys8 += group * room * BLOCK_D
    key_scales += group * room
    values8 += group * room * BLOCK_DV
    masks = 0
    if MASK != "none":
        masks = mask + batch * mask_batch + tl.where(inside, head * mask_head + row.to(tl.int64) * mask_row, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    a, b, c, e = tiles_of(block, rows, start, limit, window, BLOCK_M, BLOCK_N, GROUP, CAUSAL, WINDOWED, False)
    if WINDOWED:
        acc, top, total = over_tiles8(
            acc, top, total, x, step, shift, a, b, keys8, key_scales, values8, masks, room, mask_key, row + start,
            limit, window, softcap, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOWED, CAPPED, MASK, True,
        )  # fmt: skip
    acc, top, total = over_tiles8(
        acc, top, total, x, step, shift, b, c, keys8, key_scales, values8, masks, room, mask_key, row + start,
        limit, window, softcap, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOWED, CAPPED, MASK, False,
    )  # fmt: skip
    acc, top, total = over_tiles8(
        acc, top, total, x, step, shift, c, e, keys8, key_scales, values8, masks, room, mask_key, row + start,
        limit, window, softcap, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, WINDOWED, CAPPED, MASK, True,
    )  # fmt: skip
    at = channels + BLOCK_D + tl.arange(0, BLOCK_DV)
    width = tl.load(at + BLOCK_DV)
    if values8.dtype.element_ty == tl.float8e4nv:
        width = width / 448.0
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None] * width[None, :]
    out += tl.where(total == 0.0, 0.0, 1.0)[:, None] * tl.load(at)[None, :]
    write_rows(y + batch * y_batch, out, y_row, y_head, row, head, inside, DV, BLOCK_DV)

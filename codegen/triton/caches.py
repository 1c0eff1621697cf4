"""Rows written into caches at a position that is known on the device: as floats, or as records of 8 or 4 bits
(compiler/cache_ops.py)."""

import triton
import triton.language as tl

from sylvester.codegen.triton.rounding import nearest


@triton.jit
def all_finite(x, AXIS: tl.constexpr):
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32), AXIS) > 0


@triton.jit
def write8(place, x, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Records at addresses [ROWS] of x [ROWS, BLOCK_D], zeros past D."""
    d = tl.arange(0, BLOCK_D)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    valid = all_finite(x, 1)
    used = tl.where(valid & (scale > 0), scale, 1.0)
    n = tl.where((valid & (scale > 0))[:, None], nearest(tl.div_rn(x, tl.broadcast_to(used[:, None], x.shape))), 0.0)
    n = tl.minimum(tl.maximum(n, -127.0), 127.0).to(tl.int8)
    tl.store(place.to(tl.pointer_type(tl.float32)), tl.where(valid, scale, float("nan")), mask=keep)
    tl.store(
        (place + 4).to(tl.pointer_type(tl.int8))[:, None] + d[None, :],
        n,
        mask=keep[:, None] & (d < (D + 15) // 16 * 16)[None, :],
    )


@triton.jit
def write4(place, x, keep, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Records of 4 bits; a group of 64 features, or fewer, has a scale and a minimum."""
    WIDTH: tl.constexpr = 64 if BLOCK_D > 64 else BLOCK_D
    GROUPS: tl.constexpr = BLOCK_D // WIDTH
    g = tl.arange(0, GROUPS)
    inside = (g[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]) < D
    x = tl.reshape(x, [ROWS, GROUPS, WIDTH])
    low = tl.min(tl.where(inside, x, float("inf")), 2).to(tl.bfloat16).to(tl.float32) + 0.0
    high = tl.max(tl.where(inside, x, float("-inf")), 2)
    scale = tl.maximum(tl.div_rn(high - low, 15.0), 0.0).to(tl.bfloat16).to(tl.float32)
    valid = all_finite(x, 2) & (tl.abs(low) < float("inf")) & (scale < float("inf"))
    used = tl.where(valid & (scale > 0), scale, 1.0)[:, :, None]
    n = nearest(tl.div_rn(x - low[:, :, None], tl.broadcast_to(used, x.shape)))
    n = tl.where(inside & (valid & (scale > 0))[:, :, None], tl.minimum(tl.maximum(n, 0.0), 15.0), 0.0).to(tl.int32)
    pairs = tl.reshape(n, [ROWS, BLOCK_D // 32, 2, 16])
    packed = tl.reshape(tl.sum(pairs * (1 + 15 * tl.arange(0, 2)[None, None, :, None]), 2), [ROWS, BLOCK_D // 2])
    header = (place[:, None] + g[None, :] * 4).to(tl.pointer_type(tl.bfloat16))
    kept = keep[:, None] & (g * WIDTH < D)[None, :]
    tl.store(header, tl.where(valid, scale, float("nan")).to(tl.bfloat16), mask=kept)
    tl.store(header + 1, tl.where(valid, low, float("nan")).to(tl.bfloat16), mask=kept)
    b = tl.arange(0, BLOCK_D // 2)
    at = place[:, None] + (D + 63) // 64 * 4 + b[None, :]
    tl.store(at, packed.to(tl.uint8), mask=keep[:, None] & (b < (D + 31) // 32 * 16)[None, :])


@triton.jit
def kv_update(
    cache, other_cache, x, other_x, past, total, heads, rows, keys, cache_batch, cache_head, cache_row,
    x_batch, other_x_batch, x_head, other_x_head, x_row, other_x_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STORED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Row i of x [batch, heads, rows, D], `total` in all, becomes row *past + i of the cache, which has `keys`.

    PAIRED: as many programs after those do the same with the other x and cache.
    """
    program = tl.program_id(0)
    if PAIRED:
        first = tl.cdiv(total, ROWS)
        if program >= first:
            program, cache, x = program - first, other_cache, other_x
            x_batch, x_head, x_row = other_x_batch, other_x_head, other_x_row
    r = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, head, row = r // rows // heads, r // rows % heads, r % rows
    at = tl.load(past) + row
    keep = (r < total) & (at >= 0) & (at < keys)
    d = tl.arange(0, BLOCK_D)
    inside = keep[:, None] & (d < D)[None, :]
    source = x + batch * x_batch + head * x_head + row * x_row
    value = tl.load(source[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    place = cache + batch * cache_batch + head * cache_head + at * cache_row
    if STORED == "q8":
        write8(place, value, keep, D, BLOCK_D)
    elif STORED == "q4":
        write4(place, value, keep, D, BLOCK_D, ROWS)
    else:
        tl.store(place[:, None] + d[None, :], value.to(cache.dtype.element_ty), mask=inside)

"""Which rows a program of attention computes, over which tiles of keys, and how both are read."""

import triton
import triton.language as tl


@triton.jit
def packed(rows, kv_heads, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """What a program computes: its block of rows, its key head of the whole batch, its batch, and for its rows
    [BLOCK_M] whether they exist, their query and their head. The blocks that see the most keys start first."""
    blocks = tl.cdiv(rows * GROUP, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    group = tl.program_id(0) // blocks
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (group % kv_heads).to(tl.int64) * GROUP + r % GROUP
    return block, group, (group // kv_heads).to(tl.int64), r < rows * GROUP, r // GROUP, head


@triton.jit
def queries(q, row_stride, head_stride, row, head, inside, factor, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """float32 [BLOCK_M, BLOCK_D] times a factor, zeros past D."""
    d = tl.arange(0, BLOCK_D)
    at = q + (head * head_stride + row.to(tl.int64) * row_stride)[:, None] + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32) * factor


@triton.jit
def write_rows(y, out, row_stride, head_stride, row, head, inside, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    e = tl.arange(0, BLOCK_DV)
    at = y + (head * head_stride + row.to(tl.int64) * row_stride)[:, None] + e[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=inside[:, None] & (e < DV)[None, :])


@triton.jit
def tile_rows(
    at, stride, place, held,
    D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, STORED: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """The rows `place` [N] from `at` on [N, BLOCK]: floats, or records of 8 or 4 bits. Zeros past D, and where not
    `held`."""
    rows = at + place[:, None] * stride
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
        found = tl.reshape(groups4(rows, held, D, BLOCK, N, CHECKED), [N, BLOCK])
    else:
        found = tl.load(rows + d, mask=keep, other=0.0)
    return found


@triton.jit
def groups4(rows, held, D: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, CHECKED: tl.constexpr):
    """Records of 4 bits at addresses [N, 1] -> floats [N, groups, features of a group]."""
    WIDTH: tl.constexpr = 64 if BLOCK > 64 else BLOCK
    at = rows[:, :, None]
    g = tl.arange(0, BLOCK // WIDTH)[None, :, None]
    d = tl.arange(0, WIDTH)[None, None, :]
    some = tl.full([N, BLOCK // WIDTH, 1], 1, tl.int1)
    if CHECKED:
        some = some & held[:, None, None]
    some = some & (g * WIDTH < D)
    header = (at + g * 4).to(tl.pointer_type(tl.bfloat16))
    scale = tl.load(header, mask=some, other=0.0).to(tl.float32)
    least = tl.load(header + 1, mask=some, other=0.0).to(tl.float32)
    keep = some & (g * WIDTH + d < D)
    pair = tl.load(at + (D + 63) // 64 * 4 + g * (WIDTH // 2) + d // 32 * 16 + d % 16, mask=keep, other=0)
    return tl.where(keep, ((pair >> (d // 16 % 2 * 4).to(tl.uint8)) & 15).to(tl.float32) * scale + least, 0.0)


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
def tiles_of(
    block, rows, start, limit, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    TREE: tl.constexpr,
):  # fmt: skip
    """Tiles of keys for a block of rows, a <= b <= c <= e: some of a .. e - 1 is seen, all of b .. c - 1.

    Tokens of a TREE stand at `start` or after it, and all see the keys before it.
    """
    first = block * BLOCK_M // GROUP
    last = (tl.minimum((block + 1) * BLOCK_M, rows * GROUP) - 1) // GROUP
    most, sure = limit, limit
    if TREE:
        first = 0
        sure = tl.minimum(limit, start)
    elif CAUSAL:
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

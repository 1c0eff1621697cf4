"""y = x H^T / sqrt(block) on blocks of rows, H = B (x) S: as a matrix [R, W], a block becomes B' X S', on tensor cores.

S' is Sylvester's matrix of order W or, with R = 1, all of H; B' is the rest. Entries are 1 and -1, so bfloat16 holds
them; what they multiply is the sum of TERMS numbers in bfloat16, two for 16 bits and three for 24.
"""

import triton
import triton.language as tl

from sylvester.codegen.triton.rows import to_numbers


@triton.jit
def signs(base, i, j, H: tl.constexpr, LOG: tl.constexpr, TURNED: tl.constexpr):
    """bfloat16 entries (i, j) of B (x) S with B int8 [H, H] and S of order 2^LOG, or (j, i); 0 past the order."""
    both = i & j & (1 << LOG) - 1
    both ^= both >> 8
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    entries = (1 - 2 * (both & 1)).to(tl.float32)
    if TURNED:
        i, j = j, i
    inside = (i < H << LOG) & (j < H << LOG)
    if H > 1:
        entries *= tl.load(base + (i >> LOG) * H + (j >> LOG), inside, 0).to(tl.float32)
    return tl.where(inside, entries, 0.0).to(tl.bfloat16)


@triton.jit
def times_signs(x, s, acc, TERMS: tl.constexpr):
    """acc + x s, x float32 and s of signs."""
    for _ in tl.static_range(TERMS):
        term = x.to(tl.bfloat16)
        acc = tl.dot(term, s, acc)
        x -= term.to(tl.float32)
    return acc


@triton.jit
def signs_times(s, x, acc, TERMS: tl.constexpr):
    """acc + s x."""
    for _ in tl.static_range(TERMS):
        term = x.to(tl.bfloat16)
        acc = tl.dot(s, term, acc)
        x -= term.to(tl.float32)
    return acc


@triton.jit
def places(r, j, first, row, R: tl.constexpr, W: tl.constexpr, PER_ROW: tl.constexpr):
    """Offsets of rows r [rows, 1] of W values of the blocks from `first` on, in rows of memory of PER_ROW blocks."""
    block = first + r // R
    at = (block // PER_ROW).to(tl.int64) * row
    return at + (block % PER_ROW) * (R * W) + r % R * W + j


@triton.jit
def write(place, v, within, scales, MOST: tl.constexpr, STEP: tl.constexpr):
    """v as floats or, with MOST > 0, as the numbers of one row of memory, of which tl.program_id(0) is the scale."""
    if MOST > 0:
        if STEP:
            scale = tl.load(scales)
        else:
            scale = tl.div_rn(tl.max(tl.max(tl.where(within, tl.abs(v), 0.0), 1), 0), MOST * 1.0)
            tl.store(scales + tl.program_id(0), scale)
        tl.store(place, to_numbers(v, tl.zeros((v.shape[0],), tl.float32) + scale, MOST), within)
    else:
        tl.store(place, v.to(place.dtype.element_ty), within)


@triton.jit
def hadamard(
    x, y, scales, base, blocks, x_row, y_row, FACTOR: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, PER_ROW: tl.constexpr, BLOCKS: tl.constexpr, TURNED: tl.constexpr,
    H: tl.constexpr, LOG: tl.constexpr, INNER_H: tl.constexpr, INNER_LOG: tl.constexpr, TERMS_OF_X: tl.constexpr,
    TERMS: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks a program, of which program (_, t) has rows t ROWS .. of their [BLOCKS R, W].

    With MOST > 0, y is int8 numbers of one row of memory and `scales` [rows] its scale or, with STEP, what is read.
    """
    first = tl.program_id(0) * BLOCKS
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    inner = signs(base, j, tl.arange(0, COLUMNS)[:, None], INNER_H, INNER_LOG, TURNED)
    within = (r < BLOCKS * R) & (first + r // R < blocks) & (j < W)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if R == 1:
        v = tl.load(x + places(r, j, first, x_row, R, W, PER_ROW), within, 0.0).to(tl.float32)
        acc = times_signs(v, inner, acc, TERMS_OF_X)
    else:
        for start in range(0, BLOCKS * R, DEPTH):
            d = start + tl.arange(0, DEPTH)
            c = d[:, None]
            held = (c < BLOCKS * R) & (first + c // R < blocks) & (j < W)
            v = tl.load(x + places(c, j, first, x_row, R, W, PER_ROW), held, 0.0).to(tl.float32)
            v = times_signs(v, inner, tl.zeros((DEPTH, COLUMNS), tl.float32), TERMS_OF_X)
            outer = signs(base, r % R, d[None, :] % R, H, LOG, TURNED)
            outer = tl.where(r // R == d[None, :] // R, outer, 0.0)
            acc = signs_times(outer, v, acc, TERMS)
    place = y + places(r, j, first, y_row, R, W, PER_ROW)
    write(place, acc * FACTOR, within, scales, MOST, STEP)


@triton.jit
def hadamard_held(
    x, y, scales, base, blocks, x_row, y_row, FACTOR: tl.constexpr,
    R: tl.constexpr, A: tl.constexpr, B: tl.constexpr, PER_ROW: tl.constexpr, TURNED: tl.constexpr, H: tl.constexpr,
    LOG: tl.constexpr, A_LOG: tl.constexpr, B_LOG: tl.constexpr, TERMS_OF_X: tl.constexpr, TERMS: tl.constexpr,
    MOST: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`hadamard` of one block a program, all of it at once as [R, B, A]: a product along each axis."""
    first = tl.program_id(0)
    r = tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, A * B)[None, :]
    within = (r < R) & (j < A * B)
    v = tl.load(x + places(r, j, first, x_row, R, A * B, PER_ROW), within, 0.0).to(tl.float32)
    a = tl.arange(0, A)
    v = tl.reshape(v, (ROWS * B, A))
    v = times_signs(v, signs(base, a[:, None], a[None, :], 1, A_LOG, False), tl.zeros_like(v), TERMS_OF_X)
    b = tl.arange(0, B)
    v = tl.reshape(tl.permute(tl.reshape(v, (ROWS, B, A)), (0, 2, 1)), (ROWS * A, B))
    v = times_signs(v, signs(base, b[:, None], b[None, :], 1, B_LOG, False), tl.zeros_like(v), TERMS)
    v = tl.reshape(tl.permute(tl.reshape(v, (ROWS, A, B)), (0, 2, 1)), (ROWS, A * B))
    outer = signs(base, r, tl.arange(0, ROWS)[None, :], H, LOG, TURNED)
    v = signs_times(outer, v, tl.zeros_like(v), TERMS)
    write(y + places(r, j, first, y_row, R, A * B, PER_ROW), v * FACTOR, within, scales, MOST, STEP)

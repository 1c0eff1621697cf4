"""Rotary position embedding (Su et al., 2021): pairs of features turn by an angle per position."""

import triton
import triton.language as tl


@triton.jit
def rope(
    y, other_y, x, other_x, cos, sin, total, other_total, heads, other_heads, rows, y_batch, other_y_batch,
    y_head, other_y_head, y_row, other_y_row, x_batch, other_x_batch, x_head, other_x_head, x_row, other_x_row,
    angle_batch, angle_row,
    D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALVED: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """y of x [batch, heads, rows, D], `total` rows in all; features past ROTARY are copied. y is not x.

    cos and sin [batch, rows, ...] hold an angle a feature, or HALVED an angle a pair. PAIRED: programs after
    those do the same with the other x, of as many rows a head.
    """
    program = tl.program_id(0)
    if PAIRED:
        first = tl.cdiv(total, ROWS)
        if program >= first:
            program, y, x, total, heads = program - first, other_y, other_x, other_total, other_heads
            y_batch, y_head, y_row = other_y_batch, other_y_head, other_y_row
            x_batch, x_head, x_row = other_x_batch, other_x_head, other_x_row
    r = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, head, row = r // rows // heads, r // rows % heads, r % rows
    d = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        partner = d ^ 1
        pair = d // 2
        first = d % 2 == 0
    else:
        first = d < ROTARY // 2
        partner = tl.where(first, d + ROTARY // 2, d - ROTARY // 2)
        pair = tl.where(first, d, d - ROTARY // 2)
    inside = (r < total)[:, None] & (d < D)[None, :]
    turning = (r < total)[:, None] & (d < ROTARY)[None, :]
    source = x + (batch * x_batch + head * x_head + row * x_row)[:, None]
    value = tl.load(source + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=turning, other=0.0).to(tl.float32)
    angle = (batch * angle_batch + row * angle_row)[:, None] + (pair if HALVED else d)[None, :]
    c = tl.load(cos + angle, mask=turning, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turning, other=0.0).to(tl.float32)
    out = value * c + tl.where(first[None, :], -other, other) * s
    at = y + (batch * y_batch + head * y_head + row * y_row)[:, None] + d[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=inside)

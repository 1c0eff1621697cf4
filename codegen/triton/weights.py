"""Tiles of a stored weight [n, k]: floats and int8 as they are, packed int4 and int3 as int8 (compiler/packing.py)."""

import triton
import triton.language as tl


@triton.jit
def weight_tile(w, at, start, k, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] of rows that begin at w + at, from column `start`; what lies past k is finite."""
    if BITS == 4:
        packed = stored_tile(w, at, start // 2, k // 2, EVEN, BLOCK_K // 2)
        tile = tl.interleave(packed & 15, packed >> 4).to(tl.int8) - 8
    elif BITS == 3:
        low = stored_tile(w, at, start // 4, k // 4, EVEN, BLOCK_K // 4)
        high = stored_tile(w + k // 4, at, start // 8, k // 8, EVEN, BLOCK_K // 8)
        tile = (four_fields(low) | eight_fields(high) << 2).to(tl.int8) - 4
    else:
        tile = stored_tile(w, at, start, k, EVEN, BLOCK_K)
    return tile


@triton.jit
def stored_tile(w, at, start, k, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] as it is in memory, 0 past k."""
    j = start + tl.arange(0, BLOCK_K)
    place = w + at[:, None] + j[None, :]
    return tl.load(place) if EVEN else tl.load(place, j[None, :] < k, 0.0)


@triton.jit
def turned_tile(w, j, c, w_row, needed, n):
    """[rows, columns] of W^T [k, w_row]: rows j that are `needed` and columns c < n, 0 elsewhere."""
    place = w + (j.to(tl.int64) * w_row)[:, None] + c[None, :]
    return tl.load(place, needed[:, None] & (c[None, :] < n), 0.0)


@triton.jit
def tile_of_either(
    w, at, c, w_row, start, n, k, TURNED: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`weight_tile` of W, or of W^T where it is stored TURNED."""
    if TURNED:
        j = start + tl.arange(0, BLOCK_K)
        tile = tl.trans(turned_tile(w, j, c, w_row, j < k, n))
    else:
        tile = weight_tile(w, at, start, k, BITS, EVEN, BLOCK_K)
    return tile


@triton.jit
def four_fields(b):
    """Two bits each, from the lowest up: [rows, bytes] -> [rows, 4 bytes]."""
    even = tl.interleave(b & 3, b >> 4 & 3)
    return tl.interleave(even, tl.interleave(b >> 2 & 3, b >> 6))


@triton.jit
def eight_fields(b):
    """One bit each, from the lowest up: [rows, bytes] -> [rows, 8 bytes]."""
    first = tl.interleave(tl.interleave(b & 1, b >> 4 & 1), tl.interleave(b >> 2 & 1, b >> 6 & 1))
    second = tl.interleave(tl.interleave(b >> 1 & 1, b >> 5 & 1), tl.interleave(b >> 3 & 1, b >> 7))
    return tl.interleave(first, second)


@triton.jit
def convert(v, TYPE: tl.constexpr):
    """v as what is multiplied; rounded rows and weights are that already."""
    if TYPE == "fp16":
        v = v.to(tl.float16)
    if TYPE == "bf16":
        v = v.to(tl.bfloat16)
    if TYPE == "fp32":
        v = v.to(tl.float32)
    return v


@triton.jit
def by_columns(acc, scales, rows, GROUP: tl.constexpr):
    """acc [m, n] times the scales of channels; those of groups are in it already."""
    if GROUP == 0:
        acc *= tl.load(scales + rows).to(tl.float32)[None, :]
    return acc

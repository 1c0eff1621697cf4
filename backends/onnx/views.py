"""ATen ops that only move values: shapes, slices, concatenations, look-ups."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, equal, is_number, translates
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten
END = sys.maxsize


@translates(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view_as.default,
)  # fmt: skip
def reshape(b: Builder, fact: Tensor, x: Operand, *_: Any) -> ir.Value:
    return b.reshape(x.value, fact.shape, x.shape)


@translates(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(b: Builder, fact: Tensor, x: Operand, *_: Any) -> ir.Value:
    return b.reshape(x.value, fact.shape, x.shape)


@translates(aten.unsqueeze.default)
def unsqueeze(b: Builder, fact: Tensor, x: Operand, dim: int) -> ir.Value:
    return b.call("Unsqueeze", x.value, b.ints(dim))


@translates(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def expand(b: Builder, fact: Tensor, x: Operand, *_: Any, **__: Any) -> ir.Value:
    new = fact.dim() - x.rank
    kept = [d >= new and equal(n, x.shape[d - new]) for d, n in enumerate(fact.shape)]
    sizes = [1 if kept[d] else n for d, n in enumerate(fact.shape)]
    return x.value if all(kept) else b.call("Expand", x.value, b.shape(sizes))


@translates(aten.permute.default)
def permute(b: Builder, fact: Tensor, x: Operand, dims: Sequence[int]) -> ir.Value:
    return b.call("Transpose", x.value, perm=[d % x.rank for d in dims])


@translates(aten.transpose.int, aten.swapaxes.default)
def transpose(b: Builder, fact: Tensor, x: Operand, first: int, second: int) -> ir.Value:
    order = list(range(x.rank))
    order[first], order[second] = order[second], order[first]
    return b.call("Transpose", x.value, perm=order)


@translates(aten.t.default, aten.numpy_T.default)
def reverse_axes(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Transpose", x.value, perm=list(reversed(range(x.rank))))


@translates(aten.mT.default)
def matrix_transpose(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return transpose(b, fact, x, -1, -2)


@translates(aten.movedim.int)
def movedim(b: Builder, fact: Tensor, x: Operand, source: int, target: int) -> ir.Value:
    order = [d for d in range(x.rank) if d != source % x.rank]
    order.insert(target % x.rank, source % x.rank)
    return b.call("Transpose", x.value, perm=order)


def cut(b: Builder, x: ir.Value, axis: int, start: Any, end: Any, step: int = 1) -> ir.Value:
    """x[start:end:step] along an axis."""
    return b.call("Slice", x, b.size(start), b.size(end), b.ints(axis), b.ints(step))


@translates(aten.slice.Tensor)
def slice_(
    b: Builder, fact: Tensor, x: Operand, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> ir.Value:
    start, end = 0 if start is None else start, END if end is None else end
    if step == 1 and is_number(start) and start == 0 and equal(fact.shape[dim], x.shape[dim]):
        return x.value
    return cut(b, x.value, dim, start, end, step)


@translates(aten.narrow.default)
def narrow(b: Builder, fact: Tensor, x: Operand, dim: int, start: Any, length: Any) -> ir.Value:
    return cut(b, x.value, dim, start, start + length)


@translates(aten.select.int)
def select(b: Builder, fact: Tensor, x: Operand, dim: int, index: Any) -> ir.Value:
    return b.call("Gather", x.value, b.read(index, torch.int64), axis=dim)


@translates(aten.flip.default)
def flip(b: Builder, fact: Tensor, x: Operand, dims: Sequence[int]) -> ir.Value:
    count = len(dims)
    starts, ends, steps = [-1] * count, [-END] * count, [-1] * count
    return b.call("Slice", x.value, *(b.ints(*n) for n in (starts, ends, dims, steps)))


@translates(aten.roll.default)
def roll(b: Builder, fact: Tensor, x: Operand, shifts: Sequence[int], dims: Sequence[int] = ()) -> ir.Value:
    flat = not dims
    found = b.reshape(x.value, [-1]) if flat else x.value
    for shift, dim in zip(shifts, dims or [0], strict=True):
        size = b.call("Size", found) if flat else b.read(x.shape[dim], torch.int64)
        by = b.call("Mod", b.number(shift, torch.int64), size)
        start = b.call("Unsqueeze", b.call("Sub", size, by), b.ints(0))
        parts = [
            b.call("Slice", found, start, b.ints(END), b.ints(dim)),
            b.call("Slice", found, b.ints(0), start, b.ints(dim)),
        ]
        found = b.call("Concat", *parts, axis=dim)
    return b.reshape(found, fact.shape) if flat else found


@translates(aten.repeat.default)
def repeat(b: Builder, fact: Tensor, x: Operand, repeats: Sequence[Any]) -> ir.Value:
    new = [1] * (len(repeats) - x.rank)
    return b.call("Tile", b.reshape(x.value, [*new, *x.shape]) if new else x.value, b.shape(repeats))


@translates(aten.repeat_interleave.self_int)
def repeat_interleave(b: Builder, fact: Tensor, x: Operand, repeats: Any, dim: int | None = None, **_: Any) -> ir.Value:
    axis = x.rank if dim is None else dim % x.rank + 1
    spread = b.call("Unsqueeze", x.value, b.ints(axis))
    sizes = [repeats if d == axis else 1 for d in range(x.rank + 1)]
    return b.reshape(b.call("Expand", spread, b.shape(sizes)), fact.shape)


@translates(aten.cat.default)
def cat(b: Builder, fact: Tensor, parts: Sequence[Operand], dim: int = 0) -> ir.Value:
    return b.call("Concat", *(b.read(part, fact.dtype) for part in parts), axis=dim)


@translates(aten.stack.default)
def stack(b: Builder, fact: Tensor, parts: Sequence[Operand], dim: int = 0) -> ir.Value:
    spread = [b.call("Unsqueeze", b.read(part, fact.dtype), b.ints(dim)) for part in parts]
    return b.call("Concat", *spread, axis=dim)


@translates(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default)
def split(b: Builder, facts: Sequence[Tensor], x: Operand, _: Any, dim: int = 0) -> Sequence[ir.Value]:
    if len(facts) == 1:
        return [x.value]
    return b.calls("Split", x.value, b.shape([fact.shape[dim] for fact in facts]), count=len(facts), axis=dim)


@translates(aten.unbind.int)
def unbind(b: Builder, facts: Sequence[Tensor], x: Operand, dim: int = 0) -> Sequence[ir.Value]:
    return [b.call("Gather", x.value, b.number(n, torch.int64), axis=dim) for n in range(len(facts))]


@translates(aten.diff.default)
def diff(b: Builder, fact: Tensor, x: Operand, n: int = 1, dim: int = -1, *_: Any) -> ir.Value:
    found = x.value
    for _step in range(n):
        found = b.call("Sub", cut(b, found, dim, 1, END), cut(b, found, dim, 0, -1))
    return found


@translates(aten.pixel_shuffle.default)
def pixel_shuffle(b: Builder, fact: Tensor, x: Operand, factor: int) -> ir.Value:
    return b.call("DepthToSpace", x.value, blocksize=factor, mode="CRD")


@translates(aten.tril.default)
def tril(b: Builder, fact: Tensor, x: Operand, diagonal: int = 0) -> ir.Value:
    return _triangle(b, x, diagonal, 0)


@translates(aten.triu.default)
def triu(b: Builder, fact: Tensor, x: Operand, diagonal: int = 0) -> ir.Value:
    return _triangle(b, x, diagonal, 1)


def _triangle(b: Builder, x: Operand, diagonal: int, upper: int) -> ir.Value:
    whole = torch.int64 if x.dtype == torch.bool else x.dtype
    found = b.call("Trilu", b.read(x, whole), b.number(diagonal, torch.int64), upper=upper)
    return b.cast(found, whole, x.dtype)


@translates(aten.index_select.default)
def index_select(b: Builder, fact: Tensor, x: Operand, dim: int, indices: Operand) -> ir.Value:
    return b.call("Gather", x.value, indices.value, axis=dim)


@translates(aten.gather.default)
def gather(b: Builder, fact: Tensor, x: Operand, dim: int, indices: Operand, **_: Any) -> ir.Value:
    """ONNX indices span the other axes of x as well: those of x are cut to them."""
    found = x.value
    for d, (own, other) in enumerate(zip(x.shape, indices.shape, strict=True)):
        if d != dim % x.rank and not equal(own, other):
            found = cut(b, found, d, 0, other)
    return b.call("GatherElements", found, indices.value, axis=dim)


@translates(aten.index.Tensor)
def index(b: Builder, fact: Tensor, x: Operand, indices: Sequence[Operand | None]) -> ir.Value:
    """Indices of neighbouring axes; those are moved to the front and back."""
    axes = [d for d, given in enumerate(indices) if given is not None]
    given = [i for i in indices if i is not None]
    if any(i.dtype == torch.bool for i in given):
        raise Unsupported("an index by a mask has a size that is not known before the call")
    if len(axes) == 1:
        return b.call("Gather", x.value, b.read(given[0], torch.int64), axis=axes[0])
    others = [d for d in range(x.rank) if d not in axes]
    moved = b.call("Transpose", x.value, perm=[*axes, *others]) if axes != list(range(len(axes))) else x.value
    rank = max(i.rank for i in given)
    tail = fact.dim() - len(others) - rank
    shape = _indexed_shape(fact, axes, rank)
    columns = [b.call("Expand", b.read(i, torch.int64), b.shape(shape)) for i in given]
    found = b.call("GatherND", moved, b.call("Concat", *(b.call("Unsqueeze", c, b.ints(-1)) for c in columns), axis=-1))
    first = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    if first == 0 or tail:
        return found
    order = [*range(rank, rank + first), *range(rank), *range(rank + first, fact.dim())]
    return b.call("Transpose", found, perm=order)


def _indexed_shape(fact: Tensor, axes: Sequence[int], rank: int) -> Sequence[Any]:
    """The shape of the indices broadcast together, as it stands in the result."""
    first = axes[0] if list(axes) == list(range(axes[0], axes[-1] + 1)) else 0
    return fact.shape[first : first + rank]


@translates(aten.pad.default, aten.constant_pad_nd.default)
def pad(
    b: Builder, fact: Tensor, x: Operand, amounts: Sequence[int], mode: Any = "constant", number: Any = None
) -> ir.Value:
    """`constant_pad_nd` has the number in place of the mode."""
    if not isinstance(mode, str):
        mode, number = "constant", mode
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    if mode == "circular":
        b.require_opset(19, "circular padding")
    count = len(amounts) // 2
    axes = [x.rank - 1 - n for n in range(count)]
    filler = b.number(number or 0, x.dtype) if mode == "constant" else None
    pads = b.ints(*amounts[::2], *amounts[1::2])
    return b.call("Pad", x.value, pads, filler, b.ints(*axes), mode=modes[mode])

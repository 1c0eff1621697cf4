"""Ops that rearrange values without arithmetic: views, slices, repetition, concatenation, splitting."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sylvester.codegen.index import Index, flatten, index, product, unflatten
from sylvester.codegen.lazy import Buffer, Indices, Lazy, Shape, Store, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import cast
from sylvester.codegen.shapes import shape_of, size

aten = torch.ops.aten
END = 2**62
Move = Callable[[Indices], list[Index]]


def reindexed(fact: Fact, source: Lazy, where: Callable[[Indices], Sequence[Index]]) -> Lazy:
    """result[i] = source[where(i)]."""
    return Lazy(fact.shape, fact.dtype, lambda i: source.load(where(i)))


def along(dim: int, rank: int, move: Callable[[Index], Index]) -> Move:
    """Indices with the one of axis `dim` moved."""
    axis = dim % max(rank, 1)
    return lambda i: [*i[:axis], move(i[axis]), *i[axis + 1 :]]


def shifted(dim: int, rank: int, start: Index) -> Move:
    return along(dim, rank, lambda x: x + start)


@lowers(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default,
)  # fmt: skip
def reshape(_: Lowering, fact: Fact, a: Lazy, *__: object) -> Lazy:
    if _units_dropped(fact.shape) == _units_dropped(a.shape):
        return reindexed(fact, a, lambda i: _insert_units(_drop_units(i, fact.shape), a.shape))
    return reindexed(fact, a, lambda i: unflatten(flatten(i, fact.shape), a.shape))


def _units_dropped(shape: Shape) -> list[Index]:
    return [n for n in shape if n.constant != 1]


def _drop_units(indices: Indices, shape: Shape) -> list[Index]:
    return [i for i, n in zip(indices, shape, strict=True) if n.constant != 1]


def _insert_units(indices: list[Index], shape: Shape) -> list[Index]:
    rest = iter(indices)
    return [index(0) if n.constant == 1 else next(rest) for n in shape]


@lowers(aten.permute.default)
def permute(_: Lowering, fact: Fact, a: Lazy, dims: Sequence[int]) -> Lazy:
    rank = len(dims)
    places = [d % rank for d in dims]
    return reindexed(fact, a, lambda i: [i[places.index(d)] for d in range(rank)])


@lowers(aten.transpose.int, aten.swapaxes.default)
def transpose(_: Lowering, fact: Fact, a: Lazy, first: int, second: int) -> Lazy:
    order = list(range(len(a.shape)))
    order[first], order[second] = order[second], order[first]
    return reindexed(fact, a, lambda i: [i[d] for d in order])


@lowers(aten.mT.default)
def matrix_transpose(lowering: Lowering, fact: Fact, a: Lazy) -> Lazy:
    return transpose(lowering, fact, a, -2, -1)


@lowers(aten.movedim.int)
def movedim(lowering: Lowering, fact: Fact, a: Lazy, source: int, destination: int) -> Lazy:
    rank = len(a.shape)
    order = [d for d in range(rank) if d != source % rank]
    order.insert(destination % rank, source % rank)
    return permute(lowering, fact, a, order)


@lowers(aten.t.default, aten.numpy_T.default)
def t(_: Lowering, fact: Fact, a: Lazy) -> Lazy:
    return reindexed(fact, a, lambda i: list(reversed(i)))


@lowers(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(_: Lowering, fact: Fact, a: Lazy, *__: object, **___: object) -> Lazy:
    return Lazy(fact.shape, fact.dtype, a.at)


def position(n: Any, extent: Index) -> Index:
    """A Python-style position (negative counts from the end) inside [0, extent]."""
    start, limit = size(n), extent.constant
    known = start.constant
    if known is None:
        return start
    if limit is not None:
        return index(min(max(known + limit, 0) if known < 0 else known, limit))
    return extent + known if known < 0 else extent if known > END else start


@lowers(aten.slice.Tensor)
def slice_(_: Lowering, fact: Fact, a: Lazy, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Lazy:
    first = position(0 if start is None else start, a.shape[dim])
    return reindexed(fact, a, along(dim, len(a.shape), lambda x: first + x * step))


@lowers(aten.select.int)
def select(_: Lowering, fact: Fact, a: Lazy, dim: int, at: Any) -> Lazy:
    dim %= len(a.shape)
    chosen = position(at, a.shape[dim])
    return reindexed(fact, a, lambda i: [*i[:dim], chosen, *i[dim:]])


@lowers(aten.narrow.default)
def narrow(lowering: Lowering, fact: Fact, a: Lazy, dim: int, start: Any, length: Any) -> Lazy:
    return slice_(lowering, fact, a, dim, start)


@lowers(aten.unfold.default)
def unfold(_: Lowering, fact: Fact, a: Lazy, dim: int, width: int, step: int) -> Lazy:
    """Windows along an axis; the place in the window becomes the last axis."""
    dim %= len(a.shape)
    return reindexed(fact, a, lambda i: [*i[:dim], i[dim] * step + i[-1], *i[dim + 1 : -1]])


@lowers(aten.diagonal.default)
def diagonal(_: Lowering, fact: Fact, a: Lazy, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Lazy:
    rank = len(a.shape)
    first, second = dim1 % rank, dim2 % rank

    def where(i: Indices) -> list[Index]:
        rest = iter(i[:-1])
        place = {first: i[-1] + max(-offset, 0), second: i[-1] + max(offset, 0)}
        return [place[d] if d in place else next(rest) for d in range(rank)]

    return reindexed(fact, a, where)


@lowers(aten.flip.default)
def flip(_: Lowering, fact: Fact, a: Lazy, dims: Sequence[int]) -> Lazy:
    flipped = {d % len(a.shape) for d in dims}
    return reindexed(fact, a, lambda i: [a.shape[d] - 1 - x if d in flipped else x for d, x in enumerate(i)])


@lowers(aten.roll.default)
def roll(lowering: Lowering, fact: Fact, a: Lazy, shifts: Any, dims: Any = ()) -> Lazy:
    """Cyclic shifts along axes, or of the flattened values when no axis is given."""
    steps, axes = ([x] if isinstance(x, (int, Index)) else list(x) for x in (shifts, dims))
    steps = [size(s) for s in steps]
    if axes:
        moved = dict(zip([d % len(a.shape) for d in axes], steps, strict=True))
        return reindexed(fact, a, lambda i: [(x - moved[d]) % a.shape[d] if d in moved else x for d, x in enumerate(i)])
    count = product(a.shape)
    return reindexed(fact, a, lambda i: unflatten((flatten(i, a.shape) - steps[0]) % count, a.shape))


@lowers(aten.repeat.default)
def repeat(_: Lowering, fact: Fact, a: Lazy, *__: object) -> Lazy:
    lead = len(fact.shape) - len(a.shape)
    return reindexed(fact, a, lambda i: [x % n for x, n in zip(i[lead:], a.shape, strict=True)])


@lowers(aten.repeat_interleave.self_int)
def repeat_interleave(_: Lowering, fact: Fact, a: Lazy, times: int, dim: int | None = None, **__: object) -> Lazy:
    if dim is None:
        return reindexed(fact, a, lambda i: unflatten(i[0] // times, a.shape))
    return reindexed(fact, a, along(dim, len(a.shape), lambda x: x // times))


@lowers(aten.pixel_shuffle.default)
def pixel_shuffle(_: Lowering, fact: Fact, a: Lazy, factor: int) -> Lazy:
    """Channels [c, factor, factor] become pixels (Shi et al., 2016)."""

    def where(i: Indices) -> list[Index]:
        *outer, channel, y, x = i
        return [*outer, (channel * factor + y % factor) * factor + x % factor, y // factor, x // factor]

    return reindexed(fact, a, where)


@lowers(aten.pixel_unshuffle.default)
def pixel_unshuffle(_: Lowering, fact: Fact, a: Lazy, factor: int) -> Lazy:
    def where(i: Indices) -> list[Index]:
        *outer, channel, y, x = i
        tap = channel % (factor * factor)
        return [*outer, channel // (factor * factor), y * factor + tap // factor, x * factor + tap % factor]

    return reindexed(fact, a, where)


@lowers(aten.cat.default)
def cat(lowering: Lowering, fact: Fact, parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    """Each part is stored at its place in one buffer; parts without elements are left out."""
    buffer = lowering.buffer("arena", fact.shape, fact.dtype)
    start = index(0)
    for part in (p for p in parts if not any(n.constant == 0 for n in p.shape)):
        lowering.plan.steps.append(_stored_at(buffer, part, shifted(dim, len(fact.shape), start)))
        start = start + part.shape[dim]
    return of_buffer(buffer)


def _stored_at(buffer: Buffer, part: Lazy, move: Move) -> Store:
    dtype = buffer.dtype
    return Store(buffer.name, part.shape, dtype, lambda i: cast(part.load(i), dtype), lambda i: buffer.offset(move(i)))


@lowers(aten.stack.default)
def stack(lowering: Lowering, fact: Fact, parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    dim %= len(fact.shape)
    return cat(lowering, fact, [_widened(part, dim) for part in parts], dim)


def _widened(a: Lazy, dim: int) -> Lazy:
    """With a new axis of size 1 at `dim`."""
    shape = (*a.shape[:dim], index(1), *a.shape[dim:])
    return Lazy(shape, a.dtype, lambda i: a.load([*i[:dim], *i[dim + 1 :]]))


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
def split(lowering: Lowering, facts: Sequence[Any], a: Lazy, sizes: object, dim: int = 0) -> list[Lazy]:
    source, start = of_buffer(lowering.contiguous(a)), index(0)
    parts = []
    for fact in facts:
        described = Fact(shape_of(fact), a.dtype)
        parts.append(reindexed(described, source, shifted(dim, len(a.shape), start)))
        start = start + described.shape[dim]
    return parts


@lowers(aten.unbind.int)
def unbind(lowering: Lowering, facts: Sequence[Any], a: Lazy, dim: int = 0) -> list[Lazy]:
    source = of_buffer(lowering.contiguous(a))
    return [select(lowering, Fact(shape_of(fact), a.dtype), source, dim, n) for n, fact in enumerate(facts)]


@lowers(operator.getitem)
def getitem(_: Lowering, fact: Any, parts: Sequence[Any], at: int) -> Any:
    """One result of an op with several."""
    return parts[at]

"""Ops that move or make values without arithmetic: views, slices, gathers, constants, concatenation, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sylvester.codegen.aten_pointwise import call, value_of
from sylvester.codegen.index import Index, Loaded, atom, flatten, index, sum_of, unflatten
from sylvester.codegen.lazy import Indices, Lazy, Store, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, element, lowers
from sylvester.codegen.scalar import Constant, Expr, IndexValue, cast
from sylvester.codegen.shapes import size

aten, dialect = torch.ops.aten, torch.ops.sylvester
END = 2**62


def reindexed(fact: Fact, source: Lazy, where: Callable[[Indices], Sequence[Index]]) -> Lazy:
    """result[i] = source[where(i)]."""
    return Lazy(fact.shape, fact.dtype, lambda i: source.load(where(i)))


@lowers(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default,
)  # fmt: skip
def reshape(_: Lowering, fact: Fact, a: Lazy, *__: object) -> Lazy:
    if sorted(map(str, _units(fact.shape))) == sorted(map(str, _units(a.shape))) and _units(fact.shape) == _units(a.shape):
        return reindexed(fact, a, lambda i: _insert_units(_drop_units(i, fact.shape), a.shape))
    return reindexed(fact, a, lambda i: unflatten(flatten(i, fact.shape), a.shape))


def _units(shape: Sequence[Index]) -> list[Index]:
    return [n for n in shape if n.constant != 1]


def _drop_units(indices: Indices, shape: Sequence[Index]) -> list[Index]:
    return [i for i, n in zip(indices, shape, strict=True) if n.constant != 1]


def _insert_units(indices: list[Index], shape: Sequence[Index]) -> list[Index]:
    rest = iter(indices)
    return [index(0) if n.constant == 1 else next(rest) for n in shape]


@lowers(aten.permute.default)
def permute(_: Lowering, fact: Fact, a: Lazy, order: Sequence[int]) -> Lazy:
    rank = len(order)
    places = [d % rank for d in order]
    return reindexed(fact, a, lambda i: [i[places.index(d)] for d in range(rank)])


@lowers(aten.transpose.int)
def transpose(lowering: Lowering, fact: Fact, a: Lazy, first: int, second: int) -> Lazy:
    order = list(range(len(a.shape)))
    order[first], order[second] = order[second], order[first]
    return reindexed(fact, a, lambda i: [i[d] for d in order])


@lowers(aten.t.default)
def t(_: Lowering, fact: Fact, a: Lazy) -> Lazy:
    return reindexed(fact, a, lambda i: list(reversed(i)))


@lowers(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(_: Lowering, fact: Fact, a: Lazy, *__: object, **___: object) -> Lazy:
    return Lazy(fact.shape, fact.dtype, a.at)


def position(n: Any, extent: Index) -> Index:
    """A Python-style position (negative counts from the end) inside [0, extent]."""
    start = size(n)
    known = start.constant
    if known is not None and known < 0:
        return extent + known
    return extent if known is not None and known > END else start


@lowers(aten.slice.Tensor)
def slice_(_: Lowering, fact: Fact, a: Lazy, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Lazy:
    dim %= len(a.shape)
    first = position(start or 0, a.shape[dim])
    return reindexed(fact, a, lambda i: [*i[:dim], first + i[dim] * step, *i[dim + 1 :]])


@lowers(aten.select.int)
def select(_: Lowering, fact: Fact, a: Lazy, dim: int, at: Any) -> Lazy:
    dim %= len(a.shape)
    chosen = position(at, a.shape[dim])
    return reindexed(fact, a, lambda i: [*i[:dim], chosen, *i[dim:]])


@lowers(aten.narrow.default)
def narrow(lowering: Lowering, fact: Fact, a: Lazy, dim: int, start: Any, length: Any) -> Lazy:
    result: Lazy = slice_(lowering, fact, a, dim, start)
    return result


@lowers(aten.flip.default)
def flip(_: Lowering, fact: Fact, a: Lazy, dims: Sequence[int]) -> Lazy:
    flipped = {d % len(a.shape) for d in dims}
    return reindexed(fact, a, lambda i: [n - 1 - x if d in flipped else x for d, (x, n) in enumerate(zip(i, a.shape, strict=True))])


@lowers(aten.roll.default)
def roll(_: Lowering, fact: Fact, a: Lazy, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Lazy:
    moved = {d % len(a.shape): size(s) for d, s in zip(dims, shifts, strict=True)}
    return reindexed(
        fact, a, lambda i: [(x + n - moved[d]) % n if d in moved else x for d, (x, n) in enumerate(zip(i, a.shape, strict=True))]
    )


@lowers(aten.repeat.default)
def repeat(_: Lowering, fact: Fact, a: Lazy, *__: object) -> Lazy:
    lead = len(fact.shape) - len(a.shape)
    return reindexed(fact, a, lambda i: [x % n for x, n in zip(i[lead:], a.shape, strict=True)])


@lowers(aten.repeat_interleave.self_int)
def repeat_interleave(_: Lowering, fact: Fact, a: Lazy, times: int, dim: int | None = None, **__: object) -> Lazy:
    if dim is None:
        return reindexed(fact, a, lambda i: unflatten(i[0] // times, a.shape))
    dim %= len(a.shape)
    return reindexed(fact, a, lambda i: [*i[:dim], i[dim] // times, *i[dim + 1 :]])


@lowers(aten.cat.default)
def cat(lowering: Lowering, fact: Fact, parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    """Each part is stored at its place in one buffer."""
    dim %= len(fact.shape)
    buffer = lowering.buffer("arena", fact.shape, fact.dtype)
    start = index(0)
    for part in parts:
        def place(i: Indices, start: Index = start) -> Index:
            return buffer.offset([*i[:dim], i[dim] + start, *i[dim + 1 :]])

        def make(i: Indices, part: Lazy = part) -> Expr:
            return cast(part.load(i), fact.dtype)

        lowering.plan.steps.append(Store(buffer.name, part.shape, fact.dtype, make, place))
        start = start + part.shape[dim]
    return of_buffer(buffer)


@lowers(aten.stack.default)
def stack(lowering: Lowering, fact: Fact, parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    dim %= len(fact.shape)
    widened = []
    for part in parts:
        shape = (*part.shape[:dim], index(1), *part.shape[dim:])
        widened.append(Lazy(shape, part.dtype, lambda i, part=part: part.load([*i[:dim], *i[dim + 1 :]])))
    result: Lazy = cat(lowering, fact, widened, dim)
    return result


def _split_parts(a: Lazy, facts: Sequence[Any], dim: int) -> list[Lazy]:
    from sylvester.codegen.shapes import shape_of

    dim %= len(a.shape)
    parts, start = [], index(0)
    for fact in facts:
        described = Fact(shape_of(fact), a.dtype)
        parts.append(reindexed(described, a, lambda i, start=start: [*i[:dim], i[dim] + start, *i[dim + 1 :]]))
        start = start + described.shape[dim]
    return parts


@lowers(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
def split(lowering: Lowering, facts: Sequence[Any], a: Lazy, sizes: object, dim: int = 0) -> list[Lazy]:
    whole = lowering.contiguous(a)
    return _split_parts(of_buffer(whole), facts, dim)


@lowers(aten.unbind.int)
def unbind(lowering: Lowering, facts: Sequence[Any], a: Lazy, dim: int = 0) -> list[Lazy]:
    dim %= len(a.shape)
    source = of_buffer(lowering.contiguous(a))
    shape = (*a.shape[:dim], *a.shape[dim + 1 :])
    return [Lazy(shape, a.dtype, lambda i, n=n: source.load([*i[:dim], index(n), *i[dim:]])) for n in range(len(facts))]


def loaded(value: Expr, limit: Index) -> Index:
    """A position read from memory, checked at run time against [0, limit)."""
    if isinstance(value, IndexValue):
        return value.index
    return atom(Loaded(cast(value, "i64"), limit))


@lowers(aten.embedding.default)
def embedding(_: Lowering, fact: Fact, table: Lazy, ids: Lazy, *__: object, **___: object) -> Lazy:
    rank = len(ids.shape)
    return reindexed(fact, table, lambda i: [loaded(ids.load(i[:rank]), table.shape[0]), i[rank]])


@lowers(aten.index_select.default)
def index_select(_: Lowering, fact: Fact, a: Lazy, dim: int, ids: Lazy) -> Lazy:
    dim %= len(a.shape)
    return reindexed(fact, a, lambda i: [*i[:dim], loaded(ids.load([i[dim]]), a.shape[dim]), *i[dim + 1 :]])


@lowers(aten.gather.default)
def gather(_: Lowering, fact: Fact, a: Lazy, dim: int, ids: Lazy, **__: object) -> Lazy:
    dim %= len(a.shape)
    return reindexed(fact, a, lambda i: [*i[:dim], loaded(ids.load(i), a.shape[dim]), *i[dim + 1 :]])


@lowers(aten.index.Tensor)
def advanced_index(_: Lowering, fact: Fact, a: Lazy, selectors: Sequence[Lazy | None]) -> Lazy:
    """a[ids, ...]: the selectors broadcast together and stand where the first of them stands when they are adjacent."""
    places = [d for d, s in enumerate(selectors) if s is not None]
    rank = max(len(s.shape) for s in selectors if s is not None)
    adjacent = places == list(range(places[0], places[-1] + 1))
    lead = places[0] if adjacent else 0

    def where(i: Indices) -> list[Index]:
        chosen, rest = i[lead : lead + rank], iter([*i[:lead], *i[lead + rank :]])
        padded = [*selectors, *[None] * (len(a.shape) - len(selectors))]
        return [next(rest) if s is None else _wrapped(s.at(chosen), n) for s, n in zip(padded, a.shape, strict=True)]

    return reindexed(fact, a, where)


def _wrapped(value: Expr, extent: Index) -> Index:
    """Negative positions count from the end."""
    if isinstance(value, IndexValue):
        return value.index
    wide = cast(value, "i64")
    below = call("lt", wide, Constant(0, "i64"), dtype="b8")
    return loaded(call("where", below, call("add", wide, value_of(extent)), wide, dtype="i64"), extent)


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(_: Lowering, fact: Fact, *bounds: Any, **__: object) -> Lazy:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)

    def load(i: Indices) -> Expr:
        if isinstance(start, float) or isinstance(step, float):
            stepped = call("mul", cast(value_of(i[0]), fact.dtype), Constant(float(step), fact.dtype))
            return call("add", stepped, Constant(float(start), fact.dtype))
        return cast(value_of(size(start) + i[0] * size(step)), fact.dtype)

    return Lazy(fact.shape, fact.dtype, load)


def constant(fact: Fact, number: Any) -> Lazy:
    return Lazy(fact.shape, fact.dtype, lambda i: cast(element(number, i, "f32" if isinstance(number, float) else "i64"), fact.dtype))


@lowers(aten.full.default, aten.full_like.default, aten.new_full.default)
def full(_: Lowering, fact: Fact, __: object, number: Any, **___: object) -> Lazy:
    return constant(fact, number)


@lowers(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def zeros(_: Lowering, fact: Fact, *__: object, **___: object) -> Lazy:
    return constant(fact, 0)


@lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(_: Lowering, fact: Fact, *__: object, **___: object) -> Lazy:
    return constant(fact, 1)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(_: Lowering, fact: Fact, number: Any, **__: object) -> Lazy:
    return constant(fact, number)


def _triangle(keeps_lower: bool, target: Any) -> None:
    def lower(_: Lowering, fact: Fact, a: Lazy, diagonal: int = 0) -> Lazy:
        def load(i: Indices) -> Expr:
            kept = call("le" if keeps_lower else "ge", value_of(i[-1]), value_of(i[-2] + diagonal), dtype="b8")
            return call("where", kept, a.load(i), Constant(0, fact.dtype), dtype=fact.dtype)

        return Lazy(fact.shape, fact.dtype, load)

    lowers(target)(lower)


_triangle(True, aten.tril.default)
_triangle(False, aten.triu.default)


@lowers(aten.constant_pad_nd.default, aten.pad.default)
def pad(_: Lowering, fact: Fact, a: Lazy, amounts: Sequence[Any], *rest: Any, **named: Any) -> Lazy:
    """Pad with a constant; `amounts` are (before, after) pairs from the last dimension backwards."""
    numbers = [n for n in (*rest, *named.values()) if isinstance(n, (int, float))]
    rank = len(a.shape)
    before = [index(0)] * rank
    for d in range(len(amounts) // 2):
        before[rank - 1 - d] = size(amounts[2 * d])
    source = lambda i: [x - b for x, b in zip(i, before, strict=True)]  # noqa: E731
    return guarded(fact, a, source, float(numbers[0]) if numbers else 0.0)


def guarded(fact: Fact, a: Lazy, where: Callable[[Indices], Sequence[Index]], outside: float) -> Lazy:
    """a[where(i)] when that lies inside `a`, else `outside`."""

    def load(i: Indices) -> Expr:
        places = where(i)
        return inside(places, a, Constant(outside, a.dtype))

    return Lazy(fact.shape, fact.dtype, load)


def inside(places: Sequence[Index], a: Lazy, outside: Expr) -> Expr:
    """a[places], or `outside` where a place is beyond the edges; edges that cannot be crossed are not tested."""
    from sylvester.codegen.index import nonnegative, within

    result = a.load(list(places))
    for place, extent in zip(places, a.shape, strict=True):
        if within(place, extent):
            continue
        tests = []
        if not (all(c >= 0 for _, c in place.terms) or nonnegative(place)):
            tests.append(call("ge", value_of(place), Constant(0, "i64"), dtype="b8"))
        tests.append(call("lt", value_of(place), value_of(extent), dtype="b8"))
        for test in tests:
            result = call("where", test, result, outside, dtype=a.dtype)
    return result


@lowers(dialect.kv_update.default)
def kv_update(lowering: Lowering, fact: Fact, cache: Lazy, new: Lazy, past: Lazy) -> Lazy:
    """The state buffer is updated in place; the last new position is checked against the capacity."""
    buffer = lowering.whole(cache)
    assert buffer is not None and buffer.kind == "state"
    capacity, tokens = buffer.shape[2], new.shape[2]
    first = loaded(past.load([]), capacity - tokens + 1)

    def place(i: Indices) -> Index:
        return buffer.offset([i[0], i[1], sum_of([first, i[2]]), i[3]])

    lowering.plan.steps.append(Store(buffer.name, new.shape, buffer.dtype, new.load, place))
    return of_buffer(buffer)

"""Ops that read at computed positions: gathers, padding, resizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sylvester.codegen.aten_views import along, reindexed
from sylvester.codegen.elementwise import call, choose, is_test, value_of
from sylvester.codegen.index import Index, Loaded, atom, divide, index, nonnegative, within
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr, IndexValue, cast
from sylvester.codegen.shapes import size
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten


def loaded(value: Expr, limit: Index) -> Index:
    """A position computed at run time, checked there against [0, limit)."""
    if isinstance(value, IndexValue):
        return value.index
    return index(int(value.value)) if isinstance(value, Constant) else atom(Loaded(cast(value, "i64"), limit))


@lowers(aten.embedding.default)
def embedding(_: Lowering, fact: Fact, table: Lazy, ids: Lazy, *__: object, **___: object) -> Lazy:
    rank = len(ids.shape)
    return reindexed(fact, table, lambda i: [loaded(ids.load(i[:rank]), table.shape[0]), i[rank]])


@lowers(aten.index_select.default)
def index_select(_: Lowering, fact: Fact, a: Lazy, dim: int, ids: Lazy) -> Lazy:
    return reindexed(fact, a, along(dim, len(a.shape), lambda x: loaded(ids.load([x]), a.shape[dim])))


@lowers(aten.gather.default)
def gather(_: Lowering, fact: Fact, a: Lazy, dim: int, ids: Lazy, **__: object) -> Lazy:
    dim %= len(a.shape)
    return reindexed(fact, a, lambda i: [*i[:dim], loaded(ids.load(i), a.shape[dim]), *i[dim + 1 :]])


@lowers(aten.index.Tensor)
def advanced_index(_: Lowering, fact: Fact, a: Lazy, selectors: Sequence[Lazy | None]) -> Lazy:
    """a[ids, ...]: the selectors broadcast together and stand where the first of them stands when they are adjacent."""
    if any(s is not None and s.dtype == "b8" for s in selectors):
        raise Unsupported(
            "indexing by a boolean mask has no lowering: its size depends on values", hint="use torch.where"
        )
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
    return loaded(choose(is_test("lt", wide, Constant(0, "i64")), call("add", wide, value_of(extent)), wide), extent)


@lowers(aten.constant_pad_nd.default)
def constant_pad(_: Lowering, fact: Fact, a: Lazy, amounts: Sequence[Any], value: float | None = 0) -> Lazy:
    before = _before(amounts, len(a.shape))
    outside = Constant(value or 0, a.dtype)
    return Lazy(fact.shape, fact.dtype, lambda i: inside([x - b for x, b in zip(i, before, strict=True)], a, outside))


@lowers(aten.pad.default)
def pad(
    lowering: Lowering, fact: Fact, a: Lazy, amounts: Sequence[Any], mode: str = "constant", value: float | None = None
) -> Lazy:
    """`amounts` are (before, after) pairs from the last dimension backwards."""
    if mode == "constant":
        return constant_pad(lowering, fact, a, amounts, value)
    return _extended(fact, a, amounts, mode)


@lowers(aten.reflection_pad1d.default, aten.reflection_pad2d.default)
def reflection_pad(_: Lowering, fact: Fact, a: Lazy, amounts: Sequence[Any]) -> Lazy:
    return _extended(fact, a, amounts, "reflect")


@lowers(aten.replication_pad1d.default, aten.replication_pad2d.default)
def replication_pad(_: Lowering, fact: Fact, a: Lazy, amounts: Sequence[Any]) -> Lazy:
    return _extended(fact, a, amounts, "replicate")


def _before(amounts: Sequence[Any], rank: int) -> list[Index]:
    pairs = len(amounts) // 2
    return [index(0)] * (rank - pairs) + [size(amounts[2 * d]) for d in reversed(range(pairs))]


def _extended(fact: Fact, a: Lazy, amounts: Sequence[Any], mode: str) -> Lazy:
    """Values beyond the edges come from inside."""
    if mode not in SOURCES:
        raise Unsupported(f"padding mode {mode!r} has no lowering", hint=f"modes are constant, {', '.join(SOURCES)}")
    before = _before(amounts, len(a.shape))
    fixed = len(a.shape) - len(amounts) // 2

    def where(i: Indices) -> list[Index]:
        return [x if d < fixed else SOURCES[mode](x - before[d], a.shape[d]) for d, x in enumerate(i)]

    return reindexed(fact, a, where)


def _reflected(place: Index, extent: Index) -> Index:
    """Mirrored at the first and the last element, which are not repeated."""
    last = value_of(extent - 1)
    above = call("iabs", call("sub", last, call("iabs", value_of(place))))
    return loaded(call("sub", last, above), extent)


def _nearest(place: Index, extent: Index) -> Index:
    return loaded(call("max", call("min", value_of(place), value_of(extent - 1)), Constant(0, "i64")), extent)


SOURCES: dict[str, Callable[[Index, Index], Index]] = {
    "reflect": _reflected,
    "replicate": _nearest,
    "circular": lambda place, extent: place % extent,
}


def inside(places: Sequence[Index], a: Lazy, outside: Expr) -> Expr:
    """a[places], or `outside` where a place is beyond the edges; edges that cannot be crossed are not tested."""
    result = a.load(list(places))
    for place, extent in zip(places, a.shape, strict=True):
        if within(place, extent):
            continue
        tests = [is_test("lt", value_of(place), value_of(extent))]
        if not nonnegative(place):
            tests.append(is_test("ge", value_of(place), Constant(0, "i64")))
        for test in tests:
            result = choose(test, result, outside)
    return result


@lowers(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec)
def upsample_nearest(_: Lowering, fact: Fact, a: Lazy, output: object, factors: Sequence[float] | None = None) -> Lazy:
    spatial = len(fact.shape) - 2

    def where(i: Indices) -> list[Index]:
        scales: list[float | None] = [*factors] if factors else [None] * spatial
        sizes = zip(i[2:], a.shape[2:], fact.shape[2:], scales, strict=True)
        return [*i[:2], *(_floor_source(*size) for size in sizes)]

    return reindexed(fact, a, where)


@lowers(aten.upsample_nearest1d.default, aten.upsample_nearest2d.default)
def upsample_nearest_sizes(lowering: Lowering, fact: Fact, a: Lazy, output: object, *factors: float | None) -> Lazy:
    given = [f for f in factors if f is not None]
    return upsample_nearest(lowering, fact, a, output, given if len(given) == len(fact.shape) - 2 else None)


def _floor_source(x: Index, extent: Index, wanted: Index, factor: float | None) -> Index:
    """floor(x * extent / wanted), or floor(x / factor)."""
    times, rest = divide(wanted, extent)
    whole = times.constant
    if whole and not rest.terms and factor in (None, whole):
        return x // whole
    place = call("floor", call("mul", cast(value_of(x), "f32"), _ratio(extent, wanted, factor)))
    return loaded(call("min", cast(place, "i64"), value_of(extent - 1)), extent)


def _ratio(extent: Index, wanted: Index, factor: float | None) -> Expr:
    """Source pixels per result pixel."""
    if factor:
        return Constant(1.0 / factor, "f32")
    return call("div", cast(value_of(extent), "f32"), cast(value_of(wanted), "f32"))


@lowers(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec)
def upsample_linear(
    lowering: Lowering, fact: Fact, a: Lazy, output: object, align_corners: bool, factors: Sequence[float] | None = None
) -> Lazy:
    """Linear interpolation, one axis after the other."""
    for axis in range(2, len(fact.shape)):
        factor = factors[axis - 2] if factors else None
        a = lowering.realize(_interpolated(a, axis, fact.shape[axis], align_corners, factor))
    return a


def _interpolated(a: Lazy, axis: int, wanted: Index, align_corners: bool, factor: float | None) -> Lazy:
    extent = a.shape[axis]
    last, half = value_of(extent - 1), Constant(0.5, "f32")

    def load(i: Indices) -> Expr:
        x = cast(value_of(i[axis]), "f32")
        if align_corners:
            gaps = call("max", value_of(wanted - 1), Constant(1, "i64"))
            place = call("mul", x, call("div", cast(value_of(extent - 1), "f32"), cast(gaps, "f32")))
        else:
            centre = call("mul", call("add", x, half), _ratio(extent, wanted, factor))
            place = call("fmax", call("sub", centre, half), Constant(0.0, "f32"))
        first = call("min", cast(place, "i64"), last)
        second = call("min", call("add", first, Constant(1, "i64")), last)
        low, high = (a.load([*i[:axis], loaded(p, extent), *i[axis + 1 :]]) for p in (first, second))
        share = call("sub", place, cast(first, "f32"))
        return call("add", low, call("mul", share, call("sub", high, low)))

    return Lazy((*a.shape[:axis], wanted, *a.shape[axis + 1 :]), a.dtype, load)

"""Reductions, normalisations and pooling as reduce steps followed by lazy elementwise work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sylvester.codegen.aten_pointwise import call, pointwise, value_of
from sylvester.codegen.aten_views import inside
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.lazy import Indices, Lazy, ReduceKind, Shape
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr, cast

aten, dialect = torch.ops.aten, torch.ops.sylvester
Dims = Sequence[int] | int | None


def stored(lowering: Lowering, x: Lazy) -> Lazy:
    """`x` in memory when computing it twice would cost more than reading it."""
    return lowering.realize(x) if x.probe()[1].operations > 1 else x


def axes(x: Lazy, dims: Dims) -> list[int]:
    rank = len(x.shape)
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))


def split_shape(x: Lazy, reduced: Sequence[int]) -> tuple[Shape, Shape]:
    outer = tuple(n for d, n in enumerate(x.shape) if d not in reduced)
    return outer, tuple(x.shape[d] for d in reduced)


def merged(outer: Indices, inner: Indices, reduced: Sequence[int]) -> list[Index]:
    """Indices of the full tensor from those of the kept and the reduced dimensions."""
    kept, gone = iter(outer), iter(inner)
    return [next(gone) if d in reduced else next(kept) for d in range(len(outer) + len(inner))]


def reduced_over(lowering: Lowering, kind: ReduceKind, x: Lazy, dims: Sequence[int], dtype: str, function: Any = None) -> Lazy:
    """Reduce `function(x)` over `dims`; the result keeps the other dimensions only."""
    outer, inner = split_shape(x, dims)

    def make(o: Indices, i: Indices) -> Expr:
        element = x.load(merged(o, i, dims))
        return cast(element if function is None else function(element, o), dtype)

    return lowering.reduce(kind, outer, inner, dtype, make)


def kept(fact: Fact, result: Lazy, dims: Sequence[int]) -> Lazy:
    """`result` seen at `fact.shape`, with the reduced dimensions kept as 1 when the fact has them."""
    if len(fact.shape) == len(result.shape):
        return result
    return Lazy(fact.shape, result.dtype, lambda i: result.load([x for d, x in enumerate(i) if d not in dims]))


def count(x: Lazy, dims: Sequence[int]) -> Expr:
    return cast(value_of(product(x.shape[d] for d in dims)), "f32")


def _reduction(kind: ReduceKind, *targets: Any) -> None:
    def lower(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims = None, keepdim: bool = False, **_: Any) -> Lazy:
        chosen = axes(x, dims)
        return kept(fact, reduced_over(lowering, kind, stored(lowering, x), chosen, fact.dtype), chosen)

    lowers(*targets)(lower)


_reduction("sum", aten.sum.dim_IntList, aten.sum.default)
_reduction("prod", aten.prod.dim_int, aten.prod.default)
_reduction("max", aten.amax.default, aten.max.default)
_reduction("min", aten.amin.default, aten.min.default)
_reduction("any", aten.any.dim, aten.any.dims, aten.any.default)
_reduction("all", aten.all.dim, aten.all.dims, aten.all.default)
_reduction("argmax", aten.argmax.default)
_reduction("argmin", aten.argmin.default)


def _extremum(best: ReduceKind, place: ReduceKind, target: Any) -> None:
    def lower(lowering: Lowering, facts: Any, x: Lazy, dim: int, keepdim: bool = False) -> list[Lazy]:
        chosen, source = axes(x, dim), stored(lowering, x)
        shape = tuple(index(1) if d in chosen else n for d, n in enumerate(x.shape)) if keepdim else split_shape(x, chosen)[0]
        results = ((best, x.dtype), (place, "i64"))
        return [kept(Fact(shape, t), reduced_over(lowering, k, source, chosen, t), chosen) for k, t in results]

    lowers(target)(lower)


_extremum("max", "argmax", aten.max.dim)
_extremum("min", "argmin", aten.min.dim)


def mean_over(lowering: Lowering, x: Lazy, dims: Sequence[int]) -> Lazy:
    total = reduced_over(lowering, "sum", x, dims, "f32")
    return Lazy(total.shape, "f32", lambda i: call("div", total.load(i), count(x, dims)))


@lowers(aten.mean.dim, aten.mean.default)
def mean(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims = None, keepdim: bool = False, **_: Any) -> Lazy:
    chosen = axes(x, dims)
    return kept(fact, mean_over(lowering, stored(lowering, x), chosen), chosen)


def squares_about_mean(lowering: Lowering, x: Lazy, dims: Sequence[int]) -> tuple[Lazy, Lazy]:
    """(mean, sum of squared differences from it) over `dims`, in two passes."""
    average = lowering.realize(mean_over(lowering, x, dims))

    def square(element: Expr, outer: Indices) -> Expr:
        difference = call("sub", element, average.load(outer))
        return call("mul", difference, difference)

    return average, reduced_over(lowering, "sum", x, dims, "f32", square)


@lowers(aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim)
def variance(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims = None, *_: Any, correction: float = 1, **__: Any) -> Lazy:
    chosen = axes(x, dims)
    _, total = squares_about_mean(lowering, stored(lowering, x), chosen)
    freedom = call("sub", count(x, chosen), Constant(float(correction), "f32"))
    return kept(fact, Lazy(total.shape, "f32", lambda i: call("div", total.load(i), freedom)), chosen)


@lowers(aten.softmax.int, aten._softmax.default)
def softmax(lowering: Lowering, fact: Fact, x: Lazy, dim: int, *_: Any) -> Lazy:
    shifted = _shifted(lowering, stored(lowering, x), dim)
    powers = lowering.realize(pointwise(fact, lambda e: call("exp", e), shifted))
    total = reduced_over(lowering, "sum", powers, axes(x, dim), "f32")
    scale = lowering.realize(Lazy(total.shape, "f32", lambda i: call("div", Constant(1.0, "f32"), total.load(i))))
    return pointwise(fact, lambda p, s: call("mul", p, s), powers, _spread(fact, scale, axes(x, dim)))


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(lowering: Lowering, fact: Fact, x: Lazy, dim: int, *_: Any) -> Lazy:
    shifted = _shifted(lowering, stored(lowering, x), dim)
    total = reduced_over(lowering, "sum", shifted, axes(x, dim), "f32", lambda e, _: call("exp", e))
    log = lowering.realize(Lazy(total.shape, "f32", lambda i: call("log", total.load(i))))
    return pointwise(fact, lambda p, s: call("sub", p, s), shifted, _spread(fact, log, axes(x, dim)))


def _shifted(lowering: Lowering, x: Lazy, dim: int) -> Lazy:
    """x minus its maximum along `dim`."""
    highest = reduced_over(lowering, "max", x, axes(x, dim), "f32")
    fact = Fact(x.shape, "f32")
    return pointwise(fact, lambda e, h: call("sub", e, h), x, _spread(fact, highest, axes(x, dim)))


def _spread(fact: Fact, rows: Lazy, dims: Sequence[int]) -> Lazy:
    return Lazy(fact.shape, rows.dtype, lambda i: rows.load([x for d, x in enumerate(i) if d not in dims]))


def affine(fact: Fact, x: Lazy, scale: Lazy | None, shift: Lazy | None) -> Lazy:
    """x * scale + shift, either may be absent."""
    if scale is not None:
        x = pointwise(fact, lambda e, s: call("mul", e, s), x, scale)
    return x if shift is None else pointwise(fact, lambda e, s: call("add", e, s), x, shift)


def inverse_deviation(lowering: Lowering, total: Lazy, n: Expr, eps: float) -> Lazy:
    """1 / sqrt(total / n + eps)."""

    def load(i: Indices) -> Expr:
        return call("rsqrt", call("add", call("div", total.load(i), n), Constant(eps, "f32")))

    return lowering.realize(Lazy(total.shape, "f32", load))


@lowers(dialect.rms_norm.default)
def rms_norm(lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy | None, eps: float) -> Lazy:
    x, last = stored(lowering, x), [len(x.shape) - 1]
    total = reduced_over(lowering, "sum", x, last, "f32", lambda e, _: call("mul", e, e))
    scale = _spread(fact, inverse_deviation(lowering, total, count(x, last), eps), last)
    return affine(fact, pointwise(fact, lambda e, s: call("mul", e, s), x, scale), weight, None)


@lowers(aten.layer_norm.default, aten.native_layer_norm.default)
def layer_norm(
    lowering: Lowering, fact: Fact, x: Lazy, sizes: Sequence[Any], weight: Lazy | None = None, bias: Lazy | None = None, eps: float = 1e-5, *_: Any
) -> Lazy:  # fmt: skip
    dims = list(range(len(x.shape) - len(sizes), len(x.shape)))
    x = stored(lowering, x)
    average, total = squares_about_mean(lowering, x, dims)
    scale = _spread(fact, inverse_deviation(lowering, total, count(x, dims), eps), dims)
    centred = pointwise(fact, lambda e, m: call("sub", e, m), x, _spread(fact, average, dims))
    return affine(fact, pointwise(fact, lambda e, s: call("mul", e, s), centred, scale), weight, bias)


@lowers(aten.group_norm.default)
def group_norm(lowering: Lowering, fact: Fact, x: Lazy, groups: int, weight: Lazy | None = None, bias: Lazy | None = None, eps: float = 1e-5, *_: Any) -> Lazy:  # fmt: skip
    channels = x.shape[1] // groups
    source = stored(lowering, x)
    grouped = Lazy(
        (x.shape[0], index(groups), channels, *x.shape[2:]), "f32", lambda i: source.load([i[0], i[1] * channels + i[2], *i[3:]])
    )
    dims = list(range(2, len(grouped.shape)))
    average, total = squares_about_mean(lowering, grouped, dims)
    scale = inverse_deviation(lowering, total, count(grouped, dims), eps)

    def load(i: Indices) -> Expr:
        group = [i[0], i[1] // channels]
        return call("mul", call("sub", source.load(i), average.load(group)), scale.load(group))

    per_channel = [None if p is None else _per_channel(p, len(x.shape)) for p in (weight, bias)]
    return affine(fact, Lazy(fact.shape, "f32", load), *per_channel)


def _per_channel(parameter: Lazy, rank: int) -> Lazy:
    shape = (index(1), parameter.shape[0], *[index(1)] * (rank - 2))
    return Lazy(shape, parameter.dtype, lambda i: parameter.load([i[1]]))


@lowers(aten.batch_norm.default)
def batch_norm(
    lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy | None, bias: Lazy | None, average: Lazy, deviation: Lazy,
    training: bool, momentum: float, eps: float, *_: Any,
) -> Lazy:  # fmt: skip
    def scale(i: Indices) -> Expr:
        return call("rsqrt", call("add", deviation.load(i), Constant(eps, "f32")))

    rank = len(x.shape)
    rows = _per_channel(lowering.realize(Lazy(deviation.shape, "f32", scale)), rank)
    centred = pointwise(fact, lambda e, m: call("sub", e, m), x, _per_channel(average, rank))
    normal = pointwise(fact, lambda e, s: call("mul", e, s), centred, rows)
    return affine(fact, normal, *(None if p is None else _per_channel(p, rank) for p in (weight, bias)))


def pair(value: Any, fallback: Any = 0) -> tuple[int, int]:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = numbers or list(pair(fallback))
    return (int(numbers[0]), int(numbers[-1]))


def windows(x: Lazy, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], outside: float) -> Any:
    """The element under tap (a, b) of the window at (n, c, y, x)."""

    def make(o: Indices, i: Indices) -> Expr:
        y = o[2] * stride[0] + i[0] * dilation[0] - padding[0]
        column = o[3] * stride[1] + i[1] * dilation[1] - padding[1]
        if padding == (0, 0):
            return x.load([o[0], o[1], y, column])
        return inside([o[0], o[1], y, column], x, Constant(outside, "f32"))

    return make


@lowers(aten.max_pool2d.default)
def max_pool2d(lowering: Lowering, fact: Fact, x: Lazy, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False) -> Lazy:  # fmt: skip
    size, source = pair(kernel), stored(lowering, x)
    make = windows(source, pair(stride, size), pair(padding), pair(dilation), -math.inf)
    if ceil:
        make = _ceil_windows(source, size, pair(stride, size), pair(padding), -math.inf)
    return lowering.reduce("max", fact.shape, (index(size[0]), index(size[1])), "f32", make)


def _ceil_windows(x: Lazy, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], outside: float) -> Any:
    def make(o: Indices, i: Indices) -> Expr:
        places = [o[0], o[1], o[2] * stride[0] + i[0] - padding[0], o[3] * stride[1] + i[1] - padding[1]]
        return inside(places, x, Constant(outside, "f32"))

    return make


@lowers(aten.avg_pool2d.default)
def avg_pool2d(
    lowering: Lowering, fact: Fact, x: Lazy, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False, count_padding: bool = True,
    divisor: int | None = None,
) -> Lazy:  # fmt: skip
    size, step, edge = pair(kernel), pair(stride, pair(kernel)), pair(padding)
    source = stored(lowering, x)
    taps = (index(size[0]), index(size[1]))
    total = lowering.reduce("sum", fact.shape, taps, "f32", windows(source, step, edge, (1, 1), 0.0))
    if divisor or count_padding or edge == (0, 0):
        scale = Constant(1.0 / (divisor or size[0] * size[1]), "f32")
        return pointwise(fact, lambda t: call("mul", t, scale), total)
    unit = Lazy(source.shape, "f32", lambda i: Constant(1.0, "f32"))
    number = lowering.reduce("sum", fact.shape, taps, "f32", windows(unit, step, edge, (1, 1), 0.0))
    return pointwise(fact, lambda t, n: call("div", t, n), total, number)


@lowers(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(lowering: Lowering, fact: Fact, x: Lazy, output: Sequence[int]) -> Lazy:
    """Output sizes must divide the input's, as they do for the common global pooling."""
    taps = tuple(n // m for n, m in zip(x.shape[2:], fact.shape[2:], strict=True))
    source = stored(lowering, x)

    def make(o: Indices, i: Indices) -> Expr:
        return source.load([o[0], o[1], o[2] * taps[0] + i[0], o[3] * taps[1] + i[1]])

    total = lowering.reduce("sum", fact.shape, taps, "f32", make)
    return pointwise(fact, lambda t: call("div", t, cast(value_of(product(taps)), "f32")), total)


@lowers(aten.cumsum.default)
def cumsum(lowering: Lowering, fact: Fact, x: Lazy, dim: int, **_: Any) -> Lazy:
    """Sum over j of x[j] where j <= i: quadratic, for the short integer rows that position counters are."""
    dim %= len(x.shape)
    source, extent = stored(lowering, x), x.shape[dim]

    def make(o: Indices, i: Indices) -> Expr:
        earlier = call("le", value_of(i[0]), value_of(o[dim]), dtype="b8")
        element = cast(source.load([*o[:dim], i[0], *o[dim + 1 :]]), fact.dtype)
        return call("where", earlier, element, Constant(0, fact.dtype), dtype=fact.dtype)

    return lowering.reduce("sum", fact.shape, (extent,), fact.dtype, make)

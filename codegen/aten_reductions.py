"""Reductions over axes: sums, extrema, means, variances, norms, scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sylvester.codegen.aten_views import along, cat
from sylvester.codegen.elementwise import call, choose, is_test, pointwise, value_of
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.lazy import Indices, Lazy, ReduceKind, Shape
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr, cast

aten = torch.ops.aten
Dims = Sequence[int] | int | None


def stored(lowering: Lowering, x: Lazy) -> Lazy:
    """`x` in memory when computing it twice would cost more than reading it."""
    return lowering.realize(x) if x.operations > 1 else x


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


def reduced_over(
    lowering: Lowering, kind: ReduceKind, x: Lazy, dims: Sequence[int], dtype: str,
    function: Callable[[Expr, Indices], Expr] | None = None,
) -> Lazy:  # fmt: skip
    """Reduce `function(x, kept indices)` over `dims`; the result keeps the other dimensions only."""
    outer, inner = split_shape(x, dims)

    def make(o: Indices, i: Indices) -> Expr:
        element = x.load(merged(o, i, dims))
        element = element if function is None else function(element, o)
        return element if kind in ("argmax", "argmin") else cast(element, dtype)

    return lowering.reduce(kind, outer, inner, dtype, make)


def kept(fact: Fact, result: Lazy, dims: Sequence[int]) -> Lazy:
    """`result` seen at `fact.shape`, with the reduced dimensions kept as 1 when the fact has them."""
    if len(fact.shape) == len(result.shape):
        return result
    return spread(fact.shape, result, dims)


def spread(shape: Shape, rows: Lazy, dims: Sequence[int]) -> Lazy:
    """`rows`, which lacks `dims`, repeated along them."""
    return Lazy(shape, rows.dtype, lambda i: rows.load([x for d, x in enumerate(i) if d not in dims]))


def count(x: Lazy, dims: Sequence[int]) -> Expr:
    return cast(value_of(product(x.shape[d] for d in dims)), "f32")


def _reduction(kind: ReduceKind, *targets: Any) -> None:
    @lowers(*targets)
    def lower(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims = None, keepdim: bool = False, **_: Any) -> Lazy:
        chosen = axes(x, dims)
        return kept(fact, reduced_over(lowering, kind, stored(lowering, x), chosen, fact.dtype), chosen)


_reduction("sum", aten.sum.dim_IntList, aten.sum.default)
_reduction("prod", aten.prod.dim_int, aten.prod.default)
_reduction("max", aten.amax.default, aten.max.default)
_reduction("min", aten.amin.default, aten.min.default)
_reduction("any", aten.any.dim, aten.any.dims, aten.any.default)
_reduction("all", aten.all.dim, aten.all.dims, aten.all.default)
_reduction("argmax", aten.argmax.default)
_reduction("argmin", aten.argmin.default)


def _extremum(best: ReduceKind, place: ReduceKind, target: Any) -> None:
    @lowers(target)
    def lower(lowering: Lowering, facts: Any, x: Lazy, dim: int, keepdim: bool = False) -> list[Lazy]:
        chosen, source = axes(x, dim), stored(lowering, x)
        found = [reduced_over(lowering, kind, source, chosen, t) for kind, t in ((best, x.dtype), (place, "i64"))]
        return [_with_units(r, x.shape, chosen) if keepdim else r for r in found]


_extremum("max", "argmax", aten.max.dim)
_extremum("min", "argmin", aten.min.dim)


def _with_units(result: Lazy, shape: Shape, dims: Sequence[int]) -> Lazy:
    return spread(tuple(index(1) if d in dims else n for d, n in enumerate(shape)), result, dims)


@lowers(aten.count_nonzero.dim_IntList, aten.count_nonzero.default)
def count_nonzero(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims = None) -> Lazy:
    zero = Constant(0, x.dtype)
    return reduced_over(lowering, "sum", stored(lowering, x), axes(x, dims), "i64", lambda e, _: is_test("ne", e, zero))


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


def _variance(lowering: Lowering, x: Lazy, dims: Sequence[int], correction: float | None) -> tuple[Lazy, Lazy]:
    """(variance, mean)."""
    average, total = squares_about_mean(lowering, stored(lowering, x), dims)
    freedom = call("sub", count(x, dims), Constant(1.0 if correction is None else float(correction), "f32"))
    return Lazy(total.shape, "f32", lambda i: call("div", total.load(i), freedom)), average


def _spread_measure(finish: Callable[[Lazy], Lazy], packet: Any) -> None:
    """Variance or deviation, whose overloads differ in how they name the correction."""

    def measured(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims, correction: float | None) -> Lazy:
        chosen = axes(x, dims)
        return kept(fact, finish(_variance(lowering, x, chosen, correction)[0]), chosen)

    @lowers(packet.correction)
    def corrected(
        lowering: Lowering,
        fact: Fact,
        x: Lazy,
        dims: Dims = None,
        *,
        correction: float | None = None,
        keepdim: bool = False,
    ) -> Lazy:
        return measured(lowering, fact, x, dims, correction)

    @lowers(packet.dim)
    def unbiased_over(
        lowering: Lowering, fact: Fact, x: Lazy, dims: Dims, unbiased: bool = True, keepdim: bool = False
    ) -> Lazy:
        return measured(lowering, fact, x, dims, int(unbiased))

    @lowers(packet.default)
    def unbiased_all(lowering: Lowering, fact: Fact, x: Lazy, unbiased: bool = True) -> Lazy:
        return measured(lowering, fact, x, None, int(unbiased))


def _root(x: Lazy) -> Lazy:
    return Lazy(x.shape, x.dtype, lambda i: call("sqrt", x.load(i)))


_spread_measure(lambda variance: variance, aten.var)
_spread_measure(_root, aten.std)


@lowers(aten.var_mean.correction)
def var_mean(
    lowering: Lowering,
    facts: Any,
    x: Lazy,
    dims: Dims = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> list[Lazy]:
    chosen = axes(x, dims)
    found = _variance(lowering, x, chosen, correction)
    return [_with_units(r, x.shape, chosen) if keepdim else r for r in found]


@lowers(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(
    lowering: Lowering, fact: Fact, x: Lazy, order: float | None = 2, dims: Dims = None, keepdim: bool = False, **_: Any
) -> Lazy:
    """(sum |x|^p)^(1/p), or the extreme magnitude when p is infinite."""
    p, chosen = float(2 if order is None else order), axes(x, dims)
    source = stored(lowering, x)
    if math.isinf(p):
        kind: ReduceKind = "max" if p > 0 else "min"
        return kept(fact, reduced_over(lowering, kind, source, chosen, "f32", lambda e, _: call("abs", e)), chosen)
    total = kept(fact, reduced_over(lowering, "sum", source, chosen, "f32", lambda e, _: _norm_term(e, p)), chosen)
    if p == 2.0:
        return _root(total)
    return total if p == 1.0 else pointwise(fact, lambda t: call("pow", t, Constant(1 / p, "f32")), total)


def _norm_term(x: Expr, p: float) -> Expr:
    if p == 2.0:
        return call("mul", x, x)
    magnitude = call("abs", x)
    return magnitude if p == 1.0 else call("pow", magnitude, Constant(p, "f32"))


@lowers(aten.cumsum.default)
def cumsum(lowering: Lowering, fact: Fact, x: Lazy, dim: int, **_: Any) -> Lazy:
    """Sum over j of x[j] where j <= i: quadratic, for the short integer rows that position counters are."""
    dim %= len(x.shape)
    source, extent = stored(lowering, x), x.shape[dim]

    def make(o: Indices, i: Indices) -> Expr:
        element = cast(source.load([*o[:dim], i[0], *o[dim + 1 :]]), fact.dtype)
        return choose(is_test("le", value_of(i[0]), value_of(o[dim])), element, Constant(0, fact.dtype))

    return lowering.reduce("sum", fact.shape, (extent,), fact.dtype, make)


@lowers(aten.diff.default)
def diff(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    n: int = 1,
    dim: int = -1,
    prepend: Lazy | None = None,
    append: Lazy | None = None,
) -> Lazy:
    parts = [part for part in (prepend, x, append) if part is not None]
    dim %= len(x.shape)
    if len(parts) > 1:
        extent = sum((part.shape[dim] for part in parts), index(0))
        x = cat(lowering, Fact((*x.shape[:dim], extent, *x.shape[dim + 1 :]), x.dtype), parts, dim)
    for _ in range(n):
        shape = (*x.shape[:dim], x.shape[dim] - 1, *x.shape[dim + 1 :])
        x = _differences(x, shape, dim)
    return x


def _differences(x: Lazy, shape: Shape, dim: int) -> Lazy:
    later = along(dim, len(shape), lambda i: i + 1)
    return Lazy(shape, x.dtype, lambda i: call("xor" if x.dtype == "b8" else "sub", x.load(later(i)), x.load(i)))


@lowers(aten.logsumexp.default)
def logsumexp(lowering: Lowering, fact: Fact, x: Lazy, dims: Dims, keepdim: bool = False) -> Lazy:
    chosen, source = axes(x, dims), stored(lowering, x)
    highest = reduced_over(lowering, "max", source, chosen, "f32")

    def finite(o: Indices) -> Expr:
        """The shift; an infinite maximum is not subtracted."""
        h = highest.load(o)
        return choose(is_test("eq", call("abs", h), Constant(math.inf, "f32")), Constant(0.0, "f32"), h)

    total = reduced_over(lowering, "sum", source, chosen, "f32", lambda e, o: call("exp", call("sub", e, finite(o))))
    return kept(fact, Lazy(total.shape, "f32", lambda o: call("add", call("log", total.load(o)), finite(o))), chosen)


def affine(fact: Fact, x: Lazy, scale: Lazy | None, shift: Lazy | None) -> Lazy:
    """x * scale + shift, either may be absent."""
    if scale is not None:
        x = pointwise(fact, lambda e, s: call("mul", e, s), x, scale)
    return x if shift is None else pointwise(fact, lambda e, s: call("add", e, s), x, shift)

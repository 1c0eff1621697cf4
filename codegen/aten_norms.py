"""Softmax and normalisation layers as reduce steps followed by lazy elementwise work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sylvester.codegen.aten_reductions import affine, axes, count, reduced_over, spread, squares_about_mean, stored
from sylvester.codegen.elementwise import call, pointwise
from sylvester.codegen.index import index
from sylvester.codegen.lazy import Indices, Lazy, RowNorm
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr
from sylvester.compiler.errors import Unsupported

aten, dialect = torch.ops.aten, torch.ops.sylvester
FLOAT_EPS = torch.finfo(torch.float32).eps


@lowers(aten.softmax.int, aten._softmax.default)
def softmax(lowering: Lowering, fact: Fact, x: Lazy, dim: int, *_: Any) -> Lazy:
    shifted = _shifted(lowering, stored(lowering, x), dim)
    powers = lowering.realize(pointwise(fact, lambda e: call("exp", e), shifted))
    total = reduced_over(lowering, "sum", powers, axes(x, dim), "f32")
    scale = lowering.realize(Lazy(total.shape, "f32", lambda i: call("div", Constant(1.0, "f32"), total.load(i))))
    return pointwise(fact, lambda p, s: call("mul", p, s), powers, spread(fact.shape, scale, axes(x, dim)))


@lowers(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(lowering: Lowering, fact: Fact, x: Lazy, dim: int, *_: Any) -> Lazy:
    shifted = _shifted(lowering, stored(lowering, x), dim)
    total = reduced_over(lowering, "sum", shifted, axes(x, dim), "f32", lambda e, _: call("exp", e))
    log = lowering.realize(Lazy(total.shape, "f32", lambda i: call("log", total.load(i))))
    return pointwise(fact, lambda p, s: call("sub", p, s), shifted, spread(fact.shape, log, axes(x, dim)))


def _shifted(lowering: Lowering, x: Lazy, dim: int) -> Lazy:
    """x minus its maximum along `dim`."""
    highest = reduced_over(lowering, "max", x, axes(x, dim), "f32")
    fact = Fact(x.shape, "f32")
    return pointwise(fact, lambda e, h: call("sub", e, h), x, spread(fact.shape, highest, axes(x, dim)))


def inverse_deviation(lowering: Lowering, total: Lazy, n: Expr, eps: float) -> Lazy:
    """1 / sqrt(total / n + eps)."""

    def load(i: Indices) -> Expr:
        return call("rsqrt", call("add", call("div", total.load(i), n), Constant(eps, "f32")))

    return lowering.realize(Lazy(total.shape, "f32", load))


@lowers(dialect.rms_norm.default)
def rms_norm(lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy | None, eps: float) -> Lazy:
    return _rms_norm(lowering, fact, x, [len(x.shape) - 1], weight, eps)


@lowers(aten.rms_norm.default)
def aten_rms_norm(
    lowering: Lowering, fact: Fact, x: Lazy, sizes: Sequence[Any], weight: Lazy | None = None, eps: float | None = None
) -> Lazy:
    dims = list(range(len(x.shape) - len(sizes), len(x.shape)))
    return _rms_norm(lowering, fact, x, dims, weight, FLOAT_EPS if eps is None else eps)


def _rms_norm(lowering: Lowering, fact: Fact, x: Lazy, dims: Sequence[int], weight: Lazy | None, eps: float) -> Lazy:
    x = stored(lowering, x)
    total = reduced_over(lowering, "sum", x, dims, "f32", lambda e, _: call("mul", e, e))
    scale = spread(fact.shape, inverse_deviation(lowering, total, count(x, dims), eps), dims)
    y = affine(fact, pointwise(fact, lambda e, s: call("mul", e, s), x, scale), weight, None)
    by_feature = weight is None or weight.shape == x.shape[-1:]
    return replace(y, norm=RowNorm("rms", x, weight, None, eps)) if by_feature and dims == [len(x.shape) - 1] else y


@lowers(aten.layer_norm.default)
def layer_norm(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    sizes: Sequence[Any],
    weight: Lazy | None = None,
    bias: Lazy | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Lazy:
    return _layer_norm(lowering, fact, x, sizes, weight, bias, eps)[0]


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    lowering: Lowering, facts: Any, x: Lazy, sizes: Sequence[Any], weight: Lazy | None, bias: Lazy | None, eps: float
) -> list[Lazy]:
    """(normalised, mean, 1 / deviation)."""
    return _layer_norm(lowering, Fact(x.shape, x.dtype), x, sizes, weight, bias, eps)


def _layer_norm(
    lowering: Lowering, fact: Fact, x: Lazy, sizes: Sequence[Any], weight: Lazy | None, bias: Lazy | None, eps: float
) -> list[Lazy]:
    dims = list(range(len(x.shape) - len(sizes), len(x.shape)))
    x = stored(lowering, x)
    average, total = squares_about_mean(lowering, x, dims)
    rows = inverse_deviation(lowering, total, count(x, dims), eps)
    scale = spread(fact.shape, rows, dims)
    centred = pointwise(fact, lambda e, m: call("sub", e, m), x, spread(fact.shape, average, dims))
    y = affine(fact, pointwise(fact, lambda e, s: call("mul", e, s), centred, scale), weight, bias)
    if dims == [len(x.shape) - 1]:
        y = replace(y, norm=RowNorm("layer", x, weight, bias, eps))
    units = tuple(index(1) if d in dims else n for d, n in enumerate(x.shape))
    return [y, spread(units, average, dims), spread(units, rows, dims)]


@lowers(aten.group_norm.default)
def group_norm(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    groups: int,
    weight: Lazy | None = None,
    bias: Lazy | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Lazy:
    channels = x.shape[1] // groups
    source = stored(lowering, x)
    shape = (x.shape[0], index(groups), channels, *x.shape[2:])
    grouped = Lazy(shape, "f32", lambda i: source.load([i[0], i[1] * channels + i[2], *i[3:]]))
    dims = list(range(2, len(grouped.shape)))
    average, total = squares_about_mean(lowering, grouped, dims)
    scale = inverse_deviation(lowering, total, count(grouped, dims), eps)

    def load(i: Indices) -> Expr:
        group = [i[0], i[1] // channels]
        return call("mul", call("sub", source.load(i), average.load(group)), scale.load(group))

    return affine(fact, Lazy(fact.shape, "f32", load), *_per_channel((weight, bias), len(x.shape)))


def _per_channel(parameters: Sequence[Lazy | None], rank: int) -> list[Lazy | None]:
    """[channels] as [1, channels, 1, ...]."""
    return [None if p is None else _channels(p, rank) for p in parameters]


def _channels(parameter: Lazy, rank: int) -> Lazy:
    shape = (index(1), parameter.shape[0], *[index(1)] * (rank - 2))
    return Lazy(shape, parameter.dtype, lambda i: parameter.load([i[1]]))


@lowers(aten.batch_norm.default)
def batch_norm(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    weight: Lazy | None,
    bias: Lazy | None,
    average: Lazy | None,
    variance: Lazy | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Lazy:
    if training or average is None or variance is None:
        raise Unsupported("batch norm by the statistics of the batch has no lowering", hint="call model.eval() first")
    rank, shift = len(x.shape), _channels(average, len(x.shape))

    def scale(i: Indices) -> Expr:
        return call("rsqrt", call("add", variance.load(i), Constant(eps, "f32")))

    rows = _channels(lowering.realize(Lazy(variance.shape, "f32", scale)), rank)
    centred = pointwise(fact, lambda e, m: call("sub", e, m), x, shift)
    normal = pointwise(fact, lambda e, s: call("mul", e, s), centred, rows)
    return affine(fact, normal, *_per_channel((weight, bias), rank))


@lowers(aten.instance_norm.default)
def instance_norm(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    weight: Lazy | None,
    bias: Lazy | None,
    average: Lazy | None,
    variance: Lazy | None,
    use_input: bool,
    momentum: float,
    eps: float,
    *_: Any,
) -> Lazy:
    """Each channel of each example by its own statistics, or by stored ones."""
    if not use_input:
        return batch_norm(lowering, fact, x, weight, bias, average, variance, False, momentum, eps)
    x, dims = stored(lowering, x), list(range(2, len(x.shape)))
    mean, total = squares_about_mean(lowering, x, dims)
    scale = spread(fact.shape, inverse_deviation(lowering, total, count(x, dims), eps), dims)
    centred = pointwise(fact, lambda e, m: call("sub", e, m), x, spread(fact.shape, mean, dims))
    normal = pointwise(fact, lambda e, s: call("mul", e, s), centred, scale)
    return affine(fact, normal, *_per_channel((weight, bias), len(x.shape)))

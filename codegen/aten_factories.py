"""Tensors made from numbers and positions: constants, ranges, triangles, one-hot rows."""

from __future__ import annotations

from typing import Any

import torch

from sylvester.codegen.elementwise import call, choose, is_test, kind_of, value_of
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, element, lowers
from sylvester.codegen.scalar import Constant, Expr, cast
from sylvester.codegen.shapes import size

aten = torch.ops.aten


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(_: Lowering, fact: Fact, *bounds: Any, **__: object) -> Lazy:
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)

    def load(i: Indices) -> Expr:
        if isinstance(start, float) or isinstance(step, float):
            stepped = call("mul", cast(value_of(i[0]), fact.dtype), Constant(float(step), fact.dtype))
            return call("add", stepped, Constant(float(start), fact.dtype))
        return cast(value_of(size(start) + i[0] * size(step)), fact.dtype)

    return Lazy(fact.shape, fact.dtype, load)


@lowers(aten.linspace.default)
def linspace(_: Lowering, fact: Fact, start: float, end: float, steps: int, **__: object) -> Lazy:
    width = (end - start) / max(steps - 1, 1)

    def load(i: Indices) -> Expr:
        stepped = call("mul", cast(value_of(i[0]), fact.dtype), Constant(width, fact.dtype))
        return call("add", stepped, Constant(float(start), fact.dtype))

    return Lazy(fact.shape, fact.dtype, load)


def constant(fact: Fact, number: Any) -> Lazy:
    return Lazy(fact.shape, fact.dtype, lambda i: cast(element(number, i, kind_of(number)), fact.dtype))


@lowers(aten.full.default, aten.full_like.default)
def full(_: Lowering, fact: Fact, __: object, number: Any, **___: object) -> Lazy:
    return constant(fact, number)


@lowers(aten.new_full.default)
def new_full(_: Lowering, fact: Fact, __: Lazy, shape: object, number: Any, **___: object) -> Lazy:
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


@lowers(aten.eye.default, aten.eye.m)
def eye(_: Lowering, fact: Fact, *__: object, **___: object) -> Lazy:
    return Lazy(fact.shape, fact.dtype, lambda i: cast(is_test("eq", value_of(i[0]), value_of(i[1])), fact.dtype))


@lowers(aten.one_hot.default)
def one_hot(_: Lowering, fact: Fact, ids: Lazy, classes: object) -> Lazy:
    return Lazy(fact.shape, fact.dtype, lambda i: cast(is_test("eq", ids.load(i[:-1]), value_of(i[-1])), fact.dtype))


def _triangle(test: str, target: Any) -> None:
    @lowers(target)
    def lower(_: Lowering, fact: Fact, a: Lazy, diagonal: int = 0) -> Lazy:
        def load(i: Indices) -> Expr:
            kept = is_test(test, value_of(i[-1]), value_of(i[-2] + diagonal))
            return choose(kept, a.load(i), Constant(0, fact.dtype))

        return Lazy(fact.shape, fact.dtype, load)


_triangle("le", aten.tril.default)
_triangle("ge", aten.triu.default)

"""Arithmetic, comparison, selection and conversion, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sylvester.codegen.elementwise import Operand, call, choose, extremes, is_test, kind_of, pointwise, scaled
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, element, lowers
from sylvester.codegen.scalar import FLOATS, Constant, Expr, cast, common

aten = torch.ops.aten
LARGEST = torch.finfo(torch.float32).max


def _binary(function: str, *targets: Any) -> None:
    @lowers(*targets)
    def lower(_: Lowering, fact: Fact, a: Operand, b: Operand, *, alpha: float | int = 1) -> Lazy:
        return pointwise(fact, lambda x, y: call(function, x, scaled(y, alpha)), a, b)


def _compare(function: str, *targets: Any) -> None:
    @lowers(*targets)
    def lower(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
        dtype = common(kind_of(a), kind_of(b))
        return pointwise(fact, lambda x, y: is_test(function, x, y), a, b, dtype=dtype)


def _extreme(which: int, *targets: Any) -> None:
    @lowers(*targets)
    def lower(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
        return pointwise(fact, lambda x, y: call(extremes(fact.dtype)[which], x, y), a, b)


_binary("add", aten.add.Tensor, aten.add.Scalar)
_binary("sub", aten.sub.Tensor, aten.sub.Scalar)
_binary("mul", aten.mul.Tensor, aten.mul.Scalar)
_binary("div", aten.div.Tensor, aten.div.Scalar)
_binary("atan2", aten.atan2.default)
_binary("and", aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.logical_and.default)
_binary("or", aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.logical_or.default)
_binary("xor", aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar, aten.logical_xor.default)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _compare(_name, getattr(aten, _name).Tensor, getattr(aten, _name).Scalar)
_extreme(0, aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp_min.Tensor)
_extreme(1, aten.minimum.default, aten.min.other, aten.clamp_max.default, aten.clamp_max.Tensor)


def _rounded(rounding: str, floats: str, integers: str) -> Callable[[Fact, Operand, Operand], Lazy]:
    """A quotient or remainder that has its own function for floats and for integers."""

    def lower(fact: Fact, a: Operand, b: Operand) -> Lazy:
        return pointwise(fact, lambda x, y: call(floats if fact.dtype in FLOATS else integers, x, y), a, b)

    return lower


_floor_quotient = _rounded("floor", "floor_quotient", "idiv")
_quotient = _rounded("trunc", "trunc_quotient", "itrunc")
_remainder = _rounded("floor", "remainder", "imod")
_fmod = _rounded("trunc", "fmod", "rem")


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(_: Lowering, fact: Fact, a: Operand, b: Operand, *, rounding_mode: str | None = None) -> Lazy:
    if rounding_mode is None:
        return pointwise(fact, lambda x, y: call("div", x, y), a, b)
    return (_floor_quotient if rounding_mode == "floor" else _quotient)(fact, a, b)


@lowers(aten.floor_divide.default)
def floor_divide(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    return _floor_quotient(fact, a, b)


@lowers(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    """With the sign of the divisor."""
    return _remainder(fact, a, b)


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    """With the sign of the dividend."""
    return _fmod(fact, a, b)


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(_: Lowering, fact: Fact, a: Operand, b: Operand, alpha: float | int = 1) -> Lazy:
    return pointwise(fact, lambda x, y: call("sub", y, scaled(x, alpha)), a, b)


POWERS: dict[object, Callable[[Expr], Expr]] = {
    0: lambda x: Constant(1, x.dtype),
    1: lambda x: x,
    2: lambda x: call("mul", x, x),
    3: lambda x: call("mul", x, call("mul", x, x)),
    0.5: lambda x: call("sqrt", x),
    -0.5: lambda x: call("rsqrt", x),
    -1: lambda x: call("div", Constant(1.0, x.dtype), x),
}


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    if isinstance(b, (int, float)) and b in POWERS:
        return pointwise(fact, POWERS[b], a)
    return pointwise(fact, lambda x, y: call("pow" if fact.dtype in FLOATS else "ipow", x, y), a, b)


@lowers(aten.clamp.default, aten.clamp.Tensor)
def clamp(_: Lowering, fact: Fact, a: Operand, min: Operand | None = None, max: Operand | None = None) -> Lazy:
    result = pointwise(fact, lambda x: x, a)
    for function, bound in zip(extremes(fact.dtype), (min, max), strict=True):
        if bound is not None:
            result = pointwise(fact, lambda x, y, function=function: call(function, x, y), result, bound)
    return result


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(_: Lowering, fact: Fact, condition: Lazy, a: Operand, b: Operand) -> Lazy:
    def load(indices: Indices) -> Expr:
        yes, no = (cast(element(o, indices, kind_of(o)), fact.dtype) for o in (a, b))
        return choose(condition.at(indices), yes, no)

    return Lazy(fact.shape, fact.dtype, load)


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(lowering: Lowering, fact: Fact, a: Lazy, mask: Lazy, filler: Operand) -> Lazy:
    return where(lowering, fact, mask, filler, a)


@lowers(aten.nan_to_num.default)
def nan_to_num(
    _: Lowering, fact: Fact, a: Lazy, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Lazy:
    limits = {math.inf: LARGEST if posinf is None else posinf, -math.inf: -LARGEST if neginf is None else neginf}

    def compute(x: Expr) -> Expr:
        result = choose(call("isnan", x, dtype="b8"), Constant(nan or 0.0, x.dtype), x)
        for infinity, finite in limits.items():
            result = choose(is_test("eq", x, Constant(infinity, x.dtype)), Constant(finite, x.dtype), result)
        return result

    return pointwise(fact, compute, a)


@lowers(aten.addcmul.default)
def addcmul(_: Lowering, fact: Fact, a: Operand, b: Operand, c: Operand, *, value: float = 1) -> Lazy:
    return pointwise(fact, lambda x, y, z: call("add", x, scaled(call("mul", y, z), value)), a, b, c)


@lowers(aten.addcdiv.default)
def addcdiv(_: Lowering, fact: Fact, a: Operand, b: Operand, c: Operand, *, value: float = 1) -> Lazy:
    return pointwise(fact, lambda x, y, z: call("add", x, scaled(call("div", y, z), value)), a, b, c)


@lowers(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(_: Lowering, fact: Fact, a: Operand, b: Operand, weight: Operand) -> Lazy:
    return pointwise(fact, lambda x, y, w: call("add", x, call("mul", w, call("sub", y, x))), a, b, weight)


@lowers(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.device,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.type_as.default,
)
def convert(_: Lowering, fact: Fact, a: Lazy, *__: object, **___: object) -> Lazy:
    return pointwise(fact, lambda x: x, a)

"""Elementwise ops as scalar expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, element, lowers
from sylvester.codegen.scalar import FLOATS, Call, Constant, Expr, cast, common

aten, dialect = torch.ops.aten, torch.ops.sylvester
Operand = Lazy | Index | float | int


def kind_of(operand: Any) -> str:
    """The dtype an operand brings to a promotion; numbers are weaker than tensors of their kind."""
    if isinstance(operand, Lazy):
        return operand.dtype
    if isinstance(operand, bool):
        return "b8"
    return "f32" if isinstance(operand, float) else "i64"


def pointwise(fact: Fact, compute: Callable[..., Expr], *operands: Operand, dtype: str | None = None) -> Lazy:
    """compute(scalars...) at every index; the operands are broadcast and cast to `dtype` (the result's by default)."""
    wanted = dtype or fact.dtype

    def load(indices: Indices) -> Expr:
        return compute(*(cast(element(o, indices, kind_of(o)), wanted) for o in operands))

    return Lazy(fact.shape, fact.dtype, load)


def call(function: str, *arguments: Expr, dtype: str = "") -> Call:
    return Call(function, arguments, dtype or arguments[0].dtype)


def scaled(x: Expr, alpha: float | int) -> Expr:
    return x if alpha == 1 else call("mul", x, Constant(alpha, x.dtype))


def _binary(function: str, *targets: Any) -> None:
    def lower(_: Lowering, fact: Fact, a: Operand, b: Operand, *, alpha: float | int = 1) -> Lazy:
        return pointwise(fact, lambda x, y: call(function, x, scaled(y, alpha)), a, b)

    lowers(*targets)(lower)


def _compare(function: str, *targets: Any) -> None:
    def lower(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
        dtype = common(kind_of(a), kind_of(b))
        return pointwise(fact, lambda x, y: call(function, x, y, dtype="b8"), a, b, dtype=dtype)

    lowers(*targets)(lower)


def _unary(function: str, *targets: Any) -> None:
    def lower(_: Lowering, fact: Fact, a: Operand) -> Lazy:
        return pointwise(fact, lambda x: call(function, x), a)

    lowers(*targets)(lower)


for name, function in {"add": "add", "sub": "sub", "mul": "mul"}.items():
    packet = getattr(aten, name)
    _binary(function, packet.Tensor, packet.Scalar)
_binary("and", aten.bitwise_and.Tensor, aten.bitwise_and.Scalar, aten.logical_and.default)
_binary("or", aten.bitwise_or.Tensor, aten.bitwise_or.Scalar, aten.logical_or.default)
_binary("xor", aten.bitwise_xor.Tensor, aten.logical_xor.default)
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    packet = getattr(aten, name)
    _compare(name, packet.Tensor, packet.Scalar)
for name in ("exp", "log", "tanh", "erf", "sigmoid", "silu", "sqrt", "rsqrt", "sin", "cos", "floor", "ceil", "round", "trunc", "log1p", "expm1", "neg"):
    _unary(name, getattr(aten, name).default)


@lowers(aten.div.Tensor, aten.div.Scalar)
def div(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    return pointwise(fact, lambda x, y: call("div", x, y), a, b)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(_: Lowering, fact: Fact, a: Operand, b: Operand, *, rounding_mode: str | None = None) -> Lazy:
    if fact.dtype not in FLOATS and rounding_mode == "floor":
        return pointwise(fact, lambda x, y: call("idiv", x, y), a, b)
    rounding = {"floor": "floor", "trunc": "trunc"}.get(rounding_mode or "", "")
    if fact.dtype in FLOATS and rounding:
        return pointwise(fact, lambda x, y: call(rounding, call("div", x, y)), a, b)
    return pointwise(fact, lambda x, y: call("div", x, y), a, b)


@lowers(aten.floor_divide.default)
def floor_divide(lowering: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    return div_mode(lowering, fact, a, b, rounding_mode="floor")


@lowers(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    return pointwise(fact, lambda x, y: call("fmod" if fact.dtype in FLOATS else "imod", x, y), a, b)


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(_: Lowering, fact: Fact, a: Operand, b: Operand, alpha: float | int = 1) -> Lazy:
    return pointwise(fact, lambda x, y: call("sub", y, scaled(x, alpha)), a, b)


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    exact: dict[object, Callable[[Expr], Expr]] = {
        1: lambda x: x,
        2: lambda x: call("mul", x, x),
        3: lambda x: call("mul", x, call("mul", x, x)),
        0.5: lambda x: call("sqrt", x),
        -0.5: lambda x: call("rsqrt", x),
        -1: lambda x: call("div", Constant(1.0, x.dtype), x),
    }
    if isinstance(b, (int, float)) and b in exact:
        return pointwise(fact, exact[b], a)
    return pointwise(fact, lambda x, y: call("pow", x, y), a, b)


@lowers(aten.reciprocal.default)
def reciprocal(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("div", Constant(1.0, x.dtype), x), a)


@lowers(aten.square.default)
def square(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("mul", x, x), a)


@lowers(aten.abs.default)
def absolute(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("abs" if fact.dtype in FLOATS else "iabs", x), a)


@lowers(aten.sign.default)
def sign(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    def compute(x: Expr) -> Expr:
        zero = Constant(0, x.dtype)
        above, below = (call(f, x, zero, dtype="b8") for f in ("gt", "lt"))
        return call("sub", cast(above, x.dtype), cast(below, x.dtype))

    return pointwise(fact, compute, a)


@lowers(aten.logical_not.default)
def logical_not(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("not", x), a)


@lowers(aten.bitwise_not.default)
def bitwise_not(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("not" if fact.dtype == "b8" else "bitnot", x), a)


@lowers(aten.isnan.default)
def isnan(_: Lowering, fact: Fact, a: Lazy) -> Lazy:
    return pointwise(fact, lambda x: call("isnan", x, dtype="b8"), a, dtype=a.dtype)


@lowers(aten.isinf.default)
def isinf(_: Lowering, fact: Fact, a: Lazy) -> Lazy:
    infinity = Constant(math.inf, a.dtype)
    return pointwise(fact, lambda x: call("eq", call("abs", x), infinity, dtype="b8"), a, dtype=a.dtype)


def clamped(x: Expr, low: float | int | None, high: float | int | None) -> Expr:
    names = ("fmax", "fmin") if x.dtype in FLOATS else ("max", "min")
    x = x if low is None else call(names[0], x, Constant(low, x.dtype))
    return x if high is None else call(names[1], x, Constant(high, x.dtype))


@lowers(aten.clamp.default, aten.hardtanh.default)
def clamp(_: Lowering, fact: Fact, a: Operand, low: float | None = None, high: float | None = None, **bounds: float | None) -> Lazy:
    low, high = bounds.get("min", low), bounds.get("max", high)
    return pointwise(fact, lambda x: clamped(x, low, high), a)


@lowers(aten.clamp_min.default)
def clamp_min(_: Lowering, fact: Fact, a: Operand, low: float) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, low, None), a)


@lowers(aten.clamp_max.default)
def clamp_max(_: Lowering, fact: Fact, a: Operand, high: float) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, None, high), a)


@lowers(aten.relu.default)
def relu(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, 0, None), a)


@lowers(aten.relu6.default)
def relu6(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, 0, 6), a)


def hard_gate(x: Expr) -> Expr:
    """clamp(x + 3, 0, 6) / 6."""
    return call("mul", clamped(call("add", x, Constant(3.0, x.dtype)), 0, 6), Constant(1 / 6, x.dtype))


@lowers(aten.hardsigmoid.default)
def hardsigmoid(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, hard_gate, a)


@lowers(aten.hardswish.default)
def hardswish(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("mul", x, hard_gate(x)), a)


@lowers(aten.leaky_relu.default)
def leaky_relu(_: Lowering, fact: Fact, a: Operand, slope: float = 0.01) -> Lazy:
    def compute(x: Expr) -> Expr:
        return call("add", clamped(x, 0, None), scaled(clamped(x, None, 0), slope))

    return pointwise(fact, compute, a)


@lowers(aten.elu.default)
def elu(_: Lowering, fact: Fact, a: Operand, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Lazy:
    def compute(x: Expr) -> Expr:
        below = call("expm1", scaled(clamped(x, None, 0), input_scale))
        return scaled(call("add", clamped(x, 0, None), scaled(below, alpha)), scale)

    return pointwise(fact, compute, a)


@lowers(aten.softplus.default)
def softplus(_: Lowering, fact: Fact, a: Operand, beta: float = 1.0, threshold: float = 20.0) -> Lazy:
    def compute(x: Expr) -> Expr:
        y = scaled(x, beta)
        smooth = scaled(call("softplus", y), 1 / beta)
        return call("where", call("gt", y, Constant(threshold, y.dtype), dtype="b8"), x, smooth, dtype=x.dtype)

    return pointwise(fact, compute, a)


@lowers(aten.mish.default)
def mish(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("mul", x, call("tanh", call("softplus", x))), a)


@lowers(aten.gelu.default)
def gelu(_: Lowering, fact: Fact, a: Operand, *, approximate: str = "none") -> Lazy:
    return pointwise(fact, lambda x: call(gelu_name(approximate), x), a)


def gelu_name(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


@lowers(dialect.swiglu.default)
def swiglu(_: Lowering, fact: Fact, gate: Lazy, up: Lazy) -> Lazy:
    return pointwise(fact, lambda g, u: call("mul", call("silu", g), u), gate, up)


@lowers(dialect.geglu.default)
def geglu(_: Lowering, fact: Fact, gate: Lazy, up: Lazy, approximate: str) -> Lazy:
    return pointwise(fact, lambda g, u: call("mul", call(gelu_name(approximate), g), u), gate, up)


@lowers(aten.maximum.default, aten.max.other)
def maximum(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    return pointwise(fact, lambda x, y: call("fmax" if fact.dtype in FLOATS else "max", x, y), a, b)


@lowers(aten.minimum.default, aten.min.other)
def minimum(_: Lowering, fact: Fact, a: Operand, b: Operand) -> Lazy:
    return pointwise(fact, lambda x, y: call("fmin" if fact.dtype in FLOATS else "min", x, y), a, b)


@lowers(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(_: Lowering, fact: Fact, condition: Lazy, a: Operand, b: Operand) -> Lazy:
    def load(indices: Indices) -> Expr:
        yes, no = (cast(element(o, indices, kind_of(o)), fact.dtype) for o in (a, b))
        return call("where", condition.at(indices), yes, no, dtype=fact.dtype)

    return Lazy(fact.shape, fact.dtype, load)


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(lowering: Lowering, fact: Fact, a: Lazy, mask: Lazy, filler: Operand) -> Lazy:
    result = where(lowering, fact, mask, filler, a)
    assert isinstance(result, Lazy)
    return result


@lowers(aten.addcmul.default)
def addcmul(_: Lowering, fact: Fact, a: Operand, b: Operand, c: Operand, *, value: float = 1) -> Lazy:
    return pointwise(fact, lambda x, y, z: call("add", x, scaled(call("mul", y, z), value)), a, b, c)


@lowers(
    aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.to.device,
    aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.dropout.default, aten.type_as.default,
)  # fmt: skip
def convert(_: Lowering, fact: Fact, a: Lazy, *__: object, **___: object) -> Lazy:
    return pointwise(fact, lambda x: x, a)


@lowers(dialect.rope.default)
def rope(_: Lowering, fact: Fact, x: Lazy, cos: Lazy, sin: Lazy, interleaved: bool) -> Lazy:
    """Feature f of pair p: x[f] cos[f] + sign(p) x[partner] sin[f], with sign -1 for the first of a pair."""
    rotary = cos.shape[-1]
    half, features = rotary // 2, fact.shape[-1]

    def turned(indices: Indices) -> Expr:
        *outer, feature = indices
        batch, _, token = outer
        table = (batch, token, feature)[3 - len(cos.shape) :]
        second = feature % 2 if interleaved else feature // half
        partner = feature + 1 - 2 * second if interleaved else feature % half + (1 - second) * half
        signed = call("mul", sign_of(second), x.load([*outer, partner]))
        return call("add", call("mul", x.load(indices), cos.at(table)), call("mul", signed, sin.at(table)))

    if rotary == features:
        return Lazy(fact.shape, fact.dtype, turned)

    def partial(indices: Indices) -> Expr:
        inside = call("lt", value_of(indices[-1]), value_of(rotary), dtype="b8")
        return call("where", inside, turned([*indices[:-1], indices[-1] % rotary]), x.load(indices), dtype=fact.dtype)

    return Lazy(fact.shape, fact.dtype, partial)


def sign_of(second: Index) -> Expr:
    """-1.0 for 0, 1.0 for 1."""
    return cast(value_of(2 * second - 1), "f32")


def value_of(position: Index) -> Expr:
    return element(position, (), "i64")


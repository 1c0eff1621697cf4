"""Functions of one number: elementary functions, tests and activations."""

from __future__ import annotations

import math
from typing import Any

import torch

from sylvester.codegen.elementwise import Operand, call, choose, clamped, is_test, pointwise, scaled
from sylvester.codegen.index import index
from sylvester.codegen.lazy import Lazy
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import FLOATS, Constant, Expr, cast
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten
DIRECT = (
    "exp", "log", "log2", "log10", "log1p", "expm1", "tanh", "erf", "sigmoid", "silu", "sqrt", "rsqrt", "sin", "cos",
    "floor", "ceil", "round", "trunc", "neg",
)  # fmt: skip
"""Ops that are scalar functions of the same name."""


def _unary(function: str, target: Any) -> None:
    @lowers(target)
    def lower(_: Lowering, fact: Fact, a: Operand) -> Lazy:
        return pointwise(fact, lambda x: call(function, x), a)


for _name in DIRECT:
    _unary(_name, getattr(aten, _name).default)


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
        above, below = (cast(is_test(test, x, Constant(0, x.dtype)), x.dtype) for test in ("gt", "lt"))
        return call("sub", above, below)

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
    infinity = Constant(math.inf, "f32")
    return pointwise(fact, lambda x: is_test("eq", call("abs", x), infinity), a, dtype="f32")


@lowers(aten.relu.default)
def relu(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, 0, None), a)


@lowers(aten.relu6.default)
def relu6(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, 0, 6), a)


@lowers(aten.hardtanh.default)
def hardtanh(_: Lowering, fact: Fact, a: Operand, min_val: float = -1, max_val: float = 1) -> Lazy:
    return pointwise(fact, lambda x: clamped(x, min_val, max_val), a)


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
def leaky_relu(_: Lowering, fact: Fact, a: Operand, negative_slope: float = 0.01) -> Lazy:
    return pointwise(fact, lambda x: _below_zero(x, scaled(x, negative_slope)), a)


def _below_zero(x: Expr, below: Expr) -> Expr:
    """x where it is positive, else `below`."""
    return choose(is_test("gt", x, Constant(0, x.dtype)), x, below)


@lowers(aten.prelu.default)
def prelu(_: Lowering, fact: Fact, a: Lazy, weight: Lazy) -> Lazy:
    """One slope for all, or one per channel (axis 1)."""
    slope = weight
    if weight.shape[0] != index(1) and len(fact.shape) > 1:
        shape = (weight.shape[0], *[index(1)] * (len(fact.shape) - 2))
        slope = Lazy(shape, weight.dtype, lambda i: weight.load(i[:1]))
    return pointwise(fact, lambda x, s: _below_zero(x, call("mul", x, s)), a, slope)


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
        return choose(is_test("gt", y, Constant(threshold, y.dtype)), x, smooth)

    return pointwise(fact, compute, a)


@lowers(aten.log_sigmoid.default)
def log_sigmoid(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("neg", call("softplus", call("neg", x))), a)


@lowers(aten.mish.default)
def mish(_: Lowering, fact: Fact, a: Operand) -> Lazy:
    return pointwise(fact, lambda x: call("mul", x, call("tanh", call("softplus", x))), a)


@lowers(aten.gelu.default)
def gelu(_: Lowering, fact: Fact, a: Operand, *, approximate: str = "none") -> Lazy:
    return pointwise(fact, lambda x: call(gelu_name(approximate), x), a)


def gelu_name(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


@lowers(aten.glu.default)
def glu(_: Lowering, fact: Fact, a: Lazy, dim: int = -1) -> Lazy:
    """The first half of an axis times the sigmoid of the second (Dauphin et al., 2017)."""
    axis = dim % len(fact.shape)
    gate = Lazy(fact.shape, a.dtype, lambda i: a.load([*i[:axis], i[axis] + fact.shape[axis], *i[axis + 1 :]]))
    first = Lazy(fact.shape, a.dtype, a.load)
    return pointwise(fact, lambda x, g: call("mul", x, call("sigmoid", g)), first, gate)


@lowers(aten.dropout.default)
def dropout(_: Lowering, fact: Fact, a: Lazy, p: float, train: bool) -> Lazy:
    if train and p:
        raise Unsupported(f"dropout with p={p} in training mode has no lowering", hint="call model.eval() first")
    return a

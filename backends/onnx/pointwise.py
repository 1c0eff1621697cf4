"""Elementwise ATen ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.graph import TYPES

aten = torch.ops.aten

SAME_NAME = {
    "abs": "Abs", "ceil": "Ceil", "floor": "Floor", "neg": "Neg", "round": "Round", "isnan": "IsNaN",
    "isinf": "IsInf",
}  # fmt: skip
OF_FLOATS = {
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "tanh": "Tanh", "erf": "Erf", "sigmoid": "Sigmoid", "hardswish": "HardSwish", "mish": "Mish",
}  # fmt: skip
COMPARED = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}
LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}
BITWISE = {"bitwise_and": "And", "bitwise_or": "Or", "bitwise_xor": "Xor"}
COPIES = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy")


def _unary(op: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, fact: Tensor, x: Operand, **_: Any) -> ir.Value:
        whole = not x.dtype.is_floating_point and op in ("Ceil", "Floor", "Round")
        source = x.dtype if fact.dtype == torch.bool else fact.dtype
        return b.read(x, source) if whole else b.call(op, b.read(x, source))

    return translate


for name, op in (SAME_NAME | OF_FLOATS).items():
    translates(getattr(aten, name).default)(_unary(op))


@translates(*(getattr(aten, name).default for name in COPIES), aten.dropout.default)
def copy(b: Builder, fact: Tensor, x: Operand, *_: Any, **__: Any) -> ir.Value:
    return x.value


@translates(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
def convert(b: Builder, fact: Tensor, x: Operand, *_: Any, **__: Any) -> ir.Value:
    return b.read(x, fact.dtype)


@translates(aten.sign.default)
def sign(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    """0 for NaN."""
    zero = b.number(0, x.dtype)
    above, below = b.call("Greater", x.value, zero), b.call("Less", x.value, zero)
    return b.call("Sub", *(b.cast(t, torch.bool, fact.dtype) for t in (above, below)))


@translates(aten.relu.default)
def relu(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Relu", x.value)


@translates(aten.square.default)
def square(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Mul", x.value, x.value)


@translates(aten.rsqrt.default)
def rsqrt(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Reciprocal", b.call("Sqrt", b.read(x, fact.dtype)))


@translates(aten.log1p.default)
def log1p(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Log", b.call("Add", x.value, b.number(1, fact.dtype)))


@translates(aten.expm1.default)
def expm1(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    """2 tanh(x / 2) / (1 - tanh(x / 2)), which keeps its digits near 0; e^x - 1 where that is large."""
    half = b.call("Tanh", b.call("Mul", x.value, b.number(0.5, fact.dtype)))
    one = b.number(1, fact.dtype)
    small = b.call("Div", b.call("Mul", half, b.number(2, fact.dtype)), b.call("Sub", one, half))
    large = b.call("Sub", b.call("Exp", x.value), one)
    near = b.call("Less", b.call("Abs", x.value), one)
    return b.call("Where", near, small, large)


@translates(aten.log2.default)
def log2(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Mul", b.call("Log", b.read(x, fact.dtype)), b.number(1 / math.log(2), fact.dtype))


@translates(aten.log10.default)
def log10(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Mul", b.call("Log", b.read(x, fact.dtype)), b.number(1 / math.log(10), fact.dtype))


@translates(aten.trunc.default)
def trunc(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    if not fact.dtype.is_floating_point:
        return x.value
    return b.call("Mul", b.call("Sign", x.value), b.call("Floor", b.call("Abs", x.value)))


@translates(aten.logical_not.default)
def logical_not(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Not", b.read(x, torch.bool))


@translates(aten.bitwise_not.default)
def bitwise_not(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Not" if x.dtype == torch.bool else "BitwiseNot", x.value)


def _arithmetic(b: Builder, fact: Tensor, op: str, x: Any, y: Any) -> ir.Value:
    return b.call(op, b.read(x, fact.dtype), b.read(y, fact.dtype))


@translates(aten.add.Tensor, aten.add.Scalar)
def add(b: Builder, fact: Tensor, x: Any, y: Any, alpha: float = 1) -> ir.Value:
    if fact.dtype == torch.bool:
        return b.call("Or", x.value, y.value)
    return b.call("Add", b.read(x, fact.dtype), _scaled(b, fact, y, alpha))


@translates(aten.sub.Tensor, aten.sub.Scalar)
def sub(b: Builder, fact: Tensor, x: Any, y: Any, alpha: float = 1) -> ir.Value:
    return b.call("Sub", b.read(x, fact.dtype), _scaled(b, fact, y, alpha))


@translates(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(b: Builder, fact: Tensor, x: Any, y: Any, alpha: float = 1) -> ir.Value:
    return b.call("Sub", b.read(y, fact.dtype), _scaled(b, fact, x, alpha))


def _scaled(b: Builder, fact: Tensor, x: Any, alpha: float) -> ir.Value:
    read = b.read(x, fact.dtype)
    return read if alpha == 1 else b.call("Mul", read, b.number(alpha, fact.dtype))


@translates(aten.mul.Tensor, aten.mul.Scalar)
def mul(b: Builder, fact: Tensor, x: Any, y: Any) -> ir.Value:
    return _arithmetic(b, fact, "And" if fact.dtype == torch.bool else "Mul", x, y)


@translates(aten.div.Tensor, aten.div.Scalar)
def div(b: Builder, fact: Tensor, x: Any, y: Any) -> ir.Value:
    return _arithmetic(b, fact, "Div", x, y)


@translates(aten.div.Tensor_mode, aten.div.Scalar_mode)
def div_mode(b: Builder, fact: Tensor, x: Any, y: Any, rounding_mode: str | None = None) -> ir.Value:
    if rounding_mode == "floor":
        return floor_divide(b, fact, x, y)
    whole = _arithmetic(b, fact, "Div", x, y)
    if rounding_mode is None or not fact.dtype.is_floating_point:
        return whole
    return b.call("Mul", b.call("Sign", whole), b.call("Floor", b.call("Abs", whole)))


@translates(aten.floor_divide.default)
def floor_divide(b: Builder, fact: Tensor, x: Any, y: Any) -> ir.Value:
    """(x - remainder) / y, which is whole but for rounding."""
    whole = b.call("Sub", b.read(x, fact.dtype), remainder(b, fact, x, y))
    quotient = b.call("Div", whole, b.read(y, fact.dtype))
    return b.call("Round", quotient) if fact.dtype.is_floating_point else quotient


@translates(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(b: Builder, fact: Tensor, x: Any, y: Any) -> ir.Value:
    """With the sign of y."""
    x, y = b.read(x, fact.dtype), b.read(y, fact.dtype)
    if not fact.dtype.is_floating_point:
        return b.call("Mod", x, y)
    rest = b.call("Mod", x, y, fmod=1)
    other = b.call("Less", b.call("Mul", b.call("Sign", rest), b.call("Sign", y)), b.number(0, fact.dtype))
    return b.call("Where", other, b.call("Add", rest, y), rest)


@translates(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(b: Builder, fact: Tensor, x: Any, y: Any) -> ir.Value:
    return b.call("Mod", b.read(x, fact.dtype), b.read(y, fact.dtype), fmod=1)


@translates(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(b: Builder, fact: Tensor, x: Any, y: Any) -> ir.Value:
    if y == 2 and isinstance(x, Operand):
        return b.call("Mul", b.read(x, fact.dtype), b.read(x, fact.dtype))
    if y == 0.5:
        return b.call("Sqrt", b.read(x, fact.dtype))
    return _arithmetic(b, fact, "Pow", x, y)


@translates(aten.maximum.default, aten.max.other)
def maximum(b: Builder, fact: Tensor, x: Operand, y: Operand) -> ir.Value:
    return _arithmetic(b, fact, "Max", x, y)


@translates(aten.minimum.default, aten.min.other)
def minimum(b: Builder, fact: Tensor, x: Operand, y: Operand) -> ir.Value:
    return _arithmetic(b, fact, "Min", x, y)


def common(x: Any, y: Any) -> torch.dtype:
    """The dtype in which two operands, or an operand and a number, are compared."""
    facts = [t.fact if isinstance(t, Operand) else 0 if isinstance(t, torch.SymInt) else t for t in (x, y)]
    first, second = facts
    return torch.result_type(first, second)


def _compared(op: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, fact: Tensor, x: Operand, y: Any) -> ir.Value:
        dtype = common(x, y)
        if dtype == torch.bool and op != "Equal":
            dtype = torch.int32
        return b.call(op, b.read(x, dtype), b.read(y, dtype))

    return translate


for name, op in COMPARED.items():
    translates(getattr(aten, name).Tensor, getattr(aten, name).Scalar)(_compared(op))


@translates(aten.ne.Tensor, aten.ne.Scalar)
def ne(b: Builder, fact: Tensor, x: Operand, y: Any) -> ir.Value:
    return b.call("Not", _compared("Equal")(b, fact, x, y))


def _logical(op: str) -> Callable[..., ir.Value]:
    return lambda b, fact, x, y: b.call(op, b.read(x, torch.bool), b.read(y, torch.bool))


for name, op in LOGICAL.items():
    translates(getattr(aten, name).default)(_logical(op))


def _bitwise(op: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, fact: Tensor, x: Operand, y: Any) -> ir.Value:
        prefix = "" if fact.dtype == torch.bool else "Bitwise"
        return b.call(prefix + op, b.read(x, fact.dtype), b.read(y, fact.dtype))

    return translate


for name, op in BITWISE.items():
    translates(getattr(aten, name).Tensor, getattr(aten, name).Scalar)(_bitwise(op))


@translates(aten.clamp.default, aten.clamp.Tensor)
def clamp(b: Builder, fact: Tensor, x: Operand, min: Any = None, max: Any = None) -> ir.Value:
    found = b.read(x, fact.dtype)
    found = found if min is None else b.call("Max", found, b.read(min, fact.dtype))
    return found if max is None else b.call("Min", found, b.read(max, fact.dtype))


@translates(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(b: Builder, fact: Tensor, x: Operand, min: Any) -> ir.Value:
    return clamp(b, fact, x, min)


@translates(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(b: Builder, fact: Tensor, x: Operand, max: Any) -> ir.Value:
    return clamp(b, fact, x, None, max)


@translates(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def where(b: Builder, fact: Tensor, condition: Operand, x: Any, y: Any) -> ir.Value:
    return b.call("Where", b.read(condition, torch.bool), b.read(x, fact.dtype), b.read(y, fact.dtype))


@translates(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(b: Builder, fact: Tensor, x: Operand, mask: Operand, number: Any) -> ir.Value:
    return b.call("Where", b.read(mask, torch.bool), b.read(number, fact.dtype), x.value)


@translates(aten.addcmul.default)
def addcmul(b: Builder, fact: Tensor, x: Operand, y: Operand, z: Operand, value: float = 1) -> ir.Value:
    product = b.call("Mul", b.read(y, fact.dtype), b.read(z, fact.dtype))
    scaled = product if value == 1 else b.call("Mul", product, b.number(value, fact.dtype))
    return b.call("Add", x.value, scaled)


@translates(aten.addcdiv.default)
def addcdiv(b: Builder, fact: Tensor, x: Operand, y: Operand, z: Operand, value: float = 1) -> ir.Value:
    quotient = b.call("Div", b.read(y, fact.dtype), b.read(z, fact.dtype))
    scaled = quotient if value == 1 else b.call("Mul", quotient, b.number(value, fact.dtype))
    return b.call("Add", x.value, scaled)


@translates(aten.lerp.Tensor, aten.lerp.Scalar)
def lerp(b: Builder, fact: Tensor, x: Operand, y: Operand, weight: Any) -> ir.Value:
    way = b.call("Sub", y.value, x.value)
    return b.call("Add", x.value, b.call("Mul", way, b.read(weight, fact.dtype)))


@translates(aten.nan_to_num.default)
def nan_to_num(
    b: Builder, fact: Tensor, x: Operand, nan: float | None = None, posinf: float | None = None,
    neginf: float | None = None,
) -> ir.Value:  # fmt: skip
    limits = torch.finfo(fact.dtype)
    found = b.call("Where", b.call("IsNaN", x.value), b.number(nan or 0.0, fact.dtype), x.value)
    for signs, given, default in (((0, 1), posinf, limits.max), ((1, 0), neginf, limits.min)):
        infinite = b.call("IsInf", x.value, detect_negative=signs[0], detect_positive=signs[1])
        found = b.call("Where", infinite, b.number(default if given is None else given, fact.dtype), found)
    return found


@translates(aten.full_like.default)
def full_like(b: Builder, fact: Tensor, x: Operand, number: Any, **_: Any) -> ir.Value:
    return filled(b, fact, number)


@translates(aten.zeros_like.default, aten.zeros.default)
def zeros(b: Builder, fact: Tensor, *_: Any, **__: Any) -> ir.Value:
    return filled(b, fact, 0)


@translates(aten.ones_like.default, aten.ones.default)
def ones(b: Builder, fact: Tensor, *_: Any, **__: Any) -> ir.Value:
    return filled(b, fact, 1)


@translates(aten.new_zeros.default)
def new_zeros(b: Builder, fact: Tensor, *_: Any, **__: Any) -> ir.Value:
    return filled(b, fact, 0)


@translates(aten.new_ones.default)
def new_ones(b: Builder, fact: Tensor, *_: Any, **__: Any) -> ir.Value:
    return filled(b, fact, 1)


@translates(aten.new_full.default)
def new_full(b: Builder, fact: Tensor, x: Operand, size: Any, number: Any, **_: Any) -> ir.Value:
    return filled(b, fact, number)


@translates(aten.full.default)
def full(b: Builder, fact: Tensor, size: Any, number: Any, **_: Any) -> ir.Value:
    return filled(b, fact, number)


@translates(aten.scalar_tensor.default)
def scalar_tensor(b: Builder, fact: Tensor, number: Any, **_: Any) -> ir.Value:
    return b.read(number, fact.dtype)


def filled(b: Builder, fact: Tensor, number: Any) -> ir.Value:
    """A tensor of one number."""
    if fact.dim() == 0:
        return b.read(number, fact.dtype)
    return b.call("Expand", b.read(number, fact.dtype), b.shape(fact.shape))


@translates(aten.arange.default)
def arange(b: Builder, fact: Tensor, end: Any, **_: Any) -> ir.Value:
    return arange_step(b, fact, 0, end)


@translates(aten.arange.start, aten.arange.start_step)
def arange_step(b: Builder, fact: Tensor, start: Any, end: Any, step: Any = 1, **_: Any) -> ir.Value:
    """Whole numbers are counted as such; others are start + n * step."""
    if all(isinstance(n, int | torch.SymInt) for n in (start, end, step)):
        counted = b.call("Range", *(b.read(n, torch.int64) for n in (start, end, step)))
        return b.cast(counted, torch.int64, fact.dtype)
    count = b.call("Range", b.number(0, torch.int64), b.read(fact.shape[0], torch.int64), b.number(1, torch.int64))
    steps = b.call("Mul", b.cast(count, torch.int64, fact.dtype), b.number(step, fact.dtype))
    return b.call("Add", steps, b.number(start, fact.dtype))


@translates(aten.one_hot.default)
def one_hot(b: Builder, fact: Tensor, x: Operand, classes: int) -> ir.Value:
    numbers = b.constant(range(classes), "int64")
    found = b.call("Equal", b.call("Unsqueeze", x.value, b.ints(-1)), numbers)
    return b.call("Cast", found, to=TYPES[fact.dtype])

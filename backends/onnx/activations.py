"""Activation functions."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates

aten = torch.ops.aten
GELU_OPSET = 20


def silu_of(b: Builder, x: ir.Value) -> ir.Value:
    """x sigmoid(x); onnxruntime has a kernel of its own for it."""
    if b.contrib:
        return b.extra("QuickGelu", x, alpha=1.0)
    return b.call("Mul", x, b.call("Sigmoid", x))


def gelu_of(b: Builder, x: ir.Value, dtype: torch.dtype, approximate: str = "none") -> ir.Value:
    """x Phi(x), or its approximation by tanh."""
    if b.opset >= GELU_OPSET:
        return b.call("Gelu", x, approximate=approximate)
    half, one = b.number(0.5, dtype), b.number(1, dtype)
    if approximate == "none":
        inner = b.call("Erf", b.call("Mul", x, b.number(math.sqrt(0.5), dtype)))
    else:
        cube = b.call("Mul", b.call("Mul", x, x), x)
        inner = b.call("Add", x, b.call("Mul", cube, b.number(0.044715, dtype)))
        inner = b.call("Tanh", b.call("Mul", inner, b.number(math.sqrt(2 / math.pi), dtype)))
    return b.call("Mul", b.call("Mul", x, half), b.call("Add", inner, one))


@translates(aten.silu.default)
def silu(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return silu_of(b, x.value)


@translates(aten.gelu.default)
def gelu(b: Builder, fact: Tensor, x: Operand, approximate: str = "none") -> ir.Value:
    return gelu_of(b, x.value, fact.dtype, approximate)


@translates(aten.hardsigmoid.default)
def hardsigmoid(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("HardSigmoid", x.value, alpha=1 / 6, beta=0.5)


@translates(aten.relu6.default)
def relu6(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return hardtanh(b, fact, x, 0.0, 6.0)


@translates(aten.hardtanh.default)
def hardtanh(b: Builder, fact: Tensor, x: Operand, low: float = -1.0, high: float = 1.0) -> ir.Value:
    return b.call("Min", b.call("Max", x.value, b.number(low, fact.dtype)), b.number(high, fact.dtype))


@translates(aten.leaky_relu.default)
def leaky_relu(b: Builder, fact: Tensor, x: Operand, slope: float = 0.01) -> ir.Value:
    return b.call("LeakyRelu", x.value, alpha=slope)


@translates(aten.elu.default)
def elu(
    b: Builder, fact: Tensor, x: Operand, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> ir.Value:
    zero, one = b.number(0, fact.dtype), b.number(1, fact.dtype)
    below = b.call("Exp", b.call("Mul", b.call("Min", x.value, zero), b.number(input_scale, fact.dtype)))
    below = b.call("Mul", b.call("Sub", below, one), b.number(alpha * scale, fact.dtype))
    above = b.call("Mul", x.value, b.number(scale, fact.dtype))
    return b.call("Where", b.call("Greater", x.value, zero), above, below)


@translates(aten.softplus.default)
def softplus(b: Builder, fact: Tensor, x: Operand, beta: float = 1.0, threshold: float = 20.0) -> ir.Value:
    scaled = b.call("Mul", x.value, b.number(beta, fact.dtype))
    soft = b.call("Div", b.call("Softplus", scaled), b.number(beta, fact.dtype))
    return b.call("Where", b.call("Greater", scaled, b.number(threshold, fact.dtype)), x.value, soft)


@translates(aten.log_sigmoid.default)
def log_sigmoid(b: Builder, fact: Tensor, x: Operand) -> ir.Value:
    return b.call("Neg", b.call("Softplus", b.call("Neg", x.value)))


@translates(aten.prelu.default)
def prelu(b: Builder, fact: Tensor, x: Operand, slope: Operand) -> ir.Value:
    """A slope per channel, the second axis."""
    spread = b.reshape(slope.value, [slope.shape[0], *([1] * (x.rank - 2))])
    return b.call("PRelu", x.value, spread)


@translates(aten.glu.default)
def glu(b: Builder, fact: Tensor, x: Operand, dim: int = -1) -> ir.Value:
    first, second = b.calls("Split", x.value, count=2, axis=dim, num_outputs=2)
    return b.call("Mul", first, b.call("Sigmoid", second))


@translates(aten.softmax.int, aten._softmax.default)
def softmax(b: Builder, fact: Tensor, x: Operand, dim: int, *_: Any, **__: Any) -> ir.Value:
    return b.call("Softmax", b.read(x, fact.dtype), axis=dim)


@translates(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(b: Builder, fact: Tensor, x: Operand, dim: int, *_: Any, **__: Any) -> ir.Value:
    return b.call("LogSoftmax", b.read(x, fact.dtype), axis=dim)

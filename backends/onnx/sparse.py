"""Layers over values of which many are zero, computed as any other."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.activations import gelu_of, silu_of
from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.products import product, with_bias

dialect = torch.ops.sylvester
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@translates(dialect.sparse_glu.default)
def sparse_glu(
    b: Builder, fact: Tensor, x: Operand, weight: Operand, bias: Operand | None, gate: Operand, thresholds: Operand,
    activation: str,
) -> ir.Value:  # fmt: skip
    kind = APPROXIMATE.get(activation)
    a = silu_of(b, gate.value) if kind is None else gelu_of(b, gate.value, fact.dtype, kind)
    y = b.call("Mul", a, with_bias(b, product(b, x.value, weight), bias, fact.dtype))
    small = b.call("LessOrEqual", b.call("Abs", a), thresholds.value)
    return b.call("Where", small, b.number(0, fact.dtype), y)


@translates(dialect.zero_small.default)
def zero_small(b: Builder, fact: Tensor, x: Operand, level: Operand) -> ir.Value:
    small = b.call("LessOrEqual", b.call("Abs", x.value), level.value)
    return b.call("Where", small, b.number(0, fact.dtype), x.value)

"""Gated activations; for onnxruntime the layers of gate and value run as one."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.activations import gelu_of, silu_of
from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.packed_layers import packed


@translates(torch.ops.sylvester.swiglu.default)
def swiglu(b: Builder, fact: Tensor, gate: Operand, up: Operand) -> ir.Value:
    first, second = _both(b, gate, up)
    return b.call("Mul", silu_of(b, first), second)


@translates(torch.ops.sylvester.geglu.default)
def geglu(b: Builder, fact: Tensor, gate: Operand, up: Operand, approximate: str) -> ir.Value:
    first, second = _both(b, gate, up)
    return b.call("Mul", gelu_of(b, first, fact.dtype, approximate), second)


def _both(b: Builder, gate: Operand, up: Operand) -> tuple[ir.Value, ir.Value]:
    alone = all(len(t.node.users) == 1 for t in (gate, up))
    whole = packed(b, [gate.node, up.node]) if b.contrib and alone else None
    if whole is None:
        return gate.value, up.value
    first, second = b.calls("Split", whole, b.ints(gate.width(), up.width()), count=2, axis=-1)
    return first, second

"""Linear layers, matrix products and convolutions over float weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.weights import PLAIN, TRANSPOSED
from sylvester.compiler.program import binding, is_weight
from sylvester.compiler.quantized_ops import LINEARS

aten = torch.ops.aten
SPARSE = torch.ops.sylvester.sparse_linear.default


def transposed(b: Builder, weight: Operand) -> ir.Value:
    """A weight [n, k] as [k, n]: stored so where only linear layers read it."""
    if not weight.is_weight:
        return b.call("Transpose", weight.value, perm=[1, 0])
    if only_rows(b, weight):
        return b.weight(weight.key, TRANSPOSED)
    return b.call("Transpose", b.weight(weight.key, PLAIN), perm=[1, 0])


def only_rows(b: Builder, weight: Operand) -> bool:
    """Whether linear layers alone read a weight."""
    key = b.program.weights.resolve(weight.key)
    return all(_reads_rows(user, key, b) for user in b.program.users(key))


def _reads_rows(user: fx.Node, key: str, b: Builder) -> bool:
    """Whether a node is a linear layer, and the key that of its matrix."""
    weight = user.args[1] if user.target in LINEARS | {SPARSE} else None
    return is_weight(weight) and b.program.weights.resolve(binding(cast(fx.Node, weight)).key) == key


def product(b: Builder, x: ir.Value, weight: Operand) -> ir.Value:
    """x W^T for a weight [n, k] of the dtype of x."""
    return b.call("MatMul", x, transposed(b, weight))


def with_bias(b: Builder, y: ir.Value, bias: Operand | None, dtype: torch.dtype) -> ir.Value:
    return y if bias is None else b.call("Add", y, b.read(bias, dtype))


@translates(aten.linear.default, SPARSE)
def linear(b: Builder, fact: Tensor, x: Operand, weight: Operand, bias: Operand | None = None) -> ir.Value:
    return with_bias(b, product(b, x.value, weight), bias, fact.dtype)


@translates(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(b: Builder, fact: Tensor, x: Operand, y: Operand) -> ir.Value:
    return b.call("MatMul", x.value, y.value)


@translates(aten.addmm.default, aten.baddbmm.default)
def addmm(
    b: Builder, fact: Tensor, shift: Operand, x: Operand, y: Operand, *, beta: float = 1, alpha: float = 1
) -> ir.Value:
    found, more = b.call("MatMul", x.value, y.value), shift.value
    found = found if alpha == 1 else b.call("Mul", found, b.number(alpha, fact.dtype))
    more = more if beta == 1 else b.call("Mul", more, b.number(beta, fact.dtype))
    return b.call("Add", found, more)


def _spread(numbers: Sequence[int], axes: int) -> list[int]:
    return [*numbers] * axes if len(numbers) == 1 else [*numbers]


@translates(aten.conv1d.default, aten.conv2d.default)
def convolution(
    b: Builder, fact: Tensor, x: Operand, weight: Operand, bias: Operand | None = None, stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), groups: int = 1,
) -> ir.Value:  # fmt: skip
    axes = weight.rank - 2
    pads = _spread(padding, axes)
    return _convolve(b, x, weight, bias, stride, [*pads, *pads], dilation, groups)


@translates(aten.conv1d.padding, aten.conv2d.padding)
def convolution_padding(
    b: Builder, fact: Tensor, x: Operand, weight: Operand, bias: Operand | None = None, stride: Sequence[int] = (1,),
    padding: str = "valid", dilation: Sequence[int] = (1,), groups: int = 1,
) -> ir.Value:  # fmt: skip
    """Of "same" the odd one is added at the end."""
    axes = weight.rank - 2
    wide = [d * (weight.width(2 + n) - 1) for n, d in enumerate(_spread(dilation, axes))]
    totals = wide if padding == "same" else [0] * axes
    pads = [*(n // 2 for n in totals), *(n - n // 2 for n in totals)]
    return _convolve(b, x, weight, bias, stride, pads, dilation, groups)


def _convolve(
    b: Builder, x: Operand, weight: Operand, bias: Operand | None, stride: Sequence[int], pads: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> ir.Value:  # fmt: skip
    axes, shift = weight.rank - 2, None if bias is None else bias.value
    single = x.rank == weight.rank - 1
    image = b.call("Unsqueeze", x.value, b.ints(0)) if single else x.value
    found = b.call(
        "Conv", image, weight.value, shift, strides=_spread(stride, axes), pads=list(pads),
        dilations=_spread(dilation, axes), group=groups,
    )  # fmt: skip
    return b.call("Squeeze", found, b.ints(0)) if single else found

"""Pooling over windows of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten


def _numbers(given: Sequence[int], axes: int) -> list[int]:
    return [*given] * axes if len(given) == 1 else [*given]


def _batched(b: Builder, x: Operand, axes: int) -> tuple[ir.Value, bool]:
    """x with a batch, and whether that was added."""
    single = x.rank == axes + 1
    return (b.call("Unsqueeze", x.value, b.ints(0)) if single else x.value), single


def _max_pool(axes: int) -> Any:
    def translate(
        b: Builder, fact: Tensor, x: Operand, kernel: Sequence[int], stride: Sequence[int] = (),
        padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,), ceil_mode: bool = False,
    ) -> ir.Value:  # fmt: skip
        image, single = _batched(b, x, axes)
        pads = _numbers(padding, axes)
        found = b.call(
            "MaxPool", image, kernel_shape=_numbers(kernel, axes), strides=_numbers(stride or kernel, axes),
            pads=[*pads, *pads], dilations=_numbers(dilation, axes), ceil_mode=int(ceil_mode),
        )  # fmt: skip
        return b.call("Squeeze", found, b.ints(0)) if single else found

    return translate


def _avg_pool(axes: int) -> Any:
    def translate(
        b: Builder, fact: Tensor, x: Operand, kernel: Sequence[int], stride: Sequence[int] = (),
        padding: Sequence[int] = (0,), ceil_mode: bool = False, count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> ir.Value:  # fmt: skip
        if divisor is not None or (ceil_mode and count_include_pad and any(padding)):
            raise Unsupported("an average of windows that reach past the padding, or of another divisor, has no form")
        image, single = _batched(b, x, axes)
        pads = _numbers(padding, axes)
        found = b.call(
            "AveragePool", image, kernel_shape=_numbers(kernel, axes), strides=_numbers(stride or kernel, axes),
            pads=[*pads, *pads], ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad),
        )  # fmt: skip
        return b.call("Squeeze", found, b.ints(0)) if single else found

    return translate


for axes in (1, 2, 3):
    translates(getattr(aten, f"max_pool{axes}d").default)(_max_pool(axes))
    translates(getattr(aten, f"avg_pool{axes}d").default)(_avg_pool(axes))


@translates(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool(b: Builder, fact: Tensor, x: Operand, size: Sequence[int]) -> ir.Value:
    """Windows of one size are an average; others are products with a matrix of averages per axis."""
    found = x.value
    for n, count in enumerate(size):
        axis = x.rank - len(size) + n
        if count == 1:
            found = b.call("ReduceMean", found, b.ints(axis), keepdims=1)
        else:
            found = _averaged(b, found, x, axis, count)
    return found


def _averaged(b: Builder, found: ir.Value, x: Operand, axis: int, count: int) -> ir.Value:
    if not isinstance(count, int):
        raise Unsupported("an adaptive average to an open number of windows has no ONNX form")
    size = x.width(axis)
    matrix = torch.zeros(size, count)
    for n in range(count):
        start, end = n * size // count, -(-(n + 1) * size // count)
        matrix[start:end, n] = 1 / (end - start)
    order = [d for d in range(x.rank) if d != axis] + [axis]
    back = [order.index(d) for d in range(x.rank)]
    rows = b.call("MatMul", b.call("Transpose", found, perm=order), b.constant(matrix.numpy()))
    return b.call("Transpose", rows, perm=back)

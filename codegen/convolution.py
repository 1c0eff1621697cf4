"""Convolutions over one or two spatial axes, lowered to the conv2d family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sylvester.codegen.aten_reductions import pair
from sylvester.codegen.conv2d import Conv2d, conv2d
from sylvester.codegen.index import index, product
from sylvester.codegen.lazy import Extern, Lazy, Pointer, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten
Geometry = int | Sequence[int]


@lowers(aten.conv2d.default)
def convolution_2d(
    lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None, stride: Geometry = 1, padding: Geometry = 0,
    dilation: Geometry = 1, groups: int = 1,
) -> Lazy:  # fmt: skip
    shape = [n.constant for n in weight.shape]
    if None in shape:
        raise Unsupported(f"convolution weight of shape {shape} has a size that is not a number")
    out_channels, per_group, *kernel = (int(n or 0) for n in shape)
    conv = Conv2d(per_group * groups, out_channels, pair(kernel), pair(stride), pair(padding), pair(dilation), groups)
    return _call(lowering, fact, conv, x, weight, bias)


@lowers(aten.conv1d.default)
def convolution_1d(
    lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None, stride: Geometry = 1, padding: Geometry = 0,
    dilation: Geometry = 1, groups: int = 1,
) -> Lazy:  # fmt: skip
    """A convolution over images of height 1."""
    flat = Lazy((*x.shape[:2], index(1), x.shape[2]), x.dtype, lambda i: x.load([i[0], i[1], i[3]]))
    filters = Lazy((*weight.shape[:2], index(1), weight.shape[2]), weight.dtype, lambda i: weight.load([i[0], i[1], i[3]]))
    wide = Fact((*fact.shape[:2], index(1), fact.shape[2]), fact.dtype)
    one = [_single(n) for n in (stride, padding, dilation)]
    y: Lazy = convolution_2d(lowering, wide, flat, filters, bias, [1, one[0]], [0, one[1]], [1, one[2]], groups)
    return Lazy(fact.shape, fact.dtype, lambda i: y.load([i[0], i[1], index(0), i[2]]))


def _single(value: Geometry) -> int:
    return value if isinstance(value, int) else int(value[0])


def _call(lowering: Lowering, fact: Fact, conv: Conv2d, x: Lazy, weight: Lazy, bias: Lazy | None) -> Lazy:
    sides = "_".join(str(n) for p in (conv.kernel, conv.stride, conv.padding, conv.dilation) for n in p)
    name = f"sv_conv2d_{conv.channels}_{conv.out_channels}_{conv.groups}_{sides}"
    operands: list[Any] = [lowering.contiguous(o) if o is not None else None for o in (x, weight, bias)]
    y = lowering.buffer("arena", fact.shape, fact.dtype)
    taps = conv.channels // conv.groups * conv.kernel[0] * conv.kernel[1]
    lowering.extern(
        Extern(
            name,
            conv2d(name, conv),
            (
                Pointer(y.name, index(0)), *(None if o is None else Pointer(o.name, index(0)) for o in operands),
                x.shape[0], *x.shape[2:], *fact.shape[2:],
            ),
            writes=(y.name,),
            reads=tuple(o.name for o in operands if o is not None),
            work=product(fact.shape) * taps,
            scratch=(f"{name}_scratch", ()),
        )
    )  # fmt: skip
    return of_buffer(y)

"""Convolutions over one or two spatial axes, lowered to the conv2d family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha1

import torch

from sylvester.codegen.aten_indexing import constant_pad
from sylvester.codegen.conv2d import Conv2d, Finish, conv2d
from sylvester.codegen.epilogue import in_place
from sylvester.codegen.index import index, product
from sylvester.codegen.lazy import Extern, Lazy, Pointer, Store, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.shapes import per_axis
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten
Geometry = int | Sequence[int]


@lowers(aten.conv2d.default)
def convolution_2d(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    weight: Lazy,
    bias: Lazy | None = None,
    stride: Geometry = 1,
    padding: Geometry = 0,
    dilation: Geometry = 1,
    groups: int = 1,
) -> Lazy:
    shape = [n.constant for n in weight.shape]
    if None in shape:
        raise Unsupported(f"convolution weight of shape {shape} has a size that is not a number")
    out_channels, per_group, *kernel = (int(n or 0) for n in shape)
    if len(x.shape) != len(weight.shape):
        raise Unsupported(f"a convolution over {len(x.shape)} axes has no lowering", hint="add a batch axis")
    size, step, edge, spread = (_pair(n) for n in (kernel, stride, padding, dilation))
    conv = Conv2d(per_group * groups, out_channels, size, step, edge, spread, groups)
    return _call(lowering, fact, conv, x, weight, bias)


@lowers(aten.conv1d.default)
def convolution_1d(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    weight: Lazy,
    bias: Lazy | None = None,
    stride: Geometry = 1,
    padding: Geometry = 0,
    dilation: Geometry = 1,
    groups: int = 1,
) -> Lazy:
    """A convolution over images of height 1."""
    flat = Lazy((*x.shape[:2], index(1), x.shape[2]), x.dtype, lambda i: x.load([i[0], i[1], i[3]]))
    filters = Lazy(
        (*weight.shape[:2], index(1), weight.shape[2]), weight.dtype, lambda i: weight.load([i[0], i[1], i[3]])
    )
    wide = Fact((*fact.shape[:2], index(1), fact.shape[2]), fact.dtype)
    (s,), (p,), (d,) = (per_axis(n, 1) for n in (stride, padding, dilation))
    y = convolution_2d(lowering, wide, flat, filters, bias, [1, s], [0, p], [1, d], groups)
    return Lazy(fact.shape, fact.dtype, lambda i: y.load([i[0], i[1], index(0), i[2]]))


@lowers(aten.conv2d.padding, aten.conv1d.padding)
def convolution_named_padding(
    lowering: Lowering,
    fact: Fact,
    x: Lazy,
    weight: Lazy,
    bias: Lazy | None = None,
    stride: Geometry = 1,
    padding: str = "valid",
    dilation: Geometry = 1,
    groups: int = 1,
) -> Lazy:
    """ "same" pads so that a stride of 1 keeps the size; an odd amount has its larger half at the end."""
    spatial = len(weight.shape) - 2
    convolution = convolution_2d if spatial == 2 else convolution_1d
    if padding == "same":
        reach = [int(n.constant or 1) - 1 for n in weight.shape[2:]]
        totals = [n * d for n, d in zip(reach, per_axis(dilation, spatial), strict=True)]
        amounts = [n for total in reversed(totals) for n in (total // 2, total - total // 2)]
        shape = (*x.shape[:2], *(n + total for n, total in zip(x.shape[2:], totals, strict=True)))
        x = constant_pad(lowering, Fact(shape, x.dtype), x, amounts)
    return convolution(lowering, fact, x, weight, bias, stride, 0, dilation, groups)


def _pair(value: Geometry) -> tuple[int, int]:
    height, width = per_axis(value, 2)
    return height, width


def _call(lowering: Lowering, fact: Fact, conv: Conv2d, x: Lazy, weight: Lazy, bias: Lazy | None) -> Lazy:
    sides = "_".join(str(n) for p in (conv.kernel, conv.stride, conv.padding, conv.dilation) for n in p)
    name = f"sv_conv2d_{conv.channels}_{conv.out_channels}_{conv.groups}_{sides}"
    parameters = [lowering.contiguous(o) if o is not None else None for o in (weight, bias)]
    operands = [lowering.kept(x), *parameters]
    y = lowering.buffer("arena", fact.shape, fact.dtype)
    taps = conv.channels // conv.groups * conv.kernel[0] * conv.kernel[1]
    step = Extern(
        name,
        conv2d(name, conv),
        (
            Pointer(y.name, index(0)), *(None if o is None else Pointer(o.name, index(0)) for o in operands),
            x.shape[0], *x.shape[2:], *fact.shape[2:],
        ),
        writes=(y.name,),
        reads=tuple(o.name for o in operands if o is not None),
        work=product(fact.shape) * taps,
        scratch=(f"{name}_scratch", (x.shape[3], fact.shape[2]) if conv.depthwise else ()),
    )  # fmt: skip
    lowering.extern(replace(step, finished=lambda store: _finished(lowering, conv, y.name, store)))
    return of_buffer(y)


def _finished(lowering: Lowering, conv: Conv2d, result: str, store: Store) -> Extern:
    """The call that writes `result`, with the elementwise work of `store` in it."""
    step = next(s for s in lowering.plan.steps if isinstance(s, Extern) and s.writes == (result,))
    value, others = in_place(store, result)
    name = f"{step.function}_{sha1(value.encode()).hexdigest()[:8]}"
    scratch = step.scratch and (f"{name}_scratch", step.scratch[1])
    return replace(
        step,
        function=name,
        source=conv2d(name, conv, Finish(value, len(others))),
        arguments=(
            Pointer(store.buffer, index(0)), *step.arguments[1:], *(Pointer(b, index(0)) for b in others),
        ),
        writes=(store.buffer,),
        reads=(*step.reads, *others),
        scratch=scratch,
        finished=None,
        label="; ".join(label for label in (step.label, store.label) if label),
    )  # fmt: skip

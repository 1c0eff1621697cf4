"""Convolutions on GPUs as sums of generated loops over a padded image, which is not stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sylvester.codegen.aten_indexing import constant_pad
from sylvester.codegen.convolution import Geometry
from sylvester.codegen.elementwise import call
from sylvester.codegen.gpu_lowering import GpuLowering, gpu_lowers
from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Lazy
from sylvester.codegen.lowering import Fact
from sylvester.codegen.scalar import Expr
from sylvester.codegen.shapes import per_axis
from sylvester.compiler.errors import Unsupported

aten = torch.ops.aten


@gpu_lowers(aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
def convolution(
    lowering: GpuLowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None, stride: Geometry = 1,
    padding: Geometry | str = 0, dilation: Geometry = 1, groups: int = 1,
) -> Lazy:  # fmt: skip
    """y[b, o, p] = bias[o] + sum over c, t of x[b, c of the group of o, stride p + dilation t - padding] w[o, c, t]."""
    axes = len(weight.shape) - 2
    sizes = [n.constant for n in weight.shape]
    if len(x.shape) != axes + 2 or None in sizes:
        raise Unsupported(f"cuda has no lowering for a convolution over {len(x.shape)} axes, weight {sizes}")
    out, held, *taps = (int(n or 0) for n in sizes)
    steps, spread = per_axis(stride, axes), per_axis(dilation, axes)
    edges = _edges(padding, taps, spread)
    padded = _padded(lowering, x, edges)
    share = out // groups

    def term(o: Sequence[Index], r: Sequence[Index]) -> Expr:
        channel = o[1] // share * held + r[0]
        places = [p * s + t * d for p, s, t, d in zip(o[2:], steps, r[1:], spread, strict=True)]
        return call("mul", padded.load([o[0], channel, *places]), weight.load([o[1], *r]))

    y = lowering.reduce("sum", fact.shape, weight.shape[1:], fact.dtype, term)
    if bias is None:
        return y
    return Lazy(fact.shape, fact.dtype, lambda i: call("add", y.load(i), bias.load([i[1]])))


def _edges(padding: Geometry | str, taps: Sequence[int], spread: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after every axis; "same" has its larger half at the end."""
    if not isinstance(padding, str):
        return [(n, n) for n in per_axis(padding, len(taps))]
    totals = [(t - 1) * d if padding == "same" else 0 for t, d in zip(taps, spread, strict=True)]
    return [(n // 2, n - n // 2) for n in totals]


def _padded(lowering: GpuLowering, x: Lazy, edges: Sequence[tuple[int, int]]) -> Lazy:
    if not any(map(any, edges)):
        return x
    shape = (*x.shape[:2], *(n + before + after for n, (before, after) in zip(x.shape[2:], edges, strict=True)))
    amounts = [n for edge in reversed(edges) for n in edge]
    padded: Lazy = constant_pad(lowering, Fact(shape, x.dtype), x, amounts)
    return padded

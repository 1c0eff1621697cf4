"""Sums, means, extremes and norms along axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.graph import CONTRIB

aten = torch.ops.aten
RMS_OPSET = 23
Axes = Sequence[int] | int | None


def reduced(b: Builder, op: str, x: ir.Value, axes: Axes, keep: bool) -> ir.Value:
    """Over all axes when there are none."""
    listed = () if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
    return b.call(op, x, b.ints(*listed) if listed else None, keepdims=int(keep))


def _reduction(op: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, fact: Tensor, x: Operand, dim: Axes = None, keepdim: bool = False, **_: Any) -> ir.Value:
        return reduced(b, op, b.read(x, fact.dtype), dim, keepdim)

    return translate


for op, targets in {
    "ReduceSum": (aten.sum.default, aten.sum.dim_IntList),
    "ReduceMean": (aten.mean.default, aten.mean.dim),
    "ReduceProd": (aten.prod.default, aten.prod.dim_int),
    "ReduceMax": (aten.amax.default, aten.max.default),
    "ReduceMin": (aten.amin.default, aten.min.default),
}.items():
    translates(*targets)(_reduction(op))


@translates(aten.any.default, aten.any.dim, aten.any.dims)
def any_(b: Builder, fact: Tensor, x: Operand, dim: Axes = None, keepdim: bool = False) -> ir.Value:
    whole = b.cast(b.read(x, torch.bool), torch.bool, torch.int32)
    return b.cast(reduced(b, "ReduceMax", whole, dim, keepdim), torch.int32, torch.bool)


@translates(aten.all.default, aten.all.dim, aten.all.dims)
def all_(b: Builder, fact: Tensor, x: Operand, dim: Axes = None, keepdim: bool = False) -> ir.Value:
    whole = b.cast(b.read(x, torch.bool), torch.bool, torch.int32)
    return b.cast(reduced(b, "ReduceMin", whole, dim, keepdim), torch.int32, torch.bool)


def _place(op: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, fact: Tensor, x: Operand, dim: int | None = None, keepdim: bool = False) -> ir.Value:
        if dim is None:
            return b.call(op, b.reshape(x.value, [-1]), axis=0, keepdims=0)
        return b.call(op, x.value, axis=dim, keepdims=int(keepdim))

    return translate


translates(aten.argmax.default)(_place("ArgMax"))
translates(aten.argmin.default)(_place("ArgMin"))


def _extreme(value_op: str, place_op: str) -> Callable[..., Sequence[ir.Value]]:
    def translate(b: Builder, facts: Any, x: Operand, dim: int, keepdim: bool = False) -> Sequence[ir.Value]:
        return [reduced(b, value_op, x.value, dim, keepdim), _place(place_op)(b, facts[1], x, dim, keepdim)]

    return translate


translates(aten.max.dim)(_extreme("ReduceMax", "ArgMax"))
translates(aten.min.dim)(_extreme("ReduceMin", "ArgMin"))


@translates(aten.cumsum.default)
def cumsum(b: Builder, fact: Tensor, x: Operand, dim: int, **_: Any) -> ir.Value:
    return b.call("CumSum", b.read(x, fact.dtype), b.number(dim, torch.int64))


@translates(aten.logsumexp.default)
def logsumexp(b: Builder, fact: Tensor, x: Operand, dim: Axes, keepdim: bool = False) -> ir.Value:
    return reduced(b, "ReduceLogSumExp", x.value, dim, keepdim)


@translates(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim)
def vector_norm(
    b: Builder, fact: Tensor, x: Operand, order: float = 2, dim: Axes = None, keepdim: bool = False, **_: Any
) -> ir.Value:
    if order in (1, 2):
        return reduced(b, f"ReduceL{int(order)}", x.value, dim, keepdim)
    powers = b.call("Pow", b.call("Abs", x.value), b.number(order, fact.dtype))
    return b.call("Pow", reduced(b, "ReduceSum", powers, dim, keepdim), b.number(1 / order, fact.dtype))


@translates(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def count_nonzero(b: Builder, fact: Tensor, x: Operand, dim: Axes = None) -> ir.Value:
    return reduced(b, "ReduceSum", b.cast(b.read(x, torch.bool), torch.bool, torch.int64), dim, False)


def variance(b: Builder, x: Operand, dim: Axes, correction: float, keep: bool) -> tuple[ir.Value, ir.Value]:
    """The variance, and the mean [..., 1]."""
    axes = tuple(range(x.rank)) if dim is None or dim == [] else (dim,) if isinstance(dim, int) else tuple(dim)
    mean = reduced(b, "ReduceMean", x.value, axes, True)
    away = b.call("Sub", x.value, mean)
    total = reduced(b, "ReduceSum", b.call("Mul", away, away), axes, keep)
    count: Any = math.prod(x.shape[d] for d in axes)
    divisor = b.read(count - correction if isinstance(count, int) else count, x.dtype)
    if not isinstance(count, int) and correction:
        divisor = b.call("Sub", divisor, b.number(correction, x.dtype))
    return b.call("Div", total, divisor), mean


def _spread(root: bool) -> Callable[..., ir.Value]:
    def translate(
        b: Builder, fact: Tensor, x: Operand, dim: Axes = None, *, correction: Any = None, keepdim: bool = False
    ) -> ir.Value:
        found, _ = variance(b, x, dim, 1 if correction is None else correction, keepdim)
        return b.call("Sqrt", found) if root else found

    return translate


def _spread_dim(root: bool) -> Callable[..., ir.Value]:
    def translate(
        b: Builder, fact: Tensor, x: Operand, dim: Axes = None, unbiased: bool = True, keepdim: bool = False
    ) -> ir.Value:
        return _spread(root)(b, fact, x, dim, correction=int(unbiased), keepdim=keepdim)

    return translate


def _spread_all(root: bool) -> Callable[..., ir.Value]:
    return lambda b, fact, x, unbiased=True: _spread(root)(b, fact, x, correction=int(unbiased))


for packet, root in ((aten.var, False), (aten.std, True)):
    translates(packet.correction)(_spread(root))
    translates(packet.dim)(_spread_dim(root))
    translates(packet.default)(_spread_all(root))


@translates(aten.var_mean.correction)
def var_mean(
    b: Builder, facts: Any, x: Operand, dim: Axes = None, *, correction: Any = None, keepdim: bool = False
) -> Sequence[ir.Value]:
    found, mean = variance(b, x, dim, 1 if correction is None else correction, keepdim)
    return [found, mean if keepdim else b.reshape(mean, facts[1].shape)]


def rms_of(b: Builder, x: ir.Value, scale: ir.Value | None, eps: float, width: int, dtype: torch.dtype) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    scale = b.constant(np.ones(width, np.float32)) if scale is None else scale
    if b.opset >= RMS_OPSET:
        return b.call("RMSNormalization", x, scale, epsilon=eps, axis=-1)
    mean = reduced(b, "ReduceMean", b.call("Mul", x, x), -1, True)
    root = b.call("Sqrt", b.call("Add", mean, b.number(eps, dtype)))
    return b.call("Mul", b.call("Div", x, root), scale)


@translates(torch.ops.sylvester.rms_norm.default)
def rms_norm(b: Builder, fact: Tensor, x: Operand, weight: Operand | None, eps: float) -> ir.Value:
    scale = None if weight is None else weight.value
    if b.contrib and scale is not None and (found := after_sum(b, x, scale, eps)) is not None:
        return found
    return rms_of(b, x.value, scale, eps, x.width(), fact.dtype)


def after_sum(b: Builder, x: Operand, scale: ir.Value, eps: float) -> ir.Value | None:
    """The norm of a sum that nothing has read before, which comes along with it; None where there is none."""
    if x.node not in b.later or x.node in b.values or not 2 <= x.rank <= 3:
        return None
    first, second = (b.operand(n) for n in x.node.args[:2] if isinstance(n, fx.Node))
    found, _, _, total = b.calls(
        "SkipSimplifiedLayerNormalization", first.value, second.value, scale, count=4, domain=CONTRIB, unread=(1, 2),
        epsilon=eps,
    )  # fmt: skip
    b.values[x.node] = total
    return found


@translates(aten.rms_norm.default)
def aten_rms_norm(
    b: Builder, fact: Tensor, x: Operand, shape: Sequence[int], weight: Operand | None = None, eps: Any = None
) -> ir.Value:
    smallest = torch.finfo(fact.dtype).eps if eps is None else eps
    return rms_of(b, x.value, None if weight is None else weight.value, smallest, x.width(), fact.dtype)


@translates(aten.layer_norm.default)
def layer_norm(
    b: Builder, fact: Tensor, x: Operand, shape: Sequence[int], weight: Operand | None = None,
    bias: Operand | None = None, eps: float = 1e-5, *_: Any,
) -> ir.Value:  # fmt: skip
    ones = None if weight is not None else b.call("Expand", b.number(1.0, fact.dtype), b.shape(x.shape[-len(shape) :]))
    scale = ones if weight is None else weight.value
    shift = None if bias is None else bias.value
    return b.call("LayerNormalization", x.value, scale, shift, axis=-len(shape), epsilon=eps)


@translates(aten.batch_norm.default)
def batch_norm(
    b: Builder, fact: Tensor, x: Operand, weight: Operand | None, bias: Operand | None, mean: Operand, var: Operand,
    training: bool, momentum: float, eps: float, *_: Any,
) -> ir.Value:  # fmt: skip
    width = mean.width(0)
    scale = b.constant(np.ones(width, np.float32)) if weight is None else weight.value
    shift = b.constant(np.zeros(width, np.float32)) if bias is None else bias.value
    return b.call("BatchNormalization", x.value, scale, shift, mean.value, var.value, epsilon=eps)


@translates(aten.group_norm.default)
def group_norm(
    b: Builder, fact: Tensor, x: Operand, groups: int, weight: Operand | None = None, bias: Operand | None = None,
    eps: float = 1e-5, *_: Any,
) -> ir.Value:  # fmt: skip
    """Rows of [batch, groups, channels of a group and positions] of mean 0 and variance 1, then a line per channel."""
    channels = x.shape[1]
    rows = b.call("Reshape", x.value, b.ints(0, groups, -1))
    ones, zeros = (b.constant(np.full(groups, n, np.float32)) for n in (1, 0))
    found = b.reshape(b.call("InstanceNormalization", rows, ones, zeros, epsilon=eps), fact.shape)
    line = [channels, *([1] * (x.rank - 2))]
    found = found if weight is None else b.call("Mul", found, b.reshape(weight.value, line))
    return found if bias is None else b.call("Add", found, b.reshape(bias.value, line))

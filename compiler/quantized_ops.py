"""Dialect ops in low-bit arithmetic: linear layers with short floats and whole numbers, their widening, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.attention_operands import require_alone, with_blocks, with_shared
from sylvester.compiler.ops import (
    Cost,
    Ints,
    Stored,
    attention,
    attention_cost,
    attention_weights,
    op,
    repeated_heads,
)
from sylvester.compiler.packing import unpacked3, unpacked4
from sylvester.compiler.quantized_rows import FLOAT8, float8_rows, quantize_rows

GROUPS = (32, 64, 128)
"""Sizes of the groups along the depth that share a scale."""
ROWS_AT_ONCE, VALUES_AT_ONCE = 4096, 1 << 18
"""The most that a reference widens of a weight at a time, which bounds its memory."""
BF16, FP16, INT8, PACKED = torch.bfloat16, torch.float16, torch.int8, torch.uint8
Widen = Callable[[Tensor, Tensor], Tensor]


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _linear_cost(x: Tensor, weight: Tensor, *others: Any, **named: Any) -> Cost:
    rows, written = x.numel() // x.shape[-1], x.numel() // x.shape[-1] * weight.shape[0] * x.element_size()
    stored = [t for t in (*others, *named.values()) if isinstance(t, Tensor)]
    return Cost(2 * rows * weight.shape[0] * x.shape[-1], _nbytes(x, weight, *stored) + written)


def _linear_fact(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _widening_cost(weight: Tensor, *scales: Tensor) -> Cost:
    return _cost_of_widening(weight, scales, weight.numel() * (2 if weight.dtype == PACKED else 1))


def _widening_cost_w3(weight: Tensor, *scales: Tensor) -> Cost:
    return _cost_of_widening(weight, scales, weight.numel() * 8 // 3)


def _cost_of_widening(weight: Tensor, scales: tuple[Tensor, ...], values: int) -> Cost:
    return Cost(values if scales else 0, _nbytes(weight, *scales) + 4 * values)


def group_size(k: int, groups: int) -> int:
    """Columns that share a scale along a depth of k; the last group may be shorter. One group: all k columns."""
    found = k if groups == 1 else next((g for g in GROUPS if -(-k // g) == groups), 0)
    if not found:
        raise ValueError(f"{groups} groups along a depth of {k}, expected one, or groups of {GROUPS}")
    return found


def grouped(values: Tensor, scales: Tensor) -> Tensor:
    """Values [n, k] times scales [n, groups], each along `group_size` neighbours; one group is a scale per channel."""
    k, groups = values.shape[1], scales.shape[1]
    spread = scales.repeat_interleave(group_size(k, groups), 1)[:, :k] if groups > 1 else scales
    return values.to(scales.dtype) * spread


def row_slices(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time of tensors with as many rows."""
    rows = max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE // max(1, weight.shape[1])))
    return zip(*(t.split(rows) for t in (weight, *others)), strict=True)


def by_slices(x: Tensor, widen: Callable[..., Tensor], *stored: Tensor) -> Tensor:
    """x W^T with some rows of W widened at a time; nothing made on the way outlives its slice."""
    y = x.new_empty((*x.shape[:-1], stored[0].shape[0]))
    start = 0
    for parts in row_slices(*stored):
        y[..., start : start + len(parts[0])] = F.linear(x, widen(*parts))
        start += len(parts[0])
    return y


def _quantised_linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, bits: int, step: Tensor | None, widen: Widen
) -> Tensor:
    return _scaled_product(x, quantize_rows(x, bits, step), weight, scales, bias, widen)


def _scaled_product(
    x: Tensor, rows: tuple[Tensor, Tensor], weight: Tensor, scales: Tensor, bias: Tensor | None, widen: Widen
) -> Tensor:
    """Of rounded rows; products are exact: float64 holds every sum for depths far above 16384."""
    numbers, scale = rows
    y = by_slices(numbers.double(), widen, weight, scales.double()) * scale.double()
    return (y if bias is None else y + bias).to(x.dtype)


def _short_product(x: Tensor, weight: Tensor, bias: Tensor | None, short: torch.dtype) -> Tensor:
    """Rows rounded to `short`, sums in float32, or in float64 for such an x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = by_slices(x.to(short).to(wide), lambda w: w.to(wide), weight)
    return (y if bias is None else y + bias).to(x.dtype)


def _widen_w8(weight: Tensor, scales: Tensor) -> Tensor:
    return grouped(weight, scales)


def _widen_w4(weight: Tensor, scales: Tensor) -> Tensor:
    return grouped(unpacked4(weight), scales)


def _widen_w3(weight: Tensor, scales: Tensor) -> Tensor:
    return grouped(unpacked3(weight), scales)


@op(
    cost=_linear_cost,
    fact=_linear_fact,
    examples=(
        ((2, 3, 64), Stored((37, 64), BF16), Stored((37,))),
        ((5, 33), Stored((16, 33), BF16), None),
    ),
)
def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with x and weight [n, k] rounded to bfloat16, summed in float32, or in float64 for such an x."""
    return _short_product(x, weight, bias, BF16)


@op(
    cost=_linear_cost,
    fact=_linear_fact,
    examples=(
        ((2, 3, 64), Stored((37, 64), FP16), Stored((37,))),
        ((5, 33), Stored((16, 33), FP16), None),
    ),
)
def linear_fp16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_bf16` in float16: values of x beyond 65504 become infinite."""
    return _short_product(x, weight, bias, FP16)


@op(
    cost=_linear_cost,
    fact=_linear_fact,
    examples=(
        ((2, 3, 40), Stored((37, 40), FLOAT8), Stored((37, 1)), Stored((37,))),
        ((5, 33), Stored((16, 33), FLOAT8), Stored((16, 1)), None),
    ),
)
def linear_fp8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with float8 weight [n, k] (e4m3) and scales [n, 1]; rows of x are rounded as `float8_rows` says."""
    return _scaled_product(x, float8_rows(x), weight, scales, bias, _widen_w8)


@op(
    cost=_linear_cost,
    fact=_linear_fact,
    examples=(
        ((2, 3, 40), Stored((37, 40), INT8), Stored((37, 1)), Stored((37,))),
        ((3, 64), Stored((33, 64), INT8), Stored((33, 2)), None, 16),
        ((1, 384), Stored((48, 384), INT8), Stored((48, 3)), Stored((48,)), 4),
        ((7, 104), Stored((35, 104), INT8), Stored((35, 4)), None, 8, Stored((1,))),
    ),
)
def linear_w8(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, bits: int = 8, step: Tensor | None = None
) -> Tensor:
    """x W^T + bias with int8 weight [n, k] and scales [n, groups]; rows of x are rounded as `quantize_rows` says."""
    return _quantised_linear(x, weight, scales, bias, bits, step, _widen_w8)


@op(
    cost=_linear_cost,
    fact=_linear_fact,
    examples=(
        ((2, 3, 64), Stored((37, 32), PACKED), Stored((37, 2)), Stored((37,))),
        ((3, 192), Stored((33, 96), PACKED), Stored((33, 3)), None, 16),
        ((1, 384), Stored((48, 192), PACKED), Stored((48, 3)), Stored((48,)), 4, Stored((1,))),
        ((7, 104), Stored((35, 52), PACKED), Stored((35, 2)), None),
    ),
)
def linear_w4(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, bits: int = 8, step: Tensor | None = None
) -> Tensor:
    """`linear_w8` with int4 weight [n, k / 2], packed as `unpacked4` reads it."""
    return _quantised_linear(x, weight, scales, bias, bits, step, _widen_w4)


@op(
    cost=_linear_cost,
    fact=_linear_fact,
    examples=(
        ((2, 3, 64), Stored((37, 24), PACKED), Stored((37, 2)), Stored((37,))),
        ((3, 192), Stored((33, 72), PACKED), Stored((33, 3)), None, 16),
        ((1, 384), Stored((48, 144), PACKED), Stored((48, 3)), Stored((48,)), 4),
        ((7, 104), Stored((35, 39), PACKED), Stored((35, 1)), None, 8, Stored((1,))),
    ),
)
def linear_w3(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, bits: int = 8, step: Tensor | None = None
) -> Tensor:
    """`linear_w8` with int3 weight [n, 3 k / 8], packed as `unpacked3` reads it."""
    return _quantised_linear(x, weight, scales, bias, bits, step, _widen_w3)


@op(
    cost=_widening_cost,
    examples=((Stored((37, 40), INT8), Stored((37, 1))), (Stored((33, 192), INT8), Stored((33, 3)))),
)
def dequantize_w8(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 [n, k] times scales [n, groups]: the float weight [n, k]."""
    return _widen_w8(weight, scales)


@op(
    cost=_widening_cost,
    examples=((Stored((37, 32), PACKED), Stored((37, 2))), (Stored((33, 96), PACKED), Stored((33, 3)))),
)
def dequantize_w4(weight: Tensor, scales: Tensor) -> Tensor:
    """Packed int4 [n, k / 2] times scales [n, groups]: the float weight [n, k]."""
    return _widen_w4(weight, scales)


@op(
    cost=_widening_cost_w3,
    examples=((Stored((37, 24), PACKED), Stored((37, 2))), (Stored((33, 72), PACKED), Stored((33, 3)))),
)
def dequantize_w3(weight: Tensor, scales: Tensor) -> Tensor:
    """Packed int3 [n, 3 k / 8] times scales [n, groups]: the float weight [n, k]."""
    return _widen_w3(weight, scales)


@op(
    cost=_widening_cost,
    examples=((Stored((37, 40), FLOAT8), Stored((37, 1))), (Stored((5, 33), FLOAT8), Stored((5, 1)))),
)
def dequantize_fp8(weight: Tensor, scales: Tensor) -> Tensor:
    """float8 [n, k] times scales [n, 1]: the float weight [n, k]."""
    return _widen_w8(weight, scales)


@op(cost=_widening_cost, examples=((Stored((37, 40), FP16),), (Stored((5, 33), FP16),)))
def widen_fp16(weight: Tensor) -> Tensor:
    """float16 -> float32, exactly."""
    return weight.float()


@op(cost=_widening_cost, examples=((Stored((37, 40), BF16),), (Stored((5, 33), BF16),)))
def widen_bf16(weight: Tensor) -> Tensor:
    """bfloat16 -> float32, exactly."""
    return weight.float()


@op(
    cost=attention_cost,
    examples=(
        ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8), None, None, 0.35, True, 0),
        ((2, 4, 15, 7), (2, 4, 7, 7), (2, 4, 7, 6), (2, 1, 15, 7), None, 0.5, False, 0),
        ((2, 4, 3, 8), (2, 2, 16, 8), (2, 2, 16, 8), None, Ints((), 13), 0.35, True, 0),
        ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8), None, None, 0.35, True, 0, 1.5),
    ),
)
def attention_bf16(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    *,
    depths: Tensor | None = None,
    shared: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """`attention` with q, k, v and the softmax rounded to bfloat16 where they are multiplied; all sums are float32.

    A backend may round q times a constant instead of q, round the softmax before its division, or not round at all:
    each of these is as close to the exact result.
    """
    require_alone(past, shared, blocks)
    mask = with_blocks(mask, blocks, q.shape[2], k.shape[2])
    rounded = [t.to(BF16).to(q.dtype) for t in (q, with_shared(k, shared), with_shared(v, shared))]
    q, k, v = rounded[0], *(repeated_heads(t, q) for t in rounded[1:])
    weights = attention_weights(q, k, mask, past, scale, causal, window, softcap, depths)
    return weights.to(BF16).to(q.dtype) @ v


def _centred(x: Tensor, past: Tensor | None, queries: int) -> tuple[Tensor, Tensor]:
    """x [batch, heads, keys, d] less its mean over the keys that may be read, and that mean."""
    if past is None:
        mean = x.mean(2, keepdim=True)
        return x - mean, mean
    held = (torch.arange(x.shape[2], device=x.device) < past + queries)[:, None]
    mean = x.masked_fill(~held, 0.0).sum(2, keepdim=True) / held.sum()
    return (x - mean).masked_fill(~held, 0.0), mean


def _stepped(x: Tensor, axis: int, most: int = 127) -> Tensor:
    """x rounded to `most` equal steps from 0 to its largest size along the axis."""
    top = x.abs().amax(axis, keepdim=True)
    step = torch.where(top > 0, top, 1.0) / most
    return (x / step).round() * step


@op(
    cost=attention_cost,
    examples=(
        ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8), None, None, 0.35, True, 0),
        ((2, 4, 15, 7), (2, 4, 7, 7), (2, 4, 7, 6), (2, 1, 15, 7), None, 0.5, False, 0),
        ((2, 4, 3, 8), (2, 2, 16, 8), (2, 2, 16, 8), None, Ints((), 13), 0.35, True, 0),
        ((2, 4, 12, 8), (2, 2, 12, 8), (2, 2, 12, 8), None, None, 0.35, True, 4, 1.5),
    ),
)
def attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    *,
    depths: Tensor | None = None,
    shared: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """`attention` with products of whole numbers, after SageAttention2 (Zhang et al., 2024).

    Queries, and keys less their mean over the keys of the call, are int8 with a scale a row; values less their mean are
    int8 with a scale a channel; the softmax is in 255 steps below its greatest weight. What the means take from scores,
    before any soft-cap, and from the result is added back in float: without rounding this is `attention`.

    A backend may take means, scales of channels and greatest weights over any part of the keys, use 127 steps, or 63
    for keys, round q times a constant instead of q, or not round at all: each of these is about as close to the exact
    result. Means and scales are also of keys that a query does not see: these move its result, by no more than rounding
    does.
    """
    require_alone(past, shared, blocks)
    mask = with_blocks(mask, blocks, q.shape[2], k.shape[2])
    wide = (repeated_heads(with_shared(t, shared).to(q.dtype), q) for t in (k, v))
    (k, low), (v, mean) = (_centred(t, past, q.shape[2]) for t in wide)
    shift = q @ low.transpose(-2, -1)
    with_shift = torch.cat([_stepped(q, -1), shift], -1), torch.cat([_stepped(k, -1), torch.ones_like(k[..., :1])], -1)
    weights = attention_weights(*with_shift, mask, past, scale, causal, window, softcap, depths)
    return _stepped(weights, -1, 255) @ _stepped(v, 2) + weights.sum(-1, keepdim=True) * mean


QUANTISED = frozenset({linear_w8.target, linear_w4.target, linear_w3.target, linear_fp8.target})
"""Those with weights of at most 8 bits, which round the rows of x by scales."""
WIDENINGS = frozenset(
    op.target for op in (widen_bf16, widen_fp16, dequantize_fp8, dequantize_w8, dequantize_w4, dequantize_w3)
)
"""From a rounded weight to the float one."""
LINEARS = frozenset({torch.ops.aten.linear.default, linear_bf16.target, linear_fp16.target, *QUANTISED})
"""Every op that computes x W^T + bias with x and W as its first two arguments."""
ATTENTIONS = frozenset({attention.target, attention_bf16.target, attention_int8.target})
"""Attentions by the arithmetic of their products; their arguments are the same."""

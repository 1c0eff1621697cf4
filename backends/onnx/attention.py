"""Attention and caches in standard ops: Attention of opset 23, over caches that are filled in part of opset 24."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.attention_call import Call, end_of
from sylvester.backends.onnx.builder import Builder, Operand, equal, translates
from sylvester.backends.onnx.grouped_query import grouped_query
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.quantized_ops import ATTENTIONS

aten = torch.ops.aten
ATTENTION_OPSET, FILLED_OPSET = 23, 24


@translates(*ATTENTIONS)
def attention(
    b: Builder, fact: Tensor, q: Operand, k: Operand, v: Operand, mask: Operand | None, past: Operand | None,
    scale: float, causal: bool, window: int, softcap: float = 0.0, *, depths: Operand | None = None,
    shared: Operand | None = None, blocks: Operand | None = None,
) -> ir.Value:  # fmt: skip
    """Products in few bits may be exact as well: they are float here."""
    for name, operand in (("a tree of tokens", depths), ("shared keys", shared), ("listed blocks", blocks)):
        if operand is not None:
            raise Unsupported(f"attention over {name} has no ONNX form", hint="compile without drafts that need it")
    call = Call(q, k, v, mask, past, scale, causal, window, softcap)
    found = grouped_query(b, call) if b.contrib else None
    return attend(b, call) if found is None else found


@translates(aten.scaled_dot_product_attention.default)
def sdpa(
    b: Builder, fact: Tensor, q: Operand, k: Operand, v: Operand, mask: Operand | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> ir.Value:  # fmt: skip
    if q.rank != 4:
        hint = "give [batch, heads, tokens, features]"
        raise Unsupported(f"attention over {q.rank} axes has no ONNX form", hint=hint)
    factor = 1 / math.sqrt(q.width()) if scale is None else scale
    return attend(b, Call(q, k, v, mask, None, factor, causal, 0, 0.0))


def attend(b: Builder, call: Call) -> ir.Value:
    """softmax(q k^T * scale + mask) v [batch, heads, queries, features]."""
    if b.opset >= FILLED_OPSET and call.past is not None:
        return _over_filled(b, call)
    keys, values = (_held(b, call, x) for x in (call.k, call.v))
    if b.opset < ATTENTION_OPSET:
        return _written_out(b, call, keys, values)
    needs_mask = bool(call.window) or (call.causal and call.past is not None)
    mask = _mask(b, call, seen=_visible(b, call, call.causal) if needs_mask else None)
    causal = int(call.causal and not needs_mask)
    return b.call(
        "Attention", call.q.value, keys, values, mask, scale=call.scale, is_causal=causal or None,
        softcap=call.softcap or None,
    )  # fmt: skip


def _over_filled(b: Builder, call: Call) -> ir.Value:
    """Over whole caches, of which the keys past the last query are not read."""
    keys, values = (b.read(x, call.dtype) for x in (call.k, call.v))
    mask = _mask(b, call, seen=_visible(b, call, causal=False) if call.window else None)
    length = b.call("Expand", b.call("Unsqueeze", end_of(b, call), b.ints(0)), b.size(call.q.shape[0]))
    return b.call(
        "Attention", call.q.value, keys, values, mask, None, None, length, scale=call.scale,
        is_causal=int(call.causal) or None, softcap=call.softcap or None,
    )  # fmt: skip


def _held(b: Builder, call: Call, x: Operand) -> ir.Value:
    """Keys or values that hold something, as floats."""
    if call.past is None:
        return b.read(x, call.dtype)
    end = b.call("Unsqueeze", end_of(b, call), b.ints(0))
    return b.cast(b.call("Slice", x.value, b.ints(0), end, b.ints(2)), x.dtype, call.dtype)


def _keys(b: Builder, call: Call) -> ir.Value:
    """The number of keys that scores are made for, without axes."""
    if call.past is not None and b.opset < FILLED_OPSET:
        return end_of(b, call)
    return b.read(call.k.shape[2], torch.int64)


def _visible(b: Builder, call: Call, causal: bool) -> ir.Value:
    """Bool [queries, keys] of `causal` and the window."""
    zero, one = b.number(0, torch.int64), b.number(1, torch.int64)
    rows = b.call("Range", zero, b.read(call.q.shape[2], torch.int64), one)
    rows = rows if call.past is None else b.call("Add", rows, b.read(call.past, torch.int64))
    rows, columns = b.call("Unsqueeze", rows, b.ints(1)), b.call("Range", zero, _keys(b, call), one)
    seen = b.call("LessOrEqual", columns, rows) if causal else None
    if call.window:
        near = b.call("Greater", columns, b.call("Sub", rows, b.number(call.window, torch.int64)))
        seen = near if seen is None else b.call("And", seen, near)
    assert seen is not None
    return seen


def _mask(b: Builder, call: Call, seen: ir.Value | None) -> ir.Value | None:
    """The mask of the call with what `seen` hides."""
    if call.mask is None:
        return seen
    mask = call.mask.value
    if call.past is not None and b.opset < FILLED_OPSET:
        mask = b.call("Slice", mask, b.ints(0), b.call("Unsqueeze", end_of(b, call), b.ints(0)), b.ints(-1))
    if not (equal(call.mask.shape[-2], call.q.shape[2]) and equal(call.mask.shape[-1], call.k.shape[2])):
        sizes = [b.ints(1)] * (call.mask.rank - 2) + [
            b.size(call.q.shape[2]),
            b.call("Unsqueeze", _keys(b, call), b.ints(0)),
        ]
        mask = b.call("Expand", mask, b.call("Concat", *sizes, axis=0))
    if seen is None:
        return mask
    if call.mask.dtype == torch.bool:
        return b.call("And", mask, seen)
    return b.call("Where", seen, mask, b.number(-math.inf, call.mask.dtype))


def _written_out(b: Builder, call: Call, keys: ir.Value, values: ir.Value) -> ir.Value:
    """With MatMul and Softmax. Query heads that share keys are rows of one product [batch, kv heads, group, ...]."""
    q = call.q
    heads, kept = q.width(1), call.k.width(1)
    group = heads // kept
    query = q.value
    if group > 1:
        query = b.reshape(query, [q.shape[0], kept, group, q.shape[2], q.shape[3]])
        keys, values = (b.call("Unsqueeze", x, b.ints(2)) for x in (keys, values))
    order = [*range(3 if group > 1 else 2), *((4, 3) if group > 1 else (3, 2))]
    scores = b.call("MatMul", query, b.call("Transpose", keys, perm=order))
    scores = b.call("Mul", scores, b.number(call.scale, call.dtype))
    if call.softcap:
        cap = b.number(call.softcap, call.dtype)
        scores = b.call("Mul", b.call("Tanh", b.call("Div", scores, cap)), cap)
    hidden = call.causal or bool(call.window)
    mask = _mask(b, call, seen=_visible(b, call, call.causal) if hidden else None)
    weights = b.call("Softmax", _masked(b, call, scores, mask, group), axis=-1)
    if call.mask is not None:
        weights = b.call("Where", b.call("IsNaN", weights), b.number(0, call.dtype), weights)
    found = b.call("MatMul", weights, values)
    return b.reshape(found, [q.shape[0], heads, q.shape[2], call.v.shape[3]]) if group > 1 else found


def _masked(b: Builder, call: Call, scores: ir.Value, mask: ir.Value | None, group: int) -> ir.Value:
    if mask is None:
        return scores
    if group > 1 and call.mask is not None and call.mask.rank > 2:
        own = call.mask.shape[1] if call.mask.rank == 4 else call.mask.shape[0]
        by_head = [1, 1] if own == 1 else [call.k.width(1), group]
        lead = [] if call.mask.rank == 3 else [call.mask.shape[0]]
        parts = [
            *(b.size(n) for n in [*lead, *by_head, call.q.shape[2]]),
            b.call("Unsqueeze", _keys(b, call), b.ints(0)),
        ]
        mask = b.call("Reshape", mask, b.call("Concat", *parts, axis=0))
    additive = call.mask is not None and call.mask.dtype != torch.bool
    if additive:
        return b.call("Add", scores, mask)
    return b.call("Where", mask, scores, b.number(-math.inf, call.dtype))


@translates(torch.ops.sylvester.kv_update.default)
def kv_update(b: Builder, fact: Tensor, cache: Operand, new: Operand, past: Operand) -> ir.Value:
    """Rows written into the cache, in place where a caller binds the output to the input."""
    rows, place = b.read(new, cache.dtype), b.read(past, torch.int64)
    if b.opset >= FILLED_OPSET:
        places = b.call("Expand", b.call("Unsqueeze", place, b.ints(0)), b.size(new.shape[0]))
        return b.call("TensorScatter", cache.value, rows, places, axis=2)
    return b.call("ScatterND", cache.value, _indices(b, new, place), rows)


def _indices(b: Builder, new: Operand, place: ir.Value) -> ir.Value:
    """int64 [batch, heads, tokens, 3]: where each row of new [batch, heads, tokens, d] goes."""
    columns = []
    sizes = b.shape(new.shape[:3])
    for axis in range(3):
        zero, one = b.number(0, torch.int64), b.number(1, torch.int64)
        counted = b.call("Range", zero, b.read(new.shape[axis], torch.int64), one)
        counted = b.call("Add", counted, place) if axis == 2 else counted
        spread = b.call("Reshape", counted, b.constant([-1 if d == axis else 1 for d in range(3)], np.int64))
        columns.append(b.call("Unsqueeze", b.call("Expand", spread, sizes), b.ints(-1)))
    return b.call("Concat", *columns, axis=-1)

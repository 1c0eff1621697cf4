"""GroupQueryAttention of onnxruntime: causal attention that turns queries and keys and writes the caches in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.attention_call import Call
from sylvester.backends.onnx.builder import Builder, Operand, equal
from sylvester.backends.onnx.graph import CONTRIB, TYPES
from sylvester.backends.onnx.packed_layers import packed
from sylvester.backends.onnx.rotary_tables import Tables, tables
from sylvester.compiler.cache_ops import UPDATES

aten, dialect = torch.ops.aten, torch.ops.sylvester
ROPE = dialect.rope.default
TOKENS_FIRST = [0, 2, 1, 3]


@dataclass(frozen=True)
class Caches:
    """What writes the keys and values of an attention into its caches."""

    keys: fx.Node
    values: fx.Node

    def before(self, b: Builder) -> list[ir.Value]:
        return [b.value_of(cast(fx.Node, node.args[0])) for node in (self.keys, self.values)]

    def fresh(self, b: Builder) -> list[Operand]:
        return [b.operand(cast(fx.Node, node.args[1])) for node in (self.keys, self.values)]


def grouped_query(b: Builder, call: Call) -> ir.Value | None:
    """[batch, heads, queries, features], or None where the op does not compute this attention."""
    caches = _caches(call)
    if caches is None or not call.causal or call.mask is not None or call.dtype != torch.float32:
        return None
    k, v = caches.fresh(b)
    widths = {t.shape[-1] for t in (call.q, k, v)}
    slots = [b.operand(cast(fx.Node, node.args[0])) for node in (caches.keys, caches.values)]
    if len(widths) > 1 or any(t.dtype != torch.float32 for t in slots):
        return None
    turned = tables(b, call.q.node, k.node)
    q, k = ((_unturned(b, t) if turned else t) for t in (call.q, k))
    whole = packed(b, [_layer(t) for t in (q, k, v)]) if turned else None
    inputs = [tokens_first(b, t) for t in (q, k, v)] if whole is None else [whole, None, None]
    return _written(b, call, caches, inputs, turned, (q.width(1), k.width(1)))


def _caches(call: Call) -> Caches | None:
    """Those that the attention reads, or that its fresh keys and values are written to."""
    read = call.past is not None
    keys, values = (call.k.node, call.v.node) if read else (_update(call.k.node), _update(call.v.node))
    if keys is None or values is None or {keys.target, values.target} != {dialect.kv_update.default}:
        return None
    return Caches(keys, values) if not read or _readers(keys) == _readers(values) == 1 else None


def _update(node: fx.Node) -> fx.Node | None:
    found = [user for user in node.users if user.target in UPDATES and user.args[1] is node]
    return found[0] if len(found) == 1 else None


def _readers(node: fx.Node) -> int:
    return sum(user.op != "output" for user in node.users)


def _unturned(b: Builder, t: Operand) -> Operand:
    return b.operand(cast(fx.Node, t.node.args[0]))


def _written(
    b: Builder,
    call: Call,
    caches: Caches,
    inputs: Sequence[ir.Value | None],
    turned: Tables | None,
    heads: tuple[int, int],
) -> ir.Value:
    lengths, total = _lengths(b, call)
    found, keys, values = b.calls(
        "GroupQueryAttention", *inputs, *caches.before(b), lengths, total, *(turned.values(b) if turned else ()),
        count=3, domain=CONTRIB, num_heads=heads[0], kv_num_heads=heads[1], scale=call.scale,
        do_rotary=1 if turned else None, rotary_interleaved=1 if turned and turned.interleaved else None,
        local_window_size=call.window or None, softcap=call.softcap or None,
    )  # fmt: skip
    b.values[caches.keys], b.values[caches.values] = keys, values
    b.row_by_row |= call.past is not None
    batch, count, width = call.q.shape[0], call.q.shape[2], call.q.shape[3]
    flat = [batch, count, heads[0] * width]
    after = _flattened(b.reading)
    if after is not None and _is(after, flat):
        b.values[after] = found
    return b.call("Transpose", b.reshape(found, [batch, count, heads[0], width], flat), perm=TOKENS_FIRST)


def _lengths(b: Builder, call: Call) -> tuple[ir.Value, ir.Value]:
    """int32: the last position that each row may see [batch], and the number of positions [1]."""
    end = b.size(call.q.shape[2])
    end = end if call.past is None else b.call("Add", b.read(call.past, torch.int64), end)
    total = b.call("Cast", end, to=TYPES[torch.int32])
    last = b.call("Sub", total, b.number(1, torch.int32))
    return b.call("Expand", last, b.size(call.q.shape[0])), total


def _flattened(node: fx.Node | None) -> fx.Node | None:
    """The reshape of the only permutation to [batch, tokens, heads, features] of a node."""
    permuted = _only_user(node, aten.permute.default)
    if permuted is None or [d % 4 for d in cast("list[int]", permuted.args[1])] != TOKENS_FIRST:
        return None
    return _only_user(permuted, aten.reshape.default)


def _only_user(node: fx.Node | None, target: Any) -> fx.Node | None:
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 and users[0].target is target else None


def _layer(t: Operand) -> fx.Node:
    """What [batch, tokens, heads * features] a permutation to [batch, heads, tokens, features] stems from, or t."""
    node = t.node
    if node.target is not aten.permute.default or [d % 4 for d in cast("list[int]", node.args[1])] != TOKENS_FIRST:
        return node
    source = cast(fx.Node, node.args[0])
    batch, heads, count, width = t.shape
    whole = source.args[0] if source.target is aten.reshape.default else source
    return whole if isinstance(whole, fx.Node) and _is(whole, [batch, count, heads * width]) else node


def tokens_first(b: Builder, t: Operand) -> ir.Value:
    """[batch, heads, tokens, features] as [batch, tokens, heads * features]; a permutation before it is undone."""
    batch, heads, count, width = t.shape
    flat = [batch, count, heads * width]
    node, layer = t.node, _layer(t)
    if layer is not node:
        return cast(ir.Value, b.value_of(layer))
    if node.target is aten.permute.default and [d % 4 for d in cast("list[int]", node.args[1])] == TOKENS_FIRST:
        source = b.operand(cast(fx.Node, node.args[0]))
        return b.reshape(source.value, flat, source.shape)
    return b.reshape(b.call("Transpose", t.value, perm=TOKENS_FIRST), flat, [batch, count, heads, width])


def _is(node: fx.Node, shape: list[Any]) -> bool:
    fact: Tensor = node.meta["val"]
    return fact.dim() == len(shape) and all(equal(m, n) for m, n in zip(fact.shape, shape, strict=True))

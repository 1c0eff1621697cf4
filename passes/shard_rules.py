"""Which axis of a value is split between ranks, from layers split by outputs to the one that is split by inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments, same_sizes
from sylvester.compiler.changes import Refusal
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, binding, value

aten, dialect = torch.ops.aten, torch.ops.sylvester
LINEAR, RESHAPE, PERMUTE = aten.linear.default, aten.reshape.default, aten.permute.default
HEADS = 3
"""Place of the heads in [batch, heads, tokens, features], from the end."""


@dataclass
class Flow:
    """The values of an entry between the split layers, in order.

    `ends` says which axis is split, counted from the end, None for one that is not split; `sizes` has the axes of the
    results of reshapes that get another size; `slots` are the caches of heads.
    """

    world: int
    ends: dict[fx.Node, int | None] = field(default_factory=dict)
    sizes: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    slots: list[fx.Node] = field(default_factory=list)

    def args(self, node: fx.Node) -> tuple[Any, ...]:
        """The arguments of the call over what one rank has."""
        if node not in self.sizes:
            return node.args
        place, size = self.sizes[node]
        shape = list(cast("list[Any]", node.args[1]))
        shape[place] = size
        return node.args[0], shape


Found = int | None | Refusal
Rule = Callable[[Flow, fx.Node], Found]


def follow(entry: Entry, readers: set[fx.Node], writer: fx.Node, world: int) -> Flow | Refusal:
    """Follow the split from `readers` to `writer`, which contracts the split axis."""
    flow = Flow(world)
    for node in entry.calls():
        if node in readers:
            flow.ends[node] = 1
        elif any(flow.ends.get(x) is not None for x in node.all_input_nodes):
            if node is writer:
                continue
            found = _end(flow, node)
            if isinstance(found, Refusal):
                return found
            flow.ends[node] = found
    if flow.ends.get(cast(fx.Node, writer.args[0])) != 1:
        return Refusal("the layer that writes to the stream does not read what was split", writer)
    return _leaving(entry, flow) or flow


def _leaving(entry: Entry, flow: Flow) -> Refusal | None:
    for output, node in zip(entry.outputs, entry.results(), strict=True):
        if output.kind == "output" and flow.ends.get(node) is not None:
            return Refusal(f"output {output.name!r} is made of what would be split", node)
    return None


def _end(flow: Flow, node: fx.Node) -> Found:
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(flow, node)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(flow, node)
    return Refusal(f"{op_name(node.target)} reads what would be split, expected only ops that keep heads apart", node)


def _pointwise(flow: Flow, node: fx.Node) -> Found:
    (end, *others) = {flow.ends[x] for x in node.all_input_nodes if flow.ends.get(x) is not None}
    whole = [x for x in node.all_input_nodes if flow.ends.get(x) is None]
    if others or any(_has(x, cast(int, end)) for x in whole):
        return Refusal(f"{op_name(node.target)} joins what would be split with a value that stays whole", node)
    return end


def _has(x: fx.Node, end: int) -> bool:
    """Whether a value has more than one of what is split."""
    fact = value(x)
    return isinstance(fact, Tensor) and fact.dim() >= end and fact.shape[-end] != 1


def _first(flow: Flow, node: fx.Node) -> int | None:
    return flow.ends.get(cast(fx.Node, node.args[0]))


def _norm(flow: Flow, node: fx.Node) -> Found:
    end = _first(flow, node)
    normed = len(cast("list[int]", node.args[1])) if node.target is aten.layer_norm.default else 1
    if end is None or end <= normed:
        return Refusal(f"{op_name(node.target)} averages over what would be split", node)
    return end


def _rope(flow: Flow, node: fx.Node) -> Found:
    if _first(flow, node) != HEADS or any(flow.ends.get(x) is not None for x in node.all_input_nodes[1:]):
        return Refusal("rotary positions turn features that would be split", node)
    return HEADS


def _attention(flow: Flow, node: fx.Node) -> Found:
    given = arguments(node)
    if any(flow.ends.get(given[name]) != HEADS for name in "qkv"):
        return Refusal("not all of queries, keys and values are split by heads", node)
    if given["mask"] is not None and _has(given["mask"], HEADS):
        return Refusal("the mask has a value for each head", node)
    if given["blocks"] is not None:
        return Refusal("the blocks of keys that are seen are listed", node)
    return HEADS


def _kv_update(flow: Flow, node: fx.Node) -> Found:
    cache, new = cast("list[fx.Node]", node.args[:2])
    if flow.ends.get(new) != HEADS or cache.op != "placeholder" or binding(cache).kind != "state":
        return Refusal("a cache takes values that are not split by heads", node)
    flow.slots.append(cache)
    return HEADS


def _permute(flow: Flow, node: fx.Node) -> Found:
    end, order = _first(flow, node), cast("list[int]", node.args[1])
    rank = len(order)
    return rank - [d % rank for d in order].index(rank - cast(int, end))


def _slice(flow: Flow, node: fx.Node) -> Found:
    end, rank = _first(flow, node), value(node).dim()
    if end is None or arguments(node)["dim"] % rank == rank - end:
        return Refusal("a slice takes some of what would be split", node)
    return end


def _size(flow: Flow, node: fx.Node) -> Found:
    x, dim = cast("tuple[fx.Node, int]", node.args)
    rank = value(x).dim()
    if dim % rank == rank - cast(int, flow.ends[x]):
        return Refusal("the size of what would be split is read", node)
    return None


def _select(flow: Flow, node: fx.Node) -> Found:
    x, end = cast(fx.Node, node.args[0]), cast(int, _first(flow, node))
    rank = value(x).dim()
    dim, place = cast(int, node.args[1]) % rank, rank - end
    if dim == place:
        return Refusal("a selection takes some of what would be split", node)
    return end if dim < place else end - 1


def _unsqueeze(flow: Flow, node: fx.Node) -> Found:
    rank, end = value(node).dim(), cast(int, _first(flow, node))
    return end if cast(int, node.args[1]) % rank < rank - end else end + 1


def _reshape(flow: Flow, node: fx.Node) -> Found:
    """[..., heads d] <-> [..., heads, d]: the split axis leads what it led, and its size in the result is divided."""
    x = cast(fx.Node, node.args[0])
    before, after = value(x).shape, value(node).shape
    start = len(before) - cast(int, flow.ends[x])
    place = _leading(before, after, start)
    if place is None:
        return Refusal("a reshape merges what would be split with axes before it", node)
    count, width = after[place], before[start]
    if not (isinstance(count, int) and isinstance(width, int)) or max(count, width) % min(count, width):
        return Refusal("a reshape cuts what would be split otherwise than by heads", node)
    if count % flow.world:
        return Refusal(f"found {count} heads, which {flow.world} ranks do not divide", node)
    flow.sizes[node] = (place, count // flow.world)
    return len(after) - place


def _leading(before: Sequence[Any], after: Sequence[Any], start: int) -> int | None:
    """The axis of the result from which on it holds what the operand holds from `start` on."""
    if start < len(after) and same_sizes(tuple(before[:start]), tuple(after[:start])):
        return start
    if not all(isinstance(n, int) for n in before[start:]):
        return None
    inner, place = 1, len(after)
    while place and isinstance(after[place - 1], int) and inner < math.prod(before[start:]):
        place -= 1
        inner *= after[place]
    return place if inner == math.prod(before[start:]) else None


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((dialect.swiglu.default, dialect.geglu.default, aten.clone.default, aten.to.dtype), _pointwise),
    **dict.fromkeys((dialect.rms_norm.default, aten.layer_norm.default), _norm),
    dialect.rope.default: _rope,
    dialect.attention.default: _attention,
    dialect.kv_update.default: _kv_update,
    PERMUTE: _permute,
    RESHAPE: _reshape,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.sym_size.int: _size,
}

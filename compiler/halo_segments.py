"""A graph of a model as calls of its blocks: a block runs inside of the module that holds its parameters."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, fx, nn


class Block(nn.Module):
    """Holds the parameters of a block and runs its part of a graph, so that hooks on the module surround it."""

    def forward(self, run: Callable[..., Any], *given: Any) -> Any:
        return run(*given)


@dataclass(frozen=True)
class Place:
    """A parameter: the module that holds it, and its name there."""

    module: nn.Module
    name: str


Places = Mapping[int, Place]
"""Parameters by position of their placeholder."""


class Segment(nn.Module):
    """Calls a block with its part of the graph, which takes activations and then the parameters."""

    def __init__(self, block: nn.Module, graph: fx.GraphModule, places: tuple[Place, ...]) -> None:
        super().__init__()
        self.block, self.graph, self.places = block, graph, places

    def forward(self, *given: Any) -> Any:
        return self.block(self.run, *given)

    def run(self, *given: Any) -> Any:
        results = self.graph(*given, *(getattr(place.module, place.name) for place in self.places))
        return tuple(apart(result) for result in results)


class _Apart(torch.autograd.Function):
    """The tensor itself, not known to be a view: FSDP2 warns of writes to views, which a graph does not have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:
        return given


def apart(result: Any) -> Any:
    views = isinstance(result, Tensor) and result.requires_grad and result._is_view()
    return cast(Callable[..., Tensor], _Apart.apply)(result) if views else result


def spans(graph: fx.Graph, weights: Mapping[str, Iterable[int]]) -> dict[str, tuple[int, int]]:
    """Block -> positions of its first and last node, for blocks that lie apart.

    `weights` are the positions of placeholders that a block reads. It starts where it first reads one, and goes on
    behind the last until a weight of another one or of no block is read.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    placeholders = graph.find_nodes(op="placeholder")
    found: dict[str, list[int]] = {}
    for block, places in weights.items():
        if uses := sorted(order[user] for place in places for user in placeholders[place].users):
            found[block] = uses
    mixed = {
        block
        for one, other in combinations(found, 2)
        if found[one][0] <= found[other][-1] and found[other][0] <= found[one][-1]
        for block in (one, other)
    }
    stops = sorted({order[user] for node in placeholders for user in node.users} | {len(order) - 1})
    return {
        block: (uses[0], next(stop for stop in stops if stop > uses[-1]) - 1)
        for block, uses in found.items()
        if block not in mixed
    }


def split(
    module: fx.GraphModule, weights: Mapping[str, Iterable[int]], blocks: Mapping[str, nn.Module], places: Places
) -> fx.GraphModule:
    """The graph with calls of blocks, which read parameters where they are; its placeholders stay."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    nodes = list(graph.nodes)
    placeholders = graph.find_nodes(op="placeholder")
    segments: dict[str, nn.Module] = {}
    for number, (block, (first, last)) in enumerate(spans(graph, weights).items()):
        name, inside = f"segment_{number}", dict.fromkeys(nodes[first : last + 1])
        read = {
            n: places[i] for i, n in enumerate(placeholders) if i in places and not inside.keys().isdisjoint(n.users)
        }
        segments[name] = _cut(graph, inside, read, name, blocks[block])
    end = graph.output_node()
    with graph.inserting_before(end):
        end.args = (tuple(graph.call_function(apart, (node,)) for node in cast(tuple[fx.Node, ...], end.args[0])),)
    return fx.GraphModule(segments, graph)


def _cut(
    graph: fx.Graph, nodes: Collection[fx.Node], own: Mapping[fx.Node, Place], name: str, block: nn.Module
) -> Segment:
    """Take nodes out of a graph; a call of the segment stands in their place."""
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes and n not in own)
    results = [node for node in nodes if any(user not in nodes for user in node.users)]
    part, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*read, *own):
        values[node] = part.placeholder(node.name)
    for node in nodes:
        values[node] = part.node_copy(node, lambda n: values[n])
    part.output(tuple(values[node] for node in results))
    with graph.inserting_before(next(iter(nodes))):
        call = graph.call_module(name, tuple(read))
        taken = [graph.call_function(operator.getitem, (call, i)) for i in range(len(results))]
    for node, new in zip(results, taken, strict=True):
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in nodes)
    for node in reversed(list(nodes)):
        graph.erase_node(node)
    return Segment(block, fx.GraphModule(nn.Module(), part), tuple(own.values()))

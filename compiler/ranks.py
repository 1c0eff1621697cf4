"""One graph run by several ranks in one process: each has its own weights and caches, and sums join what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.parallel_ops import all_reduce
from sylvester.compiler.program import Entry, binding

Tensors = Mapping[str, Tensor]


@torch.no_grad()
def run_ranks(
    entry: Entry, inputs: Tensors, weights: Sequence[Tensors], states: Sequence[Tensors]
) -> list[dict[str, Tensor]]:
    """What each rank gives, by output name; the ranks have the same inputs."""
    sources = [{"input": inputs, "weight": w, "state": s} for w, s in zip(weights, states, strict=True)]
    values: dict[fx.Node, list[Any]] = {}
    for node in entry.graph.nodes:
        if node.op == "placeholder":
            bound = binding(node)
            values[node] = [source[bound.kind][bound.key] for source in sources]
        elif node.op == "call_function":
            values[node] = _call(node, values, len(sources))
    results = entry.results()
    return [
        {output.name: values[node][rank] for output, node in zip(entry.outputs, results, strict=True)}
        for rank in range(len(sources))
    ]


def _call(node: fx.Node, values: Mapping[fx.Node, list[Any]], world: int) -> list[Any]:
    if node.target is all_reduce.target:
        total = torch.stack(values[node.all_input_nodes[0]]).sum(0)
        return [total] * world
    target = cast("Callable[..., Any]", node.target)

    def call(rank: int) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n][rank])
        return target(*args, **kwargs)

    return [call(rank) for rank in range(world)]

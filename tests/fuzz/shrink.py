"""Smaller graphs that fail in the same way: hypothesis drops outputs, and puts sources in the place of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from tests.fuzz.graphs import Graph, Source, Step
from tests.fuzz.grow import INVALID, TURNS, Rejected, sizes_of, source_size
from tests.sampling import Sample

TRIES = 400


def shrink(graph: Graph, fails: Callable[[Graph], bool], seconds: float) -> Graph:
    """The smallest graph found within `seconds` that `fails`; the graph itself when nothing smaller does."""
    end, best = time.monotonic() + seconds, [graph]
    known: dict[str, bool] = {}

    def smaller(drawn: tuple[int, list[int], list[int]]) -> bool:
        made = reduced(graph, *drawn)
        if made is None:
            return False
        text = made.text()
        if text not in known:
            known[text] = time.monotonic() < end and fails(made)
        if not known[text]:
            return False
        if len(made.nodes) <= len(best[0].nodes):
            best[0] = made
        return True

    # A drawn 0 drops; hypothesis prefers zeros, and nine numbers of ten keep.
    count = len(graph.nodes)
    keep = st.lists(st.integers(0, 9), min_size=count, max_size=count)
    rules = settings(
        max_examples=TRIES, database=None, derandomize=True, deadline=None,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        find(st.tuples(st.integers(1, count), keep, keep), smaller, settings=rules)
    except NoSuchExample:
        return graph
    return best[0]


def reduced(graph: Graph, end: int, outputs: Sequence[int], calls: Sequence[int]) -> Graph | None:
    """The first `end` nodes without those drawn as 0: their calls become sources, their outputs none.

    None when no output is left, or a call fails on what it gets.
    """
    ends = [k for k in _ends(graph, end) if outputs[k]]
    values = [graph.run(graph.tensors(turn)) for turn in TURNS]
    nodes: list[Source | Step] = []
    for k, (node, keep) in enumerate(zip(graph.nodes[:end], calls, strict=False)):
        source = None if keep or isinstance(node, Source) else _source([run[k] for run in values], k)
        nodes.append(source or node)
    try:
        made = Graph(tuple(nodes), tuple(ends)).pruned()
        for turn in TURNS:
            made.run(made.tensors(turn))
    except INVALID:
        return None
    usable = any(isinstance(made.nodes[k], Step) for k in made.outputs)
    return made if usable else None


def _ends(graph: Graph, end: int) -> list[int]:
    """Calls among the first `end` nodes that are outputs, or that none of these reads."""
    nodes = graph.nodes[:end]
    read = {k for node in nodes if isinstance(node, Step) for k in node.operands}
    return [k for k, node in enumerate(nodes) if isinstance(node, Step) and (k in graph.outputs or k not in read)]


def _source(turns: list[Any], seed: int) -> Source | None:
    """A source of the shape and kind of a value."""
    if not isinstance(turns[0], Tensor):
        return None
    try:
        shape = tuple(map(source_size, sizes_of(turns)))
    except Rejected:
        return None
    dtype = turns[0].dtype
    if dtype == torch.bool:
        return Source(Sample(shape, "bool"), seed)
    if dtype.is_floating_point:
        return Source(Sample(shape), seed) if dtype == torch.float32 else None
    low, high = min(int(t.min()) for t in turns if t.numel()), max(int(t.max()) for t in turns if t.numel())
    return Source(Sample(shape, "integer", low, high + 1, dtype=None if dtype == torch.int64 else dtype), seed)

"""Classification by execution: change one row of a value and see which rows of a result move."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.cost import hint
from sylvester.compiler.program import Program, binding, is_weight, value

PRIMES = (3, 5, 7, 11, 13, 17, 19, 23)
MOVED = 1e-6
Size = Callable[[Any], int]


def mixes_rows(
    program: Program, content: Collection[fx.Node], start: fx.Node, nodes: Sequence[fx.Node], result: fx.Node
) -> bool | None:
    """Whether a row of `start` (all but its last axis) changes other rows of `result`; None when it cannot be run.

    Weights are the program's, and what depends on sizes only is computed. Content from outside is random; its masks are
    tried as all true and all false. Symbolic sizes are small.
    """
    for size in (_small_sizes([start, *nodes]), hint):
        probes = [Probe(program, content, size, mask) for mask in (True, False)]
        try:
            return any(_other_rows_move(probe, start, nodes, result) for probe in probes)
        except (RuntimeError, IndexError, ValueError):
            continue
    return None


class Probe:
    """Runs a few nodes on made-up values, the same ones every time."""

    def __init__(self, program: Program, content: Collection[fx.Node], size: Size, mask: bool) -> None:
        self.program = program
        self.content = content
        self.size = size
        self.mask = mask
        self.random = torch.Generator().manual_seed(0)

    def made_up(self, node: fx.Node) -> Any:
        """A value of the shape and type of `node`: normal floats, zero integers, one boolean; weights as they are."""
        fact = value(node)
        if isinstance(fact, (int, torch.SymInt)):
            return self.size(fact)
        if is_weight(node) and _alive(self.program.weights[binding(node).key]):
            return self.program.weights[binding(node).key]
        if node.op == "call_function" and node not in self.content:
            return self.run([node], {})[node]
        shape = [self.size(n) for n in fact.shape]
        if not fact.is_floating_point():
            return torch.full(shape, self.mask if fact.dtype == torch.bool else 0, dtype=fact.dtype)
        spread = 1 / math.sqrt(max(1, math.prod(shape[1:]))) if is_weight(node) else 1.0
        return (torch.randn(shape, generator=self.random) * spread).to(fact.dtype)

    def run(self, nodes: Iterable[fx.Node], known: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Values of `nodes`, in order; operands that are not known are made up and remembered in `known`."""
        values = dict(known)
        for node in nodes:
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = known[operand] = self.made_up(operand)
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(dict(node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values


@torch.no_grad()
def _other_rows_move(probe: Probe, start: fx.Node, nodes: Sequence[fx.Node], result: fx.Node) -> bool:
    known = {start: probe.made_up(start)}
    before = probe.run(nodes, known)[result]
    rows = known[start].flatten(0, -2).clone()
    rows[0] = torch.randn(rows.shape[-1], generator=probe.random).to(rows.dtype)
    after = probe.run(nodes, {**known, start: rows.view_as(known[start])})[result]
    moved = (after - before).nan_to_num().abs().reshape(rows.shape[0], -1).amax(1)
    return bool((moved[1:] > MOVED * before.nan_to_num().abs().max()).any())


def _alive(weight: Tensor) -> bool:
    """False for a weight that starts as zeros and would hide what depends on it."""
    return bool(weight.flatten()[:: max(1, weight.numel() // 1000)].count_nonzero())


def _small_sizes(nodes: Iterable[fx.Node]) -> Size:
    """Sizes with a small prime for every symbol."""
    symbols: dict[Any, int] = {}

    def size(n: Any) -> int:
        if not isinstance(n, torch.SymInt):
            return int(n)
        expression = n.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            symbols.setdefault(symbol, PRIMES[len(symbols) % len(PRIMES)])
        return int(expression.subs(symbols))

    for node in nodes:
        if isinstance(value(node), Tensor):
            for n in value(node).shape:
                size(n)
    return size

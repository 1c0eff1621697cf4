"""Which values of a causal graph are token positions, found by evaluating what depends on sizes only."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.masks import FACTORIES, MOST, showing_size, upper_bound
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

LENGTHS = (3, 5, 8)
OTHER = 2
"""Every size but the token length, while evaluating."""


def has(size: object, symbol: sympy.Symbol) -> bool:
    """Whether a size depends on a symbol."""
    return isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols


def token_axes(fact: object, symbol: sympy.Symbol) -> list[int]:
    """The axes of a tensor fact whose size depends on the token length."""
    return [i for i, n in enumerate(fact.shape) if has(n, symbol)] if isinstance(fact, Tensor) else []


class Positions:
    """What the values of an entry are along the token axis, when they do not depend on the content of inputs.

    `offsets` maps a node to c when it is arange(length) + c along its one token axis, whatever the length.
    `constant` are nodes that are the same for every token and length.
    """

    def __init__(self, program: Program, entry: Entry, symbol: sympy.Symbol) -> None:
        self.program = program
        self.symbol = symbol
        self.free = size_only(entry)
        self.offsets: dict[fx.Node, int] = {}
        self.constant: set[fx.Node] = set()
        self.caches: dict[int, dict[fx.Node, Any]] = defaultdict(dict)
        bound = upper_bound(entry, symbol)
        made_of: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in entry.calls():
            if node not in self.free:
                continue
            operands = [n for n in node.all_input_nodes if n in made_of]
            made_of[node] = frozenset({node}).union(*(made_of[n] for n in operands))
            if self.own_axis(node) is not None:
                long = min(showing_size(program, list(made_of[node])), bound)
                if long <= MOST:
                    found = [self._evaluate(node, n, self.caches[n]) for n in LENGTHS]
                    self._classify(node, [*found, self._longest(node, long)])

    def _longest(self, node: fx.Node, length: int) -> Tensor:
        """The value at `length` tokens, or at the most that the tables it reads hold, within a factor of two."""
        while True:
            try:
                return cast(Tensor, self._evaluate(node, length, self.caches[length]))
            except (IndexError, RuntimeError):
                if length <= max(LENGTHS):
                    raise
            length = max(length // 2, *LENGTHS)

    def _classify(self, node: fx.Node, found: list[Tensor]) -> None:
        axis = token_axes(value(node), self.symbol)[0]
        rows = [t.movedim(axis, 0) for t in found]
        if all(torch.equal(r, rows[0][:1].expand_as(r)) for r in rows):
            self.constant.add(node)
            return
        if rows[0].is_complex() or rows[0].dtype == torch.bool:
            return
        offset = int(rows[0].flatten()[0])
        wanted = [torch.arange(len(r)).reshape(-1, *[1] * (r.ndim - 1)) + offset for r in rows]
        if all(bool((r == w).all()) for r, w in zip(rows, wanted, strict=True)):
            self.offsets[node] = offset

    def _evaluate(self, node: fx.Node, length: int, done: dict[fx.Node, Any]) -> Any:
        """The value of a size-only node when there are `length` tokens."""
        if node in done:
            return done[node]
        fact = value(node)
        if not isinstance(fact, Tensor | tuple | list):
            result: Any = self._number(fact, length)
        elif is_weight(node):
            result = self.program.weights[binding(node).key]
        elif node not in self.free:
            like = cast(Tensor, fact)
            result = torch.zeros([self._number(n, length) for n in like.shape], dtype=like.dtype)
        else:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: self._evaluate(n, length, done))
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        done[node] = result
        return result

    def _number(self, size: Any, length: int) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expression = size.node.expr
        return int(expression.subs({s: length if s == self.symbol else OTHER for s in expression.free_symbols}))

    def table_rows(self) -> dict[fx.Node, int]:
        """Slices [start, start + length) of a weight along one axis, with their start."""
        slices = [n for n in self.free if n.target is torch.ops.aten.slice.Tensor and is_weight(n.args[0])]
        placed = self.offsets.keys() | self.constant
        return {n: start for n in slices if n not in placed and (start := self._start(n)) is not None}

    def _start(self, node: fx.Node) -> int | None:
        dim, start, step = _argument(node, 1, 0), _argument(node, 2, 0) or 0, _argument(node, 4, 1)
        plain = isinstance(start, int) and start >= 0 and step == 1
        return int(start) if plain and self.own_axis(node) == dim else None

    def own_axis(self, node: fx.Node) -> int | None:
        """The axis that is exactly as long as there are tokens, if it is the only one that depends on their number."""
        axes = token_axes(value(node), self.symbol)
        return axes[0] if len(axes) == 1 and value(node).shape[axes[0]].node.expr == self.symbol else None


def _argument(node: fx.Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def size_only(entry: Entry) -> set[fx.Node]:
    """Nodes that depend on sizes and weights only."""
    free: set[fx.Node] = set()
    for node in entry.graph.nodes:
        if node.op == "placeholder":
            known = is_weight(node)
        else:
            content = node.all_input_nodes
            if node.target in FACTORIES:
                content = [n for n in content if n is not node.args[0]]
            known = not isinstance(node.meta.get("val"), Tensor | tuple | list) or all(n in free for n in content)
        if known and node.op != "output":
            free.add(node)
    return free

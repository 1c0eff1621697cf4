"""Two programs of equal graphs, walked side by side: which weight of the one stands where which of the other does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from sylvester.compiler.errors import CompileError, module_path
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, Program, binding

Pairs = list[tuple[fx.Node, fx.Node]]
StandIn = Callable[[fx.Node, fx.Node], Pairs | None]
"""A node of each program -> the operands to go on with where the second may stand for the first, though it differs."""


def matching_weights(reference: Program, program: Program, stand_in: StandIn | None = None) -> dict[str, str]:
    """Weight key of `reference` -> key of `program`, over all entries; `CompileError` at the first difference."""
    if set(reference.entries) != set(program.entries):
        found, expected = sorted(program.entries), sorted(reference.entries)
        raise CompileError(f"the program has entries {found}, the architecture gives {expected}")
    pairs: dict[str, str] = {}
    for name, entry in program.entries.items():
        _Walk(name, pairs, stand_in).entries(reference.entries[name], entry)
    return pairs


class _Walk:
    """Pairs nodes from the results upwards; every node has one partner."""

    def __init__(self, entry: str, pairs: dict[str, str], stand_in: StandIn | None) -> None:
        self.entry = entry
        self.pairs = pairs
        self.stand_in = stand_in
        self.partners: dict[fx.Node, fx.Node] = {}

    def entries(self, reference: Entry, entry: Entry) -> None:
        if reference.outputs != entry.outputs:
            expected, found = ([o.name for o in e.outputs] for e in (reference, entry))
            raise CompileError(f"{self.entry!r} gives {found}, the architecture gives {expected}")
        stack = list(zip(reference.results(), entry.results(), strict=True))
        while stack:
            expected_node, found_node = stack.pop()
            known = self.partners.get(expected_node)
            if known is found_node:
                continue
            if known is not None:
                raise self._difference(expected_node, found_node)
            stack += self._below(expected_node, found_node)
            self.partners[expected_node] = found_node

    def _below(self, expected: fx.Node, found: fx.Node) -> Pairs:
        """What two nodes that may be partners read."""
        operands = self.stand_in(expected, found) if self.stand_in else None
        if operands is not None:
            return operands
        if not self._alike(expected, found):
            raise self._difference(expected, found)
        return self._operands(expected, found)

    def _alike(self, expected: fx.Node, found: fx.Node) -> bool:
        if expected.op != found.op:
            return False
        if expected.op != "placeholder":
            return expected.target == found.target
        here, there = binding(expected), binding(found)
        if here.kind != there.kind:
            return False
        if here.kind != "weight":
            return here.key == there.key
        return self.pairs.setdefault(here.key, there.key) == there.key

    def _operands(self, expected: fx.Node, found: fx.Node) -> Pairs:
        (mine, own), (theirs, other) = (pytree.tree_flatten((list(n.args), dict(n.kwargs))) for n in (expected, found))
        pairs = list(zip(mine, theirs, strict=False))
        if own != other or not all(_alike(m, t) for m, t in pairs):
            raise self._difference(expected, found)
        return [(m, t) for m, t in pairs if isinstance(m, fx.Node)]

    def _difference(self, expected: fx.Node, found: fx.Node) -> CompileError:
        place = module_path(expected) or module_path(found) or f"%{found.name}"
        made = "".join(f" made by {step!r}" for step in found.meta.get("made_by", ())[-1:])
        return CompileError(
            f"{_text(found)}{made} at {place} in {self.entry!r}, where the architecture has {_text(expected)}"
        )


def _alike(a: Any, b: Any) -> bool:
    """Two nodes, to be paired later, or equal literals."""
    return isinstance(b, fx.Node) if isinstance(a, fx.Node) else type(a) is type(b) and bool(a == b)


def _text(node: fx.Node) -> str:
    """A node for a message: its op with literals, or what it stands for."""
    if node.op == "placeholder":
        return f"{binding(node).kind} {binding(node).key!r}"
    literals = [str(a) for a in node.args if not isinstance(a, (fx.Node, list, tuple)) and a is not None]
    return f"{op_name(node.target)}({', '.join(['...', *literals])})"

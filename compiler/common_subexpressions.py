"""Equal calls of equal operands -> one call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import fx

# Tagged as random for the sake of its dropout, which no program has.
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class CommonValues:
    """The first node of each value seen so far. Sizes are equal when their expressions are."""

    def __init__(self) -> None:
        self._first: dict[Any, fx.Node] = {}

    def twin(self, node: fx.Node) -> fx.Node | None:
        """An earlier node with the value of `node`, or None; then `node` is the first."""
        fact = node.meta.get("val")
        if isinstance(fact, torch.SymInt):
            key: Any = ("size", fact.node.expr)
        elif is_deterministic(node.target):
            key = (node.target, _key(node.args), _key(node.kwargs))
        else:
            return None
        first = self._first.setdefault(key, node)
        return None if first is node else first


@cache
def is_deterministic(target: Any) -> bool:
    """Calls with equal operands give equal values."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    random = torch.Tag.nondeterministic_seeded in target.tags and target is not SDPA
    return not target._schema.is_mutable and not random


def _key(argument: Any) -> Any:
    """A hashable stand-in; literals of different types differ."""
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, (list, tuple)):
        return tuple(_key(a) for a in argument)
    if isinstance(argument, Mapping):
        return tuple((name, _key(a)) for name, a in sorted(argument.items()))
    return (type(argument), repr(argument))

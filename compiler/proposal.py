"""Tokens that are proposed after the last one: a chain, or a tree of continuations, with the chances of each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from sylvester.compiler.acceptance import Policy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


class Draft:
    """Tokens [batch] with the node that each comes after, and its kind, for rates of acceptance.

    Node 0 is the token that was chosen last, node n the n-th proposed. `seconds` is what a model took for them.
    """

    def __init__(self) -> None:
        self.tokens: list[Ids] = []
        self.parents: list[int] = []
        self.kinds: list[Hashable] = []
        self.reach = [1.0]
        """The chance of each node that it is accepted."""
        self.seconds, self.expected = 0.0, 0.0

    def worth(self, policy: Policy, kind: Hashable, parent: int = -1) -> bool:
        """Whether one more token of this kind pays, after the last node if no other is given."""
        return policy.pays(len(self.tokens), self.expected, self.reach[parent] * policy.rate(kind))

    def spares(self, policy: Policy, parent: int, left: float) -> bool:
        """Whether one more token after `parent` pays, if it is accepted with the chance `left` when the parent is."""
        return policy.pays(len(self.tokens), self.expected, self.reach[parent] * left)

    def add(self, policy: Policy, tokens: Ids, kind: Hashable, parent: int = -1) -> int:
        """The number of the new node."""
        self.parents.append(parent % len(self.reach))
        self.reach.append(self.reach[parent] * policy.rate(kind))
        self.tokens.append(tokens)
        self.kinds.append(kind)
        self.expected += self.reach[-1]
        return len(self.tokens)

    def preorder(self) -> tuple[list[int], list[int]]:
        """The nodes with the first child of each right after it, then the others; and the depth of each."""
        children: list[list[int]] = [[] for _ in self.reach]
        for node, parent in enumerate(self.parents, 1):
            children[parent].append(node)
        order, depths, stack = [], [], [(0, 0)]
        while stack:
            node, depth = stack.pop()
            order.append(node)
            depths.append(depth)
            stack += [(child, depth + 1) for child in reversed(children[node])]
        return order, depths

"""Feature spaces: which tensors and weight axes must be rotated together, and what holds a space to its plain basis.

A rotation R of a space multiplies the feature axis of every member, in blocks of `width`, by R. Members are the float
values of all entries, axes of stored weights and state slots; ops that commute with a rotation unify what they read and
write, everything else pins it (the analysis behind QuaRot, Ashkboos et al. 2024, without knowing the architecture).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

SIZES = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Axis:
    """One axis of a stored weight."""

    key: str
    axis: int


@dataclass(frozen=True)
class Slot:
    """The last axis of a state slot."""

    key: str


Member = fx.Node | Axis | Slot


@dataclass(frozen=True)
class Pin:
    """Where a space meets the plain basis.

    made: the op of `node` gives plain features. read: `user` takes the features of `node` as plain ones. stored: an
    axis of a weight is used as it is.
    """

    kind: Literal["made", "read", "stored"]
    node: fx.Node
    reason: str
    user: fx.Node | None = None


@dataclass
class Space:
    """Members that share a basis.

    `nodes` has the place of each value's feature axis, counted from the end; `sizes` those of all members' axes.
    `reads` are the values that linear layers contract, with those layers.
    """

    width: int
    nodes: dict[fx.Node, int] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)
    axes: list[Axis] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    reads: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def made(self) -> dict[fx.Node, Pin]:
        return {pin.node: pin for pin in self.pins if pin.kind == "made"}

    def read(self) -> list[Pin]:
        """Plain readers of values that are not plain themselves."""
        plain = self.made()
        return [pin for pin in self.pins if pin.kind == "read" and pin.node not in plain]

    def inside(self, node: fx.Node) -> list[fx.Node]:
        """The users of a value that take its features in the basis of the space."""
        outside = {pin.user for pin in self.pins if pin.kind == "read" and pin.node is node}
        return [user for user in node.users if user not in outside and not isinstance(user.meta.get("val"), SIZES)]

    def stored(self) -> list[Pin]:
        return [pin for pin in self.pins if pin.kind == "stored"]


class Unifier:
    """Union-find over members; the width of a space is the greatest common divisor of its members' sizes."""

    def __init__(self) -> None:
        self.parent: dict[Member, Member] = {}
        self.size: dict[Member, int] = {}
        self.width: dict[Member, int] = {}
        self.pins: list[tuple[Member, Pin]] = []
        self.reads: list[tuple[Member, fx.Node, fx.Node]] = []

    def add(self, member: Member, size: int) -> None:
        if member not in self.parent:
            self.parent[member], self.width[member], self.size[member] = member, size, size
        else:
            root = self.find(member)
            self.width[root] = math.gcd(self.width[root], size)

    def find(self, member: Member) -> Member:
        root = member
        while self.parent[root] is not root:
            root = self.parent[root]
        while self.parent[member] is not root:
            self.parent[member], member = root, self.parent[member]
        return root

    def unify(self, members: Iterable[Member]) -> None:
        first, *others = members
        root = self.find(first)
        for member in others:
            other = self.find(member)
            if other is not root:
                self.parent[other] = root
                self.width[root] = math.gcd(self.width[root], self.width.pop(other))

    def spaces(self, end: Mapping[fx.Node, int]) -> list[Space]:
        """All spaces, in the order their first members came; `end` is where each value has its features."""
        found: dict[Member, Space] = {}
        for member in self.parent:
            root = self.find(member)
            space = found.setdefault(root, Space(self.width[root]))
            space.sizes.add(self.size[member])
            if isinstance(member, Axis):
                space.axes.append(member)
            elif isinstance(member, Slot):
                space.slots.append(member)
            else:
                space.nodes[member] = end[member]
        for member, pin in self.pins:
            found[self.find(member)].pins.append(pin)
        for member, node, user in self.reads:
            found[self.find(member)].reads.setdefault(node, []).append(user)
        return list(found.values())

"""Applying rotations: weights absorb them, transforms stand where a rotated space meets the plain basis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.rotation import Rotation, rotated
from sylvester.compiler.spaces import Space

aten = torch.ops.aten
HADAMARD, RMS_NORM = torch.ops.sylvester.hadamard.default, torch.ops.sylvester.rms_norm.default
MADE_BY = "rotate-hadamard"


@dataclass
class Conversions:
    """Where a space needs transforms: after plain values that it takes, and before plain readers of its values."""

    into: list[fx.Node]
    out_of: list[tuple[fx.Node, list[fx.Node]]]

    @staticmethod
    def of(space: Space) -> Conversions:
        readers: dict[fx.Node, list[fx.Node]] = {}
        for pin in space.read():
            if pin.user is not None and pin.user not in readers.setdefault(pin.node, []):
                readers[pin.node].append(pin.user)
        return Conversions([n for n in space.made() if space.inside(n)], list(readers.items()))

    def nodes(self) -> list[fx.Node]:
        return [*self.into, *(node for node, _ in self.out_of)]

    def within(self, entry: Entry) -> int:
        """How many transforms one run of the entry has."""
        return sum(node.graph is entry.graph for node in self.nodes())


@dataclass
class RotationPlan:
    """Transforms go into the graphs at once; each weight is rotated once, when all rotations of its axes are known."""

    program: Program
    changes: Changes
    weights: dict[str, list[tuple[int, Rotation]]] = field(default_factory=dict)

    def rotate(self, space: Space, rotation: Rotation, conversions: Conversions) -> None:
        """Put every member of a space into the basis of `rotation`."""
        norms = self._norms(space, conversions)
        for node, readers in conversions.out_of:
            without = [r for r in readers if r in norms]
            self._leave(node, without, rotation, signs=False)
            self._leave(node, [r for r in readers if r not in norms], rotation, signs=True)
        for node in conversions.into:
            self._enter(node, space.inside(node), rotation, signs=node not in norms)
        for axis in space.axes:
            self.weights.setdefault(axis.key, []).append((axis.axis, rotation))
        for slot in space.slots:
            self.changes.bases[slot.key] = rotation.apply

    def turn(self, node: fx.Node, layers: Iterable[fx.Node], rotation: Rotation) -> None:
        """Linear layers read `node` through a transform of their own, which their weights undo."""
        self._enter(node, list(layers), rotation, signs=False)

    def absorb(self, keys: Iterable[str], axis: int, rotation: Rotation) -> None:
        for key in dict.fromkeys(keys):
            self.weights.setdefault(key, []).append((axis, rotation))

    def finish(self) -> None:
        for key, steps in self.weights.items():
            self.program.weights[key] = rotated(self.program.weights[key], steps)

    def _norms(self, space: Space, conversions: Conversions) -> set[fx.Node]:
        """RMS norms that leave the space and enter it again, for all their readers: they commute with its signs."""
        leaving = {r for _, readers in conversions.out_of for r in readers if r.target is RMS_NORM}
        return {n for n in leaving.intersection(conversions.into) if len(space.inside(n)) == len(n.users)}

    def _enter(self, node: fx.Node, users: list[fx.Node], rotation: Rotation, signs: bool) -> None:
        entry = self.program.entry_of(node)
        before = entry.calls()[0] if node.op == "placeholder" else node.next
        new = self._signed(entry, node, rotation, before) if signs else node
        new = entry.emit(HADAMARD, new, rotation.block, before=before, made_by=MADE_BY)
        for user in users:
            user.replace_input_with(node, new)

    def _leave(self, node: fx.Node, users: list[fx.Node], rotation: Rotation, signs: bool) -> None:
        if not users:
            return
        entry = self.program.entry_of(node)
        before = entry.calls()[0] if node.op == "placeholder" else node.next
        new = entry.emit(HADAMARD, node, rotation.block, True, before=before, made_by=MADE_BY)
        new = self._signed(entry, new, rotation, before) if signs else new
        for user in users:
            user.replace_input_with(node, new)

    def _signed(self, entry: Entry, node: fx.Node, rotation: Rotation, before: fx.Node) -> fx.Node:
        if rotation.signs is None:
            return node
        size = int(value(node).shape[-1])
        key = f"rotation.signs.{rotation.signs}.{rotation.width}.{size}"
        if key not in self.program.weights:
            self.program.weights[key] = rotation.sign_vector.repeat(size // rotation.width)
        factor = entry.bind("weight", key, self.program.weights[key])
        return entry.emit(aten.mul.Tensor, node, factor, before=before, made_by=MADE_BY)


def layer_weight(layer: fx.Node) -> fx.Node:
    """The weight placeholder of a linear layer over a stored weight."""
    weight: fx.Node = arguments(layer)["weight"]
    return weight

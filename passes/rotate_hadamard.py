"""x W^T -> (x R) (W R)^T for every space of features that can be rotated: stream, values, FFN, keys, any layer's input.

Offline rotations are folded into the weights (R1 and R2 of QuaRot, Ashkboos et al. 2024, and SpinQuant, Liu et al.
2024); online ones are Walsh-Hadamard transforms before the layer that undoes them (R4, and the forward product of HALO,
Ashkboos et al. 2025) or on queries and keys (R3).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.outliers import input_statistics
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program, binding, value
from sylvester.compiler.quantized_ops import ATTENTIONS
from sylvester.compiler.rotation import Rotation
from sylvester.compiler.space_rules import NORMS, infer
from sylvester.compiler.spaces import Space
from sylvester.passes.fold_norms import FoldNorms, Tied
from sylvester.passes.rotation_plan import HADAMARD, Conversions, RotationPlan, layer_weight
from sylvester.passes.split_linears import SplitLinears

aten = torch.ops.aten
LINEAR = aten.linear.default
SPARSE_LINEAR = torch.ops.sylvester.sparse_linear.default
ZEROS = "a layer over it skips weights where thresholds left zeros, which a transform would fill"
OUTLIERS = ("max/rms", "kurtosis")
FLAGS = ("residual", "values", "ffn", "keys", "heads", "online")


@dataclass(frozen=True)
class RotateHadamard(Pass):
    """Rotates what the options name, in float64, and refuses edges with a reason, never a model.

    `residual`: the stream, or where it cannot be rotated offline the input of each layer that reads it. `values`: V and
    O of every head. `ffn`: what the last layer of a feed-forward part reads. `heads`: across heads, before O. `keys`: Q
    and K of every head, which helps caches of few bits only. `online` allows transforms at run time. `tied`: see
    `FoldNorms`. `seed` chooses the signs of folded rotations.
    """

    name: ClassVar[str] = "rotate-hadamard"
    contract: ClassVar[Contract] = "exact"
    residual: bool = True
    values: bool = True
    ffn: bool = True
    keys: bool = False
    heads: bool = False
    online: bool = True
    tied: Tied = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        FoldNorms(self.tied)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}, expected a whole number from 0")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for step in (SplitLinears(), *([FoldNorms(self.tied)] if self.residual else [])):
            changes.extend(step.run(program))
            program.sweep()
        before = input_statistics(program)
        _Rotator(self, program, changes).run()
        after = input_statistics(program)
        for key, found in before.items():
            for name, old, new in zip(OUTLIERS, found, after.get(key, found), strict=True):
                changes.figure(key, f"{name} before", old)
                changes.figure(key, f"{name} after", new)
        return changes


@dataclass
class _Rotator:
    """Goes through the spaces of a program and decides for each."""

    options: RotateHadamard
    program: Program
    changes: Changes
    schemes: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        self.plan = RotationPlan(self.program, self.changes)
        for number, space in enumerate(infer(self.program)):
            self._treat(space, self.options.seed * 100_003 + number)
        self.plan.finish()
        for scheme, count in self.schemes.items():
            self.changes.note(f"{scheme}, x{count}")

    def _treat(self, space: Space, seed: int) -> None:
        heads = _attention_roles(space)
        if heads:
            if any(getattr(self.options, role) for role in heads):
                self._heads(space, heads, seed)
            if "values" in heads and self.options.heads:
                self._inputs(space, "heads")
        elif space.reads:
            self._features(space, seed)

    def _heads(self, space: Space, roles: set[str], seed: int) -> None:
        """Values and keys, offline; keys also by a transform on queries and keys."""
        name, conversions = " and ".join(sorted(roles)), Conversions.of(space)
        online = bool(conversions.nodes())
        refusal = _fixed(space, conversions)
        if online and ("values" in roles or not self.options.online):
            pin = next(pin for pin in space.pins if pin.node in conversions.nodes())
            refusal = Refusal(pin.reason, pin.user or pin.node)
        if refusal:
            self.changes.refuse(name, refusal)
            return
        rotation = Rotation.hadamard(space.width) if online else Rotation.offline(space.width, seed)
        if "values" in roles and self.options.heads:
            # A transform across heads would undo a Hadamard matrix within each: H (I x H) = H x I.
            rotation = Rotation(space.width, space.width, random=seed)
        self._rotate(space, name, rotation, conversions)

    def _features(self, space: Space, seed: int) -> None:
        """A stream that few transforms free is rotated as a whole, else the layers that read it one by one."""
        conversions = Conversions.of(space)
        transforms = conversions.within(self.program.main)
        readers = sum(node.graph is self.program.main.graph for node in space.reads)
        written = len(space.axes) > len({_key(layer) for layers in space.reads.values() for layer in layers})
        if not (written and self.options.residual):
            self._inputs(space, _producer(space))
            return
        refusal = self._blocked(space, conversions, transforms, readers)
        if refusal:
            self.changes.refuse("residual", refusal)
            self._inputs(space, "inputs")
            return
        online = bool(conversions.nodes())
        rotation = Rotation.hadamard(space.width, seed) if online else Rotation.offline(space.width, seed)
        self._rotate(space, "residual", rotation, conversions)

    def _blocked(self, space: Space, conversions: Conversions, transforms: int, readers: int) -> Refusal | None:
        """Why a stream is not rotated as a whole."""
        filled = next((layer for layer in _skipping(space) if layer.args[0] in conversions.nodes()), None)
        if filled is not None:
            return Refusal(ZEROS, filled)
        pin = next((pin for pin in space.pins if pin.node in conversions.nodes()), None)
        if pin and (not self.options.online or transforms >= readers):
            cost = f"the stream would take {transforms} transforms at run time, the inputs of its layers {readers}"
            reason = f"{pin.reason}: {cost}" if self.options.online else pin.reason
            return Refusal(reason, pin.user or pin.node)
        return _fixed(space, conversions)

    def _inputs(self, space: Space, role: str) -> None:
        """A transform of its own for each value that linear layers read."""
        wanted = {"ffn": self.options.ffn, "heads": self.options.heads}.get(role, self.options.residual)
        if not (wanted and self.options.online):
            return
        absorbing: dict[str, Rotation] = {}
        for node, layers in self._turnable(space, role).items():
            rotation = Rotation.hadamard(int(value(node).shape[-1]))
            if rotation.trivial:
                reason = f"no Hadamard matrix has an order that divides {rotation.width}"
                self.changes.refuse(role, Refusal(reason, node))
                continue
            self.plan.turn(node, layers, rotation)
            self.changes.apply(role, node)
            self.schemes[f"{role}: {rotation}, online"] += 1
            absorbing |= dict.fromkeys(map(_key, layers), rotation)
        for key, rotation in absorbing.items():
            self.plan.absorb([key], 1, rotation)

    def _turnable(self, space: Space, role: str) -> dict[fx.Node, list[fx.Node]]:
        """The values whose layers have weights that nothing else reads; the others are refused."""
        layers = {layer for found in space.reads.values() for layer in found}
        keys = {node: {_key(layer) for layer in found} for node, found in space.reads.items()}
        weights = {key for found in keys.values() for key in found}
        shared = {key for key in weights if not layers.issuperset(self.program.users(key))}
        left = dict(space.reads)
        skipping = {_key(layer) for layer in _skipping(space)}
        while zeroed := [node for node in left if keys[node] & skipping]:
            for node in zeroed:
                skipping |= keys[node]
                self.changes.refuse(role, Refusal(ZEROS, node))
                del left[node]
        while blocked := [node for node in left if node.target is HADAMARD or keys[node] & shared]:
            for node in blocked:
                shared |= keys[node]
                reason = f"{', '.join(sorted(keys[node]))} is read by more than linear layers over such a value"
                turned = node.target is HADAMARD
                self.changes.refuse(role, Refusal("it is the result of a transform" if turned else reason, node))
                del left[node]
        return left

    def _rotate(self, space: Space, role: str, rotation: Rotation, conversions: Conversions) -> None:
        if rotation.trivial:
            refusal = Refusal(f"a basis of width {space.width} cannot be mixed", next(iter(space.nodes)))
            self.changes.refuse(role, refusal)
            return
        self.plan.rotate(space, rotation, conversions)
        self.changes.apply(role, next(iter(space.nodes)))
        transforms = conversions.within(self.program.main)
        cost = f"{transforms} transforms in {next(iter(self.program.entries))}" if transforms else "folded"
        self.schemes[f"{role}: {rotation}, {cost}"] += 1


def _attention_roles(space: Space) -> set[str]:
    """Whether attention takes values of the space as queries or keys, or as values."""
    places = {
        place
        for node in space.nodes
        for user in node.users
        if user.target in ATTENTIONS
        for place, argument in enumerate(user.args[:3])
        if argument is node
    }
    return {"values" if place == 2 else "keys" for place in places}


def _skipping(space: Space) -> list[fx.Node]:
    """The layers over values of the space that skip weights where such a value is 0."""
    return [layer for found in space.reads.values() for layer in found if layer.target is SPARSE_LINEAR]


def _fixed(space: Space, conversions: Conversions) -> Refusal | None:
    """Why no transforms and folded weights can change the basis of a space."""
    for pin in space.stored():
        return Refusal(f"a weight is used in the plain basis: {pin.reason}", pin.user)
    sideways = next((n for n in conversions.nodes() if space.nodes[n] != 1), None)
    return Refusal("its features are not the last axis", sideways) if sideways else None


def _producer(space: Space) -> str:
    """What the input of layers is that no stream feeds: a normed value, or one inside a feed-forward part."""
    return "inputs" if any(node.target in NORMS for node in space.made()) else "ffn"


def _key(layer: fx.Node) -> str:
    return binding(layer_weight(layer)).key

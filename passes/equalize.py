"""v W_v^T ... W_o^T -> v (W_v / s)^T ... (W_o s)^T: channels between two layers get even weights on both sides.

s_i = sqrt(|row i of the first| / |column i of the second|) is exact where what lies between only scales with its input:
attention's mean of values, a product with a gate, ReLU (cross-layer equalisation, Nagel et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program, binding, is_weight, value
from sylvester.compiler.quantized_ops import ATTENTIONS
from sylvester.compiler.space_rules import infer
from sylvester.passes.fold_norms import scaled_columns
from sylvester.passes.rotation_plan import layer_weight

aten, dialect = torch.ops.aten, torch.ops.sylvester
LINEAR, RELU = aten.linear.default, aten.relu.default
GATED = (dialect.swiglu.default, dialect.geglu.default)
FLOOR = 1e-6
"""Norms below this part of the largest count as this much: dead channels are left alone."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Takes outlier channels out of values and feed-forward parts, before rotations and low-bit rounding."""

    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for link in (*_feed_forward(program).values(), *_values(program)):
            refusal = _refusal(program, link)
            if refusal:
                changes.refuse(link.kind, refusal)
            else:
                _equalise(program, link, changes)
                changes.apply(link.kind, link.firsts[0])
        return changes


@dataclass
class Link:
    """Layers that make channels and layers that read them, in all entries.

    With `width` > 0 the channels are those of heads of that width, and several heads of readers may share one.
    """

    kind: str
    firsts: list[fx.Node] = field(default_factory=list)
    seconds: list[fx.Node] = field(default_factory=list)
    width: int = 0
    slots: tuple[str, ...] = ()

    def keys(self, layers: list[fx.Node], operand: str) -> list[str]:
        found = [arguments(layer)[operand] for layer in layers]
        return list(dict.fromkeys(binding(node).key for node in found if node is not None))


def _feed_forward(program: Program) -> dict[str, Link]:
    """up -> act(gate) * up -> down, and up -> relu -> down, by the weight of `up`."""
    found: dict[str, Link] = {}
    for entry in program.entries.values():
        for node in entry.calls(*GATED, RELU):
            up = node.args[1] if node.target in GATED else node.args[0]
            readers = [user for user in node.users if user.target is LINEAR and user.args[0] is node]
            if not isinstance(up, fx.Node) or not _stored(up) or len(up.users) > 1 or len(readers) < len(node.users):
                continue
            link = found.setdefault(binding(layer_weight(up)).key, Link("ffn"))
            link.firsts.append(up)
            link.seconds += readers
    return found


def _values(program: Program) -> list[Link]:
    """v -> attention -> o, where nothing else takes part; found as a space of features."""
    found = []
    for space in infer(program):
        attends = any(user.target in ATTENTIONS and user.args[2] is node for node in space.nodes for user in node.users)
        firsts = [node for node in space.nodes if node.target is LINEAR]
        seconds = [layer for layers in space.reads.values() for layer in layers]
        if attends and not space.pins and firsts and seconds:
            slots = tuple(slot.key for slot in space.slots)
            found.append(Link("values", firsts, seconds, space.width, slots))
    return found


def _refusal(program: Program, link: Link) -> Refusal | None:
    layers = [*link.firsts, *link.seconds]
    if not all(map(_stored, layers)):
        return Refusal("a weight is computed", link.firsts[0])
    for key in {binding(layer_weight(layer)).key for layer in layers} | set(link.keys(link.firsts, "bias")):
        outside = [user for user in program.users(key) if user not in layers]
        if outside:
            return Refusal(f"{key} is read elsewhere too", outside[0])
    shared = set(link.keys(link.firsts, "weight")) & set(link.keys(link.seconds, "weight"))
    if shared or len(link.keys(link.firsts, "weight")) > 1:
        return Refusal("more than one layer makes the channels", link.firsts[0])
    return None


def _equalise(program: Program, link: Link, changes: Changes) -> None:
    (first,), seconds = link.keys(link.firsts, "weight"), link.keys(link.seconds, "weight")
    rows = program.weights[first].double().norm(dim=1)
    columns = torch.stack([_column_norms(program.weights[key], len(rows), link.width) for key in seconds]).norm(dim=0)
    scale = (_above(rows) / _above(columns)).sqrt()
    program.weights[first] = (program.weights[first].double() / scale[:, None]).float()
    for key in link.keys(link.firsts, "bias"):
        program.weights[key] = (program.weights[key].double() / scale).float()
    for key in seconds:
        wide = _for_readers(scale, program.weights[key].shape[1], link.width)
        program.weights[key] = scaled_columns(program.weights[key], wide)
    for slot in link.slots:
        by_head = scale.reshape(-1, 1, link.width)
        changes.bases[slot] = lambda x, by_head=by_head: (x.double() / by_head).to(x.dtype)  # type: ignore[misc]


def _column_norms(weight: Tensor, channels: int, width: int) -> Tensor:
    """Norm of the columns that read each channel."""
    norms: Tensor = weight.double().norm(dim=0)
    by_head: Tensor = norms.reshape(channels // width, -1, width).norm(dim=1) if width else norms
    return by_head.flatten()


def _for_readers(scale: Tensor, columns: int, width: int) -> Tensor:
    """The scale of the channel that each column reads: consecutive heads of readers share one of the values."""
    if not width:
        return scale
    return scale.reshape(-1, 1, width).repeat(1, columns // len(scale), 1).flatten()


def _above(norms: Tensor) -> Tensor:
    return norms.clamp_min(FLOOR * float(norms.max()) or 1.0)


def _stored(node: fx.Node) -> bool:
    if node.target is not LINEAR:
        return False
    given = arguments(node)
    stored = is_weight(given["weight"]) and (given["bias"] is None or is_weight(given["bias"]))
    return bool(stored) and value(given["weight"]).dim() == 2 and value(given["weight"]).dtype == torch.float32

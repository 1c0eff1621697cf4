"""Walking the entries of a program to build its spaces: what each node reads and makes, given a rule per op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.program import Entry, Program, binding, is_weight, value
from sylvester.compiler.spaces import Axis, Member, Pin, Slot, Unifier

aten = torch.ops.aten
Rule = Callable[["Inference", fx.Node], bool]
"""Unifies what a node reads and makes; False: the op keeps no basis, so that all it touches is pinned."""

SIZE_ONLY = (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.new_zeros.default)
NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8)
VIEWS = (
    aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.clone.default, aten.alias.default,
)  # fmt: skip


class Inference:
    """`end[node]` is the place of a value's feature axis, counted from the end: 1 is the last.

    With `plain_linears` a linear layer does not tie its weight to what it reads.
    """

    def __init__(self, program: Program, rules: Mapping[Any, Rule], plain_linears: bool) -> None:
        self.program = program
        self.rules = rules
        self.plain_linears = plain_linears
        self.unifier = Unifier()
        self.end: dict[fx.Node, int] = {}
        self.plain: set[fx.Node] = set()

    def visit(self, entry: Entry) -> None:
        for node in entry.graph.nodes:
            if node.op == "placeholder":
                self._given(node)
            elif node.op == "call_function" and not isinstance(node.meta.get("val"), (int, float, torch.SymInt)):
                rule = self.rules.get(node.target)
                if node.target not in SIZE_ONLY and (rule is None or not rule(self, node)):
                    self._pin_all(node, _why_plain(node))
        for output, result in zip(entry.outputs, entry.results(), strict=True):
            self._returned(entry, output.kind, output.name, result)

    def _given(self, node: fx.Node) -> None:
        bound = binding(node)
        if bound.kind == "state" and self.track(node, 1):
            self.unifier.add(Slot(bound.key), self.size(node, 1))
            self.unifier.unify([node, Slot(bound.key)])
        elif bound.kind == "input" and is_float(node):
            self.made(node, "an input of the model")
        elif is_stored(node) and any(user.target in VIEWS for user in node.users) and self.track(node, 1):
            self.unifier.unify([node, self.axis(node, value(node).dim() - 1)])
            self._pin_others(node, 1, node, "a view of the weight has its last axis as features")

    def _returned(self, entry: Entry, kind: str, name: str, result: fx.Node) -> None:
        """A slot holds the last axis of a value that is not given to the caller as well."""
        end = entry.graph.output_node()
        given = [r for o, r in zip(entry.outputs, entry.results(), strict=True) if o.kind == "output"]
        if kind != "state":
            self.read(result, end, f"it is the output {name!r}")
            return
        self.unifier.add(Slot(name), self.size(result, 1))
        if self.end.get(result) == 1 and result not in given:
            self.unifier.unify([result, Slot(name)])
        else:
            self.unifier.pins.append((Slot(name), Pin("stored", result, f"the state {name!r} is plain", end)))
            self.read(result, end, f"the state {name!r} is plain")

    def size(self, node: fx.Node, end: int) -> int:
        """The size of the axis at `end`; 0 when it is symbolic or missing."""
        shape = value(node).shape
        size = shape[-end] if end <= len(shape) else 0
        return size if isinstance(size, int) else 0

    def features(self, operand: object) -> int:
        """How many features an operand has, 0 for one without a feature axis."""
        if not isinstance(operand, fx.Node) or operand not in self.end:
            return 0
        return self.size(operand, self.end[operand])

    def track(self, node: fx.Node, end: int) -> bool:
        """Give the value a feature axis, if it has a known size."""
        if not is_float(node) or not self.size(node, end):
            return False
        self.end[node] = end
        self.unifier.add(node, self.size(node, end))
        return True

    def member(self, operand: object, end: int) -> Member | None:
        """The member that stands for the features of an operand at `end`; None when its features are elsewhere."""
        if not isinstance(operand, fx.Node):
            return None
        if is_weight(operand):
            rank = value(operand).dim()
            return self.axis(operand, rank - end) if is_stored(operand) and end <= rank else None
        return operand if self.end.get(operand) == end else None

    def axis(self, weight: fx.Node, axis: int) -> Axis:
        member = Axis(self.program.weights.resolve(binding(weight).key), axis)
        self.unifier.add(member, int(value(weight).shape[axis]))
        return member

    def made(self, node: fx.Node, reason: str, end: int = 1) -> None:
        if node in self.end or self.track(node, end):
            self.plain.add(node)
            self.unifier.pins.append((node, Pin("made", node, reason)))

    def read(self, node: fx.Node, user: fx.Node, reason: str) -> None:
        if is_stored(node):
            self.stored(node, range(value(node).dim()), user, reason)
        elif node in self.end:
            self.unifier.pins.append((node, Pin("read", node, reason, user)))

    def stored(self, weight: fx.Node, axes: Iterable[int], user: fx.Node, reason: str) -> None:
        """The user takes these axes of a weight as they are."""
        for axis in axes:
            self.unifier.pins.append((self.axis(weight, axis), Pin("stored", weight, reason, user)))

    def keep(self, node: fx.Node, end: int, *operands: object) -> bool:
        """The node has its features at `end` in the same space as the operands have theirs."""
        members = [self.member(operand, end) for operand in operands]
        if None in members or not self.track(node, end):
            return False
        if any(self.size(cast(fx.Node, operand), end) != self.size(node, end) for operand in operands):
            return False
        for operand in operands:
            self._pin_others(cast(fx.Node, operand), end, node, f"{op_name(node)} has another axis as features")
        self.unifier.unify([node, *cast("list[Member]", members)])
        return True

    def _pin_others(self, operand: fx.Node, end: int, user: fx.Node, reason: str) -> None:
        """The axes of a weight that are no features, such as the rows of a table."""
        if is_stored(operand):
            rank = value(operand).dim()
            others = [axis for axis in range(rank) if axis != rank - end and value(operand).shape[axis] > 1]
            self.stored(operand, others, user, reason)

    def _pin_all(self, node: fx.Node, reason: str) -> None:
        for operand in node.all_input_nodes:
            self.read(operand, node, reason)
        if is_float(node):
            rank = value(node).dim()
            ends = [self.end[o] for o in node.all_input_nodes if o in self.end and value(o).dim() == rank]
            self.made(node, reason, ends[0] if ends else 1)


def is_float(node: fx.Node) -> bool:
    fact = node.meta.get("val")
    return isinstance(fact, Tensor) and fact.is_floating_point() and fact.dim() > 0


def is_stored(node: object) -> bool:
    """A float32 weight, which a rotation can change."""
    return is_weight(node) and value(cast(fx.Node, node)).dtype == torch.float32


def _why_plain(node: fx.Node) -> str:
    """Why an op keeps no basis."""
    types = [value(x).dtype for x in node.all_input_nodes if is_weight(x)]
    narrow = next((dtype for dtype in types if dtype in NARROW), None)
    if narrow is not None:
        return f"{op_name(node)} reads a weight of {str(narrow).removeprefix('torch.')}, only float32 can be rotated"
    return f"{op_name(node)} does not commute with a rotation of its features"


def op_name(node: fx.Node) -> str:
    """Such as "linear" or "mul"."""
    return str(node.target).removeprefix("aten.").removeprefix("sylvester.").partition(".")[0]

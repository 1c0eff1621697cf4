"""Edits of whole parts of a graph: find what lies between two values, drop it, or bind it to other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from sylvester.compiler.errors import CompileError
from sylvester.compiler.parts import SUMS
from sylvester.compiler.printing import fact
from sylvester.compiler.program import Entry, binding, is_weight, value
from sylvester.compiler.weights import ParameterStore


@dataclass(frozen=True)
class Region:
    """Calls that belong together. `inputs` come from outside, `outputs` are read outside, each in graph order."""

    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]

    @staticmethod
    def of(nodes: Iterable[fx.Node]) -> Region:
        """The region of these nodes with its borders."""
        inside = dict.fromkeys(sorted(nodes))
        inputs = sorted({n for node in inside for n in node.all_input_nodes if n not in inside})
        outputs = [node for node in inside if any(user not in inside for user in node.users)]
        return Region(tuple(inputs), tuple(outputs), tuple(inside))

    @staticmethod
    def between(start: fx.Node, end: fx.Node) -> Region:
        """Every call on a way from `start`, left out, to `end`, included."""
        below = _reach({start}, forward=True)
        if end not in below or end is start:
            raise CompileError(f"{end.name} does not depend on {start.name}", at=end)
        return Region.of((below & _reach({end}, forward=False)) - {start})

    def weights(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in self.inputs if is_weight(n))


def _reach(nodes: set[fx.Node], *, forward: bool) -> set[fx.Node]:
    """All nodes that depend on `nodes`, or that they depend on, with `nodes` themselves; never the output."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        near = {n for n in (node.users if forward else node.all_input_nodes) if n.op != "output"} - seen
        seen |= near
        stack += near
    return seen


def bypass(entry: Entry, start: fx.Node, end: fx.Node) -> Region:
    """Whatever read `end` now reads `start`; returns what was skipped. The next sweep erases what nothing reads."""
    region = Region.between(start, end)
    if fact(start) != fact(end):
        raise CompileError(f"cannot skip from {fact(start)} to {fact(end)}: shape and type must be equal", at=end)
    entry.replace(end, start)
    return region


def drop_addend(entry: Entry, end: fx.Node, addend: fx.Node) -> None:
    """The sum at `end` goes on without `addend`: x + f(x) -> x. The next sweep erases what nothing reads."""
    total, other = sum_of(end, addend)
    if fact(other) != fact(total):
        raise CompileError(f"the sum without %{addend.name} is {fact(other)}, expected {fact(total)}", at=total)
    entry.replace(total, other)


def sum_of(end: fx.Node, addend: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The addition or subtraction up to `end` that reads `addend`, and its other operand."""
    for user in addend.users:
        other = user.args[1] if user.args[0] is addend else user.args[0]
        minuend = user.target is torch.ops.aten.sub.Tensor and user.args[0] is addend
        plain = user.target in SUMS and not user.kwargs and not minuend and isinstance(other, fx.Node)
        if plain and other is not addend and end in _reach({user}, forward=True):
            return user, cast(fx.Node, other)
    raise CompileError(f"%{addend.name} is not added to the stream by a plain sum", at=addend)


def rebind(entry: Entry, store: ParameterStore, keys: Mapping[fx.Node, str], within: Iterable[fx.Node]) -> None:
    """Nodes of `within` read the weight `keys[placeholder]` instead of each placeholder: blocks share weights."""
    replacements = {old: _bound(entry, store, old, key) for old, key in keys.items()}
    for node in within:
        for old, new in replacements.items():
            node.replace_input_with(old, new)


def _bound(entry: Entry, store: ParameterStore, old: fx.Node, key: str) -> fx.Node:
    if not is_weight(old):
        raise CompileError("only weights can be rebound", at=old)
    tensor: torch.Tensor = store[key]
    if tensor.shape != value(old).shape or tensor.dtype != value(old).dtype:
        found = f"{tensor.dtype}{list(tensor.shape)}"
        raise CompileError(f"cannot bind {binding(old).key!r} ({fact(old)}) to {key!r} ({found})", at=old)
    return entry.bind("weight", store.resolve(key), tensor)

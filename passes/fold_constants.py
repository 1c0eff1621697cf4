"""f(weights, literals) -> one new weight: what needs no input is computed once, at compile time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.common_subexpressions import is_deterministic
from sylvester.compiler.errors import module_path
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, Program, binding, is_weight, value
from sylvester.compiler.quantized_ops import WIDENINGS
from sylvester.compiler.shared_ops import combine

aten = torch.ops.aten
LITERALS = (aten.full.default, aten.expand.default)
SCALED = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
FILLED: dict[Any, Any] = {aten.where.self: aten.where.ScalarOther, aten.masked_fill.Tensor: aten.masked_fill.Scalar}
"""Ops whose third operand may be a number, and the ops that take one."""
KEPT = frozenset({combine.target, *WIDENINGS})
"""Ops on weights that are shared or rounded, which stay so."""
LARGEST_FILL = 1 << 24
LARGE = 1 << 16
"""Bytes of a weight from which a second copy matters."""
SHORT = {"permute": "t", "to.dtype": "cast"}


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Folds values of static shape. One that would grow the program by more than `limit` bytes stays computed.

    Constant fills and expands stay as they are: a kernel reads them for nothing. What depends on symbolic sizes stays.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = "exact"

    limit: int = 1 << 16

    def run(self, program: Program) -> Changes:
        folder = Folder(program, self.limit)
        constant = {name: _constant_nodes(entry) for name, entry in program.entries.items()}
        for found in constant.values():
            folder.count_live(found)
        for name, found in constant.items():
            for root in _roots(found):
                folder.fold(program.entries[name], root)
            inline_scalars(program, program.entries[name], folder.changes)
        return folder.changes


@dataclass
class Folder:
    """Folds roots of constant cones; equal cones in several entries become one weight."""

    program: Program
    limit: int
    changes: Changes = field(default_factory=Changes)
    live: set[str] = field(default_factory=set)
    folded: dict[Any, str] = field(default_factory=dict)

    def count_live(self, constant: Mapping[fx.Node, None]) -> None:
        """Note the weights that something other than a constant uses: folding does not free them."""
        weights = (n for n in constant if is_weight(n))
        self.live |= {binding(n).key for n in weights if any(u not in constant for u in n.users)}

    def fold(self, entry: Entry, root: fx.Node) -> None:
        """Replace `root` by a weight placeholder, or refuse."""
        cone = _cone(root)
        if fill := self._fill(entry, root, cone):
            entry.replace(root, fill)
            self.changes.apply("fill", root)
            return
        term = _term(root, {})
        if term not in self.folded:
            grown = self._growth(root, cone)
            if grown > self.limit:
                reason = f"grows the weights by {grown} bytes, the limit is {self.limit}"
                self.changes.refuse("fold", Refusal(reason, root))
                return
            self.folded[term] = self._store(root, cone)
        key = self.folded[term]
        self.live.add(key)
        entry.replace(root, entry.bind("weight", key, self.program.weights[key]))
        self.changes.apply("fold", root)

    def _fill(self, entry: Entry, root: fx.Node, cone: list[fx.Node]) -> fx.Node | None:
        """A fill that equals a constant made of literals alone, when all its elements are the same."""
        sizes = list(value(root).shape)
        if any(map(is_weight, cone)) or not 0 < math.prod(sizes) <= LARGEST_FILL:
            return None
        result = self._compute(root, cone)
        first, made_by = result.flatten()[0], FoldConstants.name
        if not (result == first).all():
            return None
        return entry.emit(aten.full.default, sizes, first.item(), dtype=result.dtype, before=root, made_by=made_by)

    def _growth(self, root: fx.Node, cone: list[fx.Node]) -> int:
        """Bytes of the result less those of the weights that only constants use."""
        fact: Tensor = value(root)
        weights = [binding(n).key for n in cone if is_weight(n)]
        freed = sum(_nbytes(self.program.weights[key]) for key in weights if key not in self.live)
        return math.prod(fact.shape) * fact.element_size() - freed

    def _compute(self, root: fx.Node, cone: list[fx.Node]) -> Tensor:
        values: dict[fx.Node, Any] = {}
        for node in cone:
            if is_weight(node):
                values[node] = self.program.weights[binding(node).key]
            else:
                args, kwargs = map_arg(node.args, values.__getitem__), map_arg(dict(node.kwargs), values.__getitem__)
                values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        return cast(Tensor, values[root])

    def _store(self, root: fx.Node, cone: list[fx.Node]) -> str:
        """Keep the value of `root` under a new key, named after the first weight and the last op."""
        first = next((binding(n).key for n in cone if is_weight(n)), module_path(root) or "constant")
        op = op_name(root.target)
        key = self.program.weights.fresh(f"{first}.{SHORT.get(op, op)}")
        self.program.weights[key] = self._kept(self._compute(root, cone), cone)
        return key

    def _kept(self, result: Tensor, cone: list[fx.Node]) -> Tensor:
        """The result in memory of its own; a large weight that is only turned stays a view, as the model holds it."""
        stored = [self.program.weights[binding(n).key].untyped_storage() for n in cone if is_weight(n)]
        storage = result.untyped_storage()
        if storage.data_ptr() not in [s.data_ptr() for s in stored]:
            return result.contiguous()
        turned = result.nbytes == storage.nbytes() > LARGE
        return result if turned else result.clone(memory_format=torch.contiguous_format)


def inline_scalars(program: Program, entry: Entry, changes: Changes) -> None:
    """x * w with a weight of one element and no axes -> x * number; where(seen, x, w) -> where(seen, x, number)."""
    for node in entry.calls(*SCALED, *FILLED):
        place = 2 if node.target in FILLED else 1
        x, scalar = node.args[int(node.target is aten.where.self)], node.args[place]
        if not is_weight(scalar) or value(cast(fx.Node, scalar)).dim() or not isinstance(x, fx.Node):
            continue
        if value(x).is_floating_point() and value(x).dtype == value(node).dtype:
            number = program.weights[binding(cast(fx.Node, scalar)).key].item()
            node.target = FILLED.get(node.target, node.target)
            node.args = (*node.args[:place], number, *node.args[place + 1 :])
            changes.apply("inline_scalar", node)


def _constant_nodes(entry: Entry) -> dict[fx.Node, None]:
    """Weights, and the calls on nothing but weights and literals whose shape is known, but for those of `KEPT`."""
    found: dict[fx.Node, None] = {}
    for node in entry.graph.nodes:
        foldable = node.target not in KEPT and is_deterministic(node.target)
        call = node.op == "call_function" and foldable and _is_static(node)
        if is_weight(node) or (call and all(u in found for u in node.all_input_nodes)):
            found[node] = None
    return found


def _is_static(node: fx.Node) -> bool:
    fact = node.meta.get("val")
    tensors = fact if isinstance(fact, (tuple, list)) else [fact]
    return all(isinstance(t, Tensor) and all(isinstance(n, int) for n in t.shape) for t in tensors)


def _roots(constant: Mapping[fx.Node, None]) -> list[fx.Node]:
    """Constant calls worth keeping that something else uses; an expand or a fill is made where it is used."""
    outside = [n for n in constant if n.op == "call_function" and any(u not in constant for u in n.users)]
    found: dict[fx.Node, None] = {}
    while outside:
        node = outside.pop()
        if node.target in LITERALS:
            outside += [u for u in node.all_input_nodes if u.op == "call_function"]
        elif isinstance(value(node), Tensor):
            found[node] = None
    return sorted(found)


def _cone(root: fx.Node) -> list[fx.Node]:
    """All that `root` is made of, operands first; among it may be a weight that an earlier root became."""
    needed, stack = {root}, [root]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in needed:
                needed.add(operand)
                stack.append(operand)
    return sorted(needed)


def _term(node: fx.Node, seen: dict[fx.Node, Any]) -> Any:
    """A hashable stand-in for a constant: its ops, literals and weight keys."""
    if node not in seen:
        if is_weight(node):
            seen[node] = binding(node).key
        else:
            operands = tuple(_term(u, seen) for u in node.all_input_nodes)
            seen[node] = (node.target, repr(map_arg((node.args, node.kwargs), lambda n: "_")), operands)
    return seen[node]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

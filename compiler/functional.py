"""Copy an exported graph into a functional one: weights by key, regions inlined, asserts dropped, `foo_` -> `foo`."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor
from torch.fx.node import map_arg

from sylvester.compiler.errors import TraceError
from sylvester.compiler.program import fake_empty, value

aten = torch.ops.aten
ASSERTS = {
    "_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size",
    "_functional_assert_async",
}  # fmt: skip
UNDECLARED_ALIASES = {"dropout", "feature_dropout", "alpha_dropout", "type_as", "meshgrid", "broadcast_tensors"}
"""Ops that may return their input although their schema does not say so."""
ORIGIN = ("val", "stack_trace", "nn_module_stack")
NO_ORIGIN = ("_empty_nn_module_stack", "torch/fx/passes")


class NeedsFunctionalization(Exception):
    """A write may be visible through another name; only a functionalised export has value semantics."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(node.name)
        self.node = node


class Copier:
    """Copies nodes into `graph`. `values` maps each old node to a new node, a constant, or a tuple of them.

    `roots` maps a node to the oldest node whose memory it may share; memory of `foreign` ones is not tracked.
    With `gradients`, regions without gradients are cut off from what they read.
    """

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any], gradients: bool = False) -> None:
        self.graph = graph
        self.values = values
        self.gradients = gradients
        self.roots: dict[fx.Node, fx.Node] = {}
        self.foreign: set[fx.Node] = set()

    def body(self, module: fx.GraphModule, *, region: bool = False) -> Any:
        """Copy all calls of a graph whose placeholders are mapped; returns its result with new nodes."""
        order = {node: i for i, node in enumerate(module.graph.nodes)}
        for node in module.graph.nodes:
            self.roots[node] = self._root(node)
            if isinstance(node.target, HigherOrderOperator) or (region and node.op == "placeholder"):
                self.foreign.add(node)
            if node.op == "call_function":
                self.values[node] = self._call(node, module, order)
        return self._new(module.graph.output_node().args[0])

    def _call(self, node: fx.Node, module: fx.GraphModule, order: dict[fx.Node, int]) -> Any:
        if isinstance(node.target, HigherOrderOperator):
            return self._region(node, module)
        if node.target is operator.getitem and isinstance(source := self._new(node.args[0]), tuple | list):
            return source[cast(int, node.args[1])]
        if (number := constant(node.meta.get("val"))) is not None:
            return number
        if not isinstance(node.target, OpOverload):
            return self._emit(node, node.target)
        if node.target._schema.name.split("::")[1] in ASSERTS:
            return None
        return self._write(node, order) if node.target._schema.is_mutable else self._emit(node, node.target)

    def _emit(self, node: fx.Node, target: Any) -> fx.Node:
        args, kwargs = self._new(node.args), self._new(dict(node.kwargs))
        new = self.graph.create_node("call_function", target, args, kwargs, node.name)
        new.meta = {key: node.meta[key] for key in ORIGIN if key in node.meta}
        new.meta["val"] = settled(node.meta["val"])
        return new

    def _new(self, argument: Any) -> Any:
        return map_arg(argument, lambda n: self.values[n])

    def _region(self, node: fx.Node, module: fx.GraphModule) -> Any:
        """Inline a region that only sets a mode which does not matter here."""
        name = cast(HigherOrderOperator, node.target).name()
        at = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast") or at is None:
            hint = "compute both sides and choose with torch.where, or move the construct out of the model"
            raise TraceError(f"found a {name} construct, expected plain tensor operations", at=node, hint=hint)
        if name == "wrap_with_autocast" and node.args[2]:
            hint = "trace the model without torch.autocast; a target chooses its own precision"
            raise TraceError(f"found an autocast region to {node.args[1]}", at=node, hint=hint)
        region = cast(fx.GraphModule, getattr(module, str(cast(fx.Node, node.args[at]).target)))
        outside = self._new(node.args[at + 1 :])
        if self.gradients and name == "wrap_with_set_grad_enabled" and not node.args[0]:
            outside = tuple(self._detached(operand) for operand in outside)
        self.values |= dict(zip(region.graph.find_nodes(op="placeholder"), outside, strict=True))
        return self.body(region, region=True)

    def _detached(self, operand: Any) -> Any:
        if not isinstance(operand, fx.Node) or not isinstance(value(operand), Tensor):
            return operand
        new = self.graph.call_function(aten.detach.default, (operand,))
        new.meta = {key: operand.meta[key] for key in ORIGIN if key in operand.meta}
        return new

    def _root(self, node: fx.Node) -> fx.Node:
        """The oldest node whose memory this one may share."""
        schema = getattr(node.target, "_schema", None)
        shares = node.target is operator.getitem or (
            schema is not None
            and (any(r.alias_info for r in schema.returns) or schema.name.split("::")[1] in UNDECLARED_ALIASES)
        )
        return self.roots[node.all_input_nodes[0]] if shares and node.all_input_nodes else node

    def _write(self, node: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
        """y = foo_(x) becomes y = foo(x), and x means y from here on, if no other name of that memory is still read."""
        target, written = _out_of_place(node), node.args[0]
        if target is None or not isinstance(written, fx.Node) or written not in order:
            raise NeedsFunctionalization(node)
        root = self.roots[written]
        before = self.values[written]
        same = [n for n in order if n in self.values and self.values[n] is before]
        others = [n for n, r in self.roots.items() if r is root and n in order and n is not node and n not in same]
        if root.op == "placeholder" and self._is_weight(root):
            hint = "return the new value instead of storing it"
            raise TraceError("forward writes to a weight or buffer", at=node, hint=hint)
        if root in self.foreign or any(order[u] > order[node] for n in others for u in n.users):
            raise NeedsFunctionalization(node)
        new = self._emit(node, target)
        self.values |= dict.fromkeys(same, new)
        return new

    def _is_weight(self, node: fx.Node) -> bool:
        new = self.values[node]
        return isinstance(new, fx.Node) and new.op == "placeholder" and new.meta["bind"].kind == "weight"


def constant(size: object) -> int | None:
    """The number behind a symbolic size that the trace has fixed."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None


def settled(val: Any) -> Any:
    """A tensor fact whose fixed sizes are numbers."""
    if isinstance(val, tuple | list):
        return type(val)(settled(v) for v in val)
    if not isinstance(val, FakeTensor) or all(constant(n) is None for n in val.shape):
        return val
    shape = [n if constant(n) is None else constant(n) for n in val.shape]
    return fake_empty(val.fake_mode, cast("list[int]", shape), val.dtype)


def _out_of_place(node: fx.Node) -> OpOverload | None:
    """The overload that returns what an in-place one would have stored, if it has the same type."""
    target = cast(OpOverload, node.target)
    space, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name[:-1], None) if name.endswith("_") else None
    overload = getattr(packet, target._overloadname, None)
    if overload is None or [a.name for a in overload._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    return overload if _keeps_type(node, overload) else None


def _keeps_type(node: fx.Node, overload: OpOverload) -> bool:
    """Whether the result is of the type that was written to: add(half, float) is wider than add_(half, float)."""
    kept: Tensor = value(cast(fx.Node, node.args[0]))
    mode = next(value(n).fake_mode for n in node.all_input_nodes if isinstance(value(n), FakeTensor))
    with mode, torch.no_grad():
        result = overload(*map_arg(node.args, value), **map_arg(dict(node.kwargs), value))
    return bool(result.dtype == kept.dtype and result.ndim == value(node).ndim)


def fill_origins(graph: fx.Graph) -> None:
    """Calls that the exporter inserted (sizes) get the origin of their first user."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or _has_origin(node):
            continue
        for user in _known(node):
            node.meta |= {key: user.meta[key] for key in ORIGIN[1:] if key in user.meta}
            break


def _known(node: fx.Node) -> Iterator[fx.Node]:
    return (user for user in node.users if user.op == "call_function" and _has_origin(user))


def _has_origin(node: fx.Node) -> bool:
    paths = "".join(map(str, node.meta.get("nn_module_stack") or ()))
    origin = paths + (node.meta.get("stack_trace") or "")
    return bool(origin) and not any(mark in origin for mark in NO_ORIGIN)

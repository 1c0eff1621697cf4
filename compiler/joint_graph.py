"""The forward and the backward pass of a module as one fx graph, and a function that trains through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors, aot_export_joint_with_descriptors
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from sylvester.compiler.errors import TraceError


@dataclass(frozen=True)
class Joint:
    """The graph takes (primals, tangents) and returns outputs, then gradients.

    `parameters`: placeholder -> name. `gradients`: name -> its place among the results. `tangents` are placeholders.
    """

    module: fx.GraphModule
    parameters: Mapping[fx.Node, str]
    gradients: Mapping[str, int]
    tangents: tuple[fx.Node, ...]

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def results(self) -> list[Any]:
        return pytree.tree_leaves(self.graph.output_node().args[0], is_leaf=lambda x: x is None)

    def backward(self) -> set[fx.Node]:
        """The nodes that need a gradient of the outputs."""
        found: set[fx.Node] = set(self.tangents)
        for node in self.graph.nodes:
            if found & set(node.all_input_nodes):
                found.add(node)
        return found


@dataclass(frozen=True)
class Trained:
    """A function of (tensors of the module by `names`, inputs) that differentiates by a joint graph."""

    names: tuple[str, ...]
    function: Callable[..., Any]

    def __call__(self, tensors: Mapping[str, Tensor], *inputs: Tensor) -> Any:
        return self.function(*(tensors[name] for name in self.names), *inputs)


def trained(module: nn.Module, inputs: tuple[Tensor, ...], change: Callable[[Joint], None]) -> Trained:
    """Traces a module at the sizes of the inputs; `change` rewrites the graph.

    `TraceError` when PyTorch cannot trace the backward pass.
    """
    with contextlib.ExitStack() as stack:
        try:
            traced = aot_export_joint_with_descriptors(stack, module, inputs)
        except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
            raise TraceError(
                f"PyTorch cannot trace the backward pass of this module: {str(error).splitlines()[0]}",
                hint="without joint=True, gradients are those of autograd, which needs no trace",
            ) from error
        joint = _described(traced.graph_module)
        change(joint)
        joint.graph.lint()
        joint.module.recompile()
        return Trained(_names(joint.graph), aot_compile_joint_with_descriptors(traced))


def _names(graph: fx.Graph) -> tuple[str, ...]:
    described = [n.meta["desc"] for n in graph.nodes if n.op == "placeholder"]
    return tuple(d.target for d in described if type(d).__name__ in ("ParamAOTInput", "BufferAOTInput"))


def _described(module: fx.GraphModule) -> Joint:
    inputs = [(n, n.meta["desc"]) for n in module.graph.nodes if n.op == "placeholder"]
    named = {n: d.target for n, d in inputs if type(d).__name__ == "ParamAOTInput"}
    tangents = tuple(n for n, d in inputs if type(d).__name__ == "TangentAOTInput")
    described = pytree.tree_leaves(module.graph.output_node().meta["desc"], is_leaf=lambda x: x is None)
    gradients = {
        d.grad_of.target: place
        for place, d in enumerate(described)
        if type(d).__name__ == "GradAOTOutput" and type(d.grad_of).__name__ == "ParamAOTInput"
    }
    return Joint(module, named, gradients, tangents)


def emit(graph: fx.Graph, target: Callable[..., Any], *args: Any, before: fx.Node) -> fx.Node:
    """Insert a call with its fake value."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    refresh(node)
    return node


def refresh(node: fx.Node) -> None:
    """The fake value of a call, from those of its operands."""
    fakes = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    mode = next(f.fake_mode for f in pytree.tree_leaves(fakes) if isinstance(f, FakeTensor))
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*fakes)  # type: ignore[operator]


def fact(node: fx.Node) -> Tensor:
    found = node.meta["val"]
    assert isinstance(found, Tensor)
    return found

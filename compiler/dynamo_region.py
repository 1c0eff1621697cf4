"""A graph of Dynamo as a module of its changing tensors: weights and numbers are held, sizes are read off tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import SymInt, Tensor, fx, nn

from sylvester.compiler.dynamo_fast_paths import WRITTEN_OUT
from sylvester.compiler.errors import Unsupported


class Region(nn.Module):
    """`forward(tensors)` computes the tensors that the graph computes, in order.

    `free`: the axes of each input that are symbols for Dynamo, and that the code takes for any size.
    """

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any], kinds: Sequence[str] = ()) -> None:
        super().__init__()
        self.places = graph.graph.find_nodes(op="placeholder")
        self.facts = [node.meta.get("example_value", x) for node, x in zip(self.places, examples, strict=True)]
        self.kinds = kinds or [_kind(node, x) for node, x in zip(self.places, examples, strict=True)]
        self.held = self._of("weight")
        self.moving = self._of("tensor")
        self.numbers = {i: float(examples[i]) for i in self._of("number")}
        self.free = {f"x{i}": {a for a, size in enumerate(self.facts[i].shape) if _is_free(size)} for i in self.moving}
        self.source, self.graph = graph, self._with_numbers(graph)
        self.returned = list(cast("Sequence[Any]", graph.graph.output_node().args[0]))
        self.sizes = self._sizes()
        self.computed = [i for i, node in enumerate(self.returned) if self._is_computed(node)]
        if not self.moving or not self.computed:
            raise Unsupported("it computes no tensor from tensors that change from call to call")
        for i in self.held:
            self.register_buffer(f"w{i}", examples[i].detach())

    def narrow(self) -> bool:
        """Takes sizes behind the first axis as they are, where that changes anything."""
        fewer = {name: axes & {0} for name, axes in self.free.items()}
        changed, self.free = fewer != self.free, fewer
        return changed

    def sizes_of(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Sizes that the code is compiled for."""
        shapes = {name: tensor.shape for name, tensor in self.tensors(args).items()}
        return tuple(n for name, shape in shapes.items() for a, n in enumerate(shape) if a not in self.free[name])

    def renewed(self, args: Sequence[Any]) -> Region:
        """The same with other weights."""
        region = Region(self.source, args, self.kinds)
        region.free = self.free
        return region

    def _of(self, kind: str) -> list[int]:
        return [i for i, found in enumerate(self.kinds) if found == kind]

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(self.moving, tensors, strict=True))
        args = [self._argument(i, given) for i in range(len(self.places))]
        results = self.graph(*args)
        return tuple(results[i] for i in self.computed)

    def tensors(self, args: Sequence[Any]) -> dict[str, Tensor]:
        return {f"x{i}": args[i] for i in self.moving}

    def versions(self, args: Sequence[Any]) -> list[object]:
        """Change when a weight or number does; tensors made in inference mode do not count their changes."""
        held = [args[i] for i in self.held]
        weights = [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in held]
        return [*weights, *(float(args[i]) for i in self.numbers)]

    def results(self, args: Sequence[Any], computed: Sequence[Tensor]) -> tuple[Any, ...]:
        """The outputs of the graph: tensors that were computed, and inputs and sizes that are handed on."""
        found = dict(zip(self.computed, computed, strict=True))
        return tuple(found[i] if i in found else self._handed_on(node, args) for i, node in enumerate(self.returned))

    def _argument(self, place: int, given: dict[int, Tensor]) -> Any:
        if place in self.held:
            return getattr(self, f"w{place}")
        if place in self.moving:
            return given[place]
        source = self.sizes.get(place)
        return self.numbers.get(place, 0) if source is None else given[source[0]].shape[source[1]]

    def _with_numbers(self, graph: fx.GraphModule) -> fx.GraphModule:
        """A copy that takes numbers, where the graph takes items of tensors, and has fast paths written out."""
        copied = fx.GraphModule(graph, fx.Graph())
        values: dict[fx.Node, Any] = {}
        output = copied.graph.graph_copy(graph.graph, values)
        copied.graph.output(output)
        for node in copied.graph.nodes:
            node.target = WRITTEN_OUT.get(node.target, node.target) if node.op == "call_function" else node.target
        for place in self.numbers:
            for user in list(values[self.places[place]].users):
                if user.target == "item":
                    user.replace_all_uses_with(values[self.places[place]])
                    copied.graph.erase_node(user)
                else:
                    raise Unsupported(f"the number {self.places[place].name!r} is used as a tensor", at=user)
        copied.recompile()
        return copied

    def _sizes(self) -> dict[int, tuple[int, int]]:
        """Where each integer that the graph computes with is the size of a tensor."""
        known: dict[Any, tuple[int, int]] = {}
        for i in self.moving:
            for axis, size in enumerate(self.facts[i].shape):
                if _is_free(size):
                    known.setdefault(size.node.expr, (i, axis))
        found = {}
        for i, node in enumerate(self.places):
            fact = self.facts[i]
            if isinstance(fact, Tensor) or all(user.op == "output" for user in node.users):
                continue
            if not (isinstance(fact, SymInt) and fact.node.expr in known):
                raise Unsupported(f"it computes with the number {node.name!r}, which is no size of a tensor", at=node)
            found[i] = known[fact.node.expr]
        return found

    def _is_computed(self, node: object) -> bool:
        return isinstance(node, fx.Node) and node.op != "placeholder" and isinstance(_fact(node), Tensor)

    def _handed_on(self, node: object, args: Sequence[Any]) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node.op == "placeholder":
            return args[self.places.index(node)]
        expression = _fact(node).node.expr
        values = {fact.node.expr: int(args[i]) for i, fact in enumerate(self.facts) if isinstance(fact, SymInt)}
        return int(expression.xreplace(values))


def _kind(node: fx.Node, example: object) -> str:
    """By the marks of Dynamo: "weight" (a parameter or buffer), "number" (of Python, as a tensor), "tensor", "size"."""
    argument = node.meta.get("grapharg")
    if argument is not None and argument.pass_arg_as_tensor:
        return "number"
    if not isinstance(example, Tensor):
        return "size"
    return "tensor" if getattr(example, "_dynamo_static_input_type", None) is None else "weight"


def _fact(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_free(size: object) -> bool:
    return isinstance(size, SymInt) and not torch.fx.experimental.symbolic_shapes.is_concrete_int(size)

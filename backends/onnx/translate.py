"""One entry of a program as an ONNX graph: every node by the translation of its op."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sylvester.backends.onnx.builder import TRANSLATIONS, Builder
from sylvester.backends.onnx.graph import CONTRIB, described
from sylvester.backends.onnx.low_bit import LINEARS
from sylvester.backends.onnx.names import past_name, present_name
from sylvester.backends.onnx.skips import branch_ends, write_branch
from sylvester.backends.signature import shape_text
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.program import Program, binding, value

dialect = torch.ops.sylvester
WIDENING = {dialect.widen_bf16.default, *(getattr(dialect, f"dequantize_w{bits}").default for bits in (8, 4, 3))}
VIEWS = {torch.ops.aten.reshape.default, torch.ops.aten.permute.default}
JOINED = {dialect.rope.default, dialect.kv_update.default, torch.ops.aten.linear.default, *LINEARS, *VIEWS}
UNWRITTEN = {operator.getitem, torch.ops.aten.sym_size.int}


def require_translations(program: Program) -> None:
    """`Unsupported` lists every op that has no ONNX form, with a node that calls it."""
    missing: dict[str, fx.Node] = {}
    for entry in program.entries.values():
        for node in entry.calls():
            sized = isinstance(value(node), int | torch.SymInt)
            if not sized and node.target not in TRANSLATIONS and node.target not in UNWRITTEN:
                missing.setdefault(str(node.target), node)
    if missing:
        raise Unsupported(
            f"no ONNX form for {', '.join(sorted(missing))}",
            at=next(iter(missing.values())),
            hint="use other ops or passes, or add a translation in backends/onnx",
        )


class Translator:
    """Writes the graph of an entry with its builder."""

    def __init__(self, builder: Builder) -> None:
        self.builder, self.entry, self.values = builder, builder.entry, builder.values
        self.outputs: list[ir.Value] = []
        self.branches: dict[fx.Node, set[fx.Node]] = {}

    def run(self) -> ir.Graph:
        """The graph of the entry, its inputs and outputs under the names that others use for them."""
        inputs = [self._input(node) for kind in ("input", "state") for node in self.entry.placeholders(kind)]
        self.branches = branch_ends(self.entry)
        inside = {node for nodes in self.branches.values() for node in nodes}
        self.write(node for node in self.entry.calls() if node not in inside or node in self.branches)
        outputs = [self._output(n) for n in range(len(self.entry.outputs))]
        builder = self.builder
        return ir.Graph(
            inputs, outputs, nodes=builder.nodes, name=builder.name,
            initializers=[*builder.weights.values(), *builder.constants.values()],
            opset_imports={"": builder.opset, CONTRIB: 1} if builder.contrib else {"": builder.opset},
        )  # fmt: skip

    def write(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node.target in WIDENING or (self.builder.contrib and _joins(node)):
                self.builder.later[node] = partial(self._written, node)
            elif node not in self.values and not isinstance(value(node), int | torch.SymInt):
                inside = self.branches.pop(node, None)
                self.values[node] = write_branch(self, node, inside) if inside else self._written(node)

    def _input(self, node: fx.Node) -> ir.Value:
        fact, bound = value(node), binding(node)
        name = past_name(bound.key) if bound.kind == "state" else bound.key
        made = described(ir.Value(name=name), fact.dtype, shape_text(fact.shape))
        self.values[node] = self.builder.inputs[node] = made
        return made

    def _written(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        before = self.builder.label, self.builder.reading
        self.builder.label, self.builder.reading = node.name, node
        args, kwargs = map_aggregate(node.args, self._argument), map_aggregate(dict(node.kwargs), self._argument)
        try:
            return TRANSLATIONS[node.target](self.builder, value(node), *args, **kwargs)
        except CompileError as error:
            if error.node:
                raise
            raise type(error)(error.message, at=node, hint=error.hint) from error
        finally:
            self.builder.label, self.builder.reading = before

    def _argument(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        return self.builder.operand(argument) if isinstance(value(argument), Tensor) else value(argument)

    def _output(self, number: int) -> ir.Value:
        """The result of an output has its name; what is an input, a weight or an output already is copied."""
        output, node = self.entry.outputs[number], self.entry.results()[number]
        made, name = (
            self.builder.operand(node).value,
            present_name(output.name) if output.kind == "state" else output.name,
        )
        if made.producer() is None or made in self.outputs:
            copy = ir.Node("", "Identity", [made], num_outputs=1, name=f"output/{number}")
            self.builder.nodes.append(copy)
            made = copy.outputs[0]
        made.name = name
        self.outputs.append(made)
        fact: Tensor = value(node)
        return described(made, fact.dtype, shape_text(fact.shape))


def _joins(node: fx.Node) -> bool:
    """Whether an op of onnxruntime may compute the node along with what reads it."""
    if node.target is not torch.ops.aten.add.Tensor:
        return node.target in JOINED
    facts = [value(n) for n in node.args if isinstance(n, fx.Node)]
    alike = len(facts) == 2 and all(_same(fact, value(node)) for fact in facts) and not node.kwargs
    return alike and any(user.target is dialect.rms_norm.default for user in node.users)


def _same(a: Tensor, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.dtype == b.dtype and shape_text(a.shape) == shape_text(b.shape)

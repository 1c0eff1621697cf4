"""Parts that tokens skip: an If runs them only where some token needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.codegen.branches import branches
from sylvester.compiler.program import Entry

if TYPE_CHECKING:
    from sylvester.backends.onnx.translate import Translator

dialect = torch.ops.sylvester


@translates(dialect.layers_to_skip.default)
def layers_to_skip(
    b: Builder, fact: Tensor, before: Operand, after: Operand, left: Operand | None, threshold: float, run: float
) -> ir.Value:
    dot, first, second = (
        b.call("ReduceSum", b.call("Mul", x.value, y.value), b.ints(-1), keepdims=0)
        for x, y in ((before, after), (before, before), (after, after))
    )
    bound = b.call("Mul", b.call("Sqrt", b.call("Mul", first, second)), b.number(threshold, fact.dtype))
    alike = b.cast(b.call("GreaterOrEqual", dot, bound), torch.bool, fact.dtype)
    found = b.call("Mul", alike, b.number(run, fact.dtype))
    if left is None:
        return found
    skips = b.call("Greater", left.value, b.number(0, fact.dtype))
    return b.call("Where", skips, b.call("Sub", left.value, b.number(1, fact.dtype)), found)


@translates(dialect.add_unless.default)
def add_unless(b: Builder, fact: Tensor, x: Operand, part: Operand, left: Operand) -> ir.Value:
    skips = b.call("Unsqueeze", b.call("Greater", left.value, b.number(0, left.dtype)), b.ints(-1))
    return b.call("Where", skips, x.value, b.call("Add", x.value, part.value))


@translates(dialect.update_unless.default)
def update_unless(b: Builder, fact: Tensor, cache: Operand, updated: Operand, left: Operand) -> ir.Value:
    skips = b.call("Greater", b.reshape(left.value, []), b.number(0, left.dtype))
    return b.call("Where", skips, cache.value, updated.value)


def branch_ends(entry: Entry) -> dict[fx.Node, set[fx.Node]]:
    """The sums that can be skipped, each with the nodes that only it needs; those that write caches are run always."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node, end in branches(entry).items():
        found.setdefault(end, set()).add(node)
    plain = {dialect.kv_update.default, dialect.update_unless.default}
    return {end: inside for end, inside in found.items() if not any(n.target in plain for n in inside)}


def write_branch(translator: Translator, end: fx.Node, inside: set[fx.Node]) -> ir.Value:
    """x where every token skips the part, else the sum, computed in a branch."""
    b = translator.builder
    x, left = (b.operand(end.args[n]) for n in (0, 2))  # type: ignore[arg-type]
    outside = {u for node in inside for u in node.all_input_nodes if u not in inside and u in b.later}
    for node in outside:
        b.value_of(node)
    least = b.call("ReduceMin", left.value, keepdims=0)
    runs = b.call("LessOrEqual", least, b.number(0, left.dtype))
    with b.branch() as nodes:
        translator.write(sorted(inside))
        total = b.value_of(end)
    run = ir.Graph([], [total], nodes=nodes, name=f"{end.name}.run")
    copy = ir.Node("", "Identity", [x.value], num_outputs=1, name=f"{end.name}.skip.copy")
    copy.outputs[0].name = f"{end.name}/skipped"
    skip = ir.Graph([], [copy.outputs[0]], nodes=[copy], name=f"{end.name}.skip")
    for node in inside:
        b.values.pop(node, None)
    return b.call("If", runs, then_branch=run, else_branch=skip)

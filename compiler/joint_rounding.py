"""Operands of products of a joint graph in 8 bits: Q(A) Q(B), each tensor rounded once wherever it is read."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from sylvester.compiler.joint_graph import Joint, emit, fact
from sylvester.compiler.joint_products import Product, peeled

aten, dialect = torch.ops.aten, torch.ops.sylvester
WHAT = {
    "forward": ("the input", "the weight"),
    "error": ("the gradient of the result", "the weight"),
    "gradient": ("the gradient of the result", "the input"),
}


def round_operands(graph: fx.Graph, products: Iterable[Product], format: str) -> None:
    """mm -> halo_mm of rounded operands; what the forward pass rounds is kept for the backward pass as it is."""
    made: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for product in products:
        node = product.node
        sides = []
        for side, what in zip((product.left, product.right), WHAT[product.kind], strict=True):
            base, turned = peeled(side)
            if base not in made:
                made[base] = _rounded(graph, base, format, f"{what} of {product.weight!r}")
            values, scale = made[base]
            sides.append((emit(graph, aten.t.default, values, before=node) if turned else values, scale))
        (a, left), (b, right) = sides
        scale = emit(graph, aten.mul.Tensor, left, right, before=node)
        new = emit(graph, dialect.halo_mm.default, a, b, scale, before=node)
        if fact(new).dtype != fact(node).dtype:
            new = emit(graph, aten.to.dtype, new, fact(node).dtype, before=node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def keep_rounded(joint: Joint) -> None:
    """Whatever is rounded without a gradient is rounded in the forward pass, so that it is kept in few bits."""
    behind = joint.backward()
    rounded = [n for n in joint.graph.nodes if n.target is dialect.halo_quantise.default and n not in behind]
    wanted = {part for node in rounded for part in (node, *node.users)}
    for node in reversed(joint.graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    first = next(n for n in joint.graph.nodes if n in behind and n.op != "placeholder")
    late = False
    for node in list(joint.graph.nodes):
        late |= node is first
        if node in wanted and node.op == "call_function":
            node.meta["partitioner_tag"] = "is_forward"
            if late:
                first.prepend(node)


def _rounded(graph: fx.Graph, x: fx.Node, format: str, what: str) -> tuple[fx.Node, fx.Node]:
    """Values and scale, right after x."""
    after = x.next
    while after.op == "placeholder":
        after = after.next
    both = emit(graph, dialect.halo_quantise.default, x, None, format, what, before=after)
    return emit(graph, operator.getitem, both, 0, before=after), emit(graph, operator.getitem, both, 1, before=after)

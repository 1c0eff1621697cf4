"""The products of linear layers in a joint graph: Y = X W^T, E_X = E_Y W and G = E_Y^T X, by the parameter W.

A weight may be stored as W or as W^T; after `find` every product reads W as [out, in] and every G is written as above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from sylvester.compiler.common_subexpressions import CommonValues
from sylvester.compiler.joint_graph import Joint, emit, fact

aten = torch.ops.aten
Kind = Literal["forward", "error", "gradient"]
SAME = (aten.detach.default, aten.alias.default)


@dataclass(frozen=True)
class Product:
    """left [rows, depth] times right [depth, columns]; `weight` is the name of its parameter."""

    kind: Kind
    weight: str
    node: fx.Node

    @property
    def left(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def right(self) -> fx.Node:
        return self.node.args[1]  # type: ignore[return-value]


def find(joint: Joint) -> list[Product]:
    """In the order of the graph; biases are added after their product from here on."""
    merge_repeats(joint.graph)
    _split_biases(joint.graph)
    backward = joint.backward()
    products = [p for node in _calls(joint.graph, aten.mm.default) if (p := _with_weight(joint, node, backward))]
    read = {p.left for p in products if p.kind == "forward"}
    for node in _calls(joint.graph, aten.mm.default):
        weight = _learned(joint, node) if node in backward else None
        if weight is not None and (ordered := _ordered(joint.graph, node, read)) is not None:
            products.append(Product("gradient", weight, ordered))
    drop_double_transposes(joint.graph)
    place = {node: n for n, node in enumerate(joint.graph.nodes)}
    return sorted(products, key=lambda p: place[p.node])


def merge_repeats(graph: fx.Graph) -> None:
    """Equal calls of equal operands are one."""
    values = CommonValues()
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        if (first := values.twin(node)) is not None:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _calls(graph: fx.Graph, target: object) -> Iterator[fx.Node]:
    return iter([n for n in graph.nodes if n.target is target])


def _split_biases(graph: fx.Graph) -> None:
    """addmm(b, x, w) -> mm(x, w) + b."""
    for node in _calls(graph, aten.addmm.default):
        if node.kwargs:
            continue
        bias, left, right = node.args
        product = emit(graph, aten.mm.default, left, right, before=node)
        node.replace_all_uses_with(emit(graph, aten.add.Tensor, product, bias, before=node))
        graph.erase_node(node)


def _with_weight(joint: Joint, node: fx.Node, backward: set[fx.Node]) -> Product | None:
    """x W^T, or in the backward pass E_Y W."""
    base, _ = peeled(node.args[1])  # type: ignore[arg-type]
    weight = joint.parameters.get(base)
    if weight is None or peeled(node.args[0])[0] in joint.parameters:  # type: ignore[arg-type]
        return None
    return Product("error" if node in backward else "forward", weight, node)


def _learned(joint: Joint, node: fx.Node) -> str | None:
    """The parameter that a node is a part of the gradient of."""
    places = {n: name for name, place in joint.gradients.items() if isinstance(n := joint.results[place], fx.Node)}
    while node not in places:
        users = [u for u in node.users if u.target in (aten.t.default, aten.add.Tensor, *SAME)]
        if len(node.users) != 1 or not users:
            return None
        node = users[0]
    return places[node]


def _ordered(graph: fx.Graph, node: fx.Node, read: set[fx.Node]) -> fx.Node | None:
    """E_Y^T X; X^T E_Y is made its transpose. `read`: the rows that products read forward."""
    (left, turned), (right, other) = peeled(node.args[0]), peeled(node.args[1])  # type: ignore[arg-type]
    if turned and not other and right in read:
        return node
    if not turned or other or left not in read:
        return None
    errors = emit(graph, aten.t.default, right, before=node)
    product = emit(graph, aten.mm.default, errors, left, before=node)
    node.replace_all_uses_with(emit(graph, aten.t.default, product, before=node))
    graph.erase_node(node)
    return product


def peeled(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a node is a view of, and whether transposed."""
    turned = False
    while node.target in (aten.t.default, *SAME):
        turned ^= node.target is aten.t.default
        node = node.args[0]  # type: ignore[assignment]
    return node, turned


def drop_double_transposes(graph: fx.Graph) -> None:
    for node in _calls(graph, aten.t.default):
        inner = node.args[0]
        if isinstance(inner, fx.Node) and inner.target is aten.t.default:
            node.replace_all_uses_with(inner.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
    graph.eliminate_dead_code()


def transposed(graph: fx.Graph, x: fx.Node, before: fx.Node) -> fx.Node:
    """x^T; of a transpose, what it is made from."""
    if x.target is aten.t.default:
        return x.args[0]  # type: ignore[return-value]
    assert fact(x).dim() == 2
    return emit(graph, aten.t.default, x, before=before)

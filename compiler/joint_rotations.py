"""Hadamard rotations around the products of a joint graph: placed in exact pairs, then moved and cancelled.

left (H A) B undone by H^T on the rows, right A (B R) undone by R^T on the columns, middle (A R) (R^T B) undoes itself
(HALO, Ashkboos et al., 2025).
"""

from __future__ import annotations

import torch
from torch import fx

from sylvester.compiler.hadamard import largest_block
from sylvester.compiler.halo_rotate import padded
from sylvester.compiler.joint_graph import emit, fact, refresh
from sylvester.compiler.joint_products import Product, drop_double_transposes, transposed

aten = torch.ops.aten
HADAMARD = torch.ops.sylvester.hadamard.default
LINEAR = (HADAMARD, aten.view.default, aten._unsafe_view.default, aten.t.default, aten.slice.Tensor)
"""Steps with f(x) + f(y) = f(x + y)."""


def features(graph: fx.Graph, product: Product) -> None:
    """R over the features of X and W: in the middle of F, on the right of E and G, whose results are turned back."""
    node = product.node
    if product.kind == "forward":
        node.update_arg(0, turned(graph, product.left, node))
    right = product.right
    if product.kind == "gradient":
        node.update_arg(1, turned(graph, right, node))
    else:
        node.update_arg(1, _weight(graph, right, product.kind == "forward", node))
    if product.kind != "forward":
        _undo(graph, node)


def _weight(graph: fx.Graph, right: fx.Node, forward: bool, before: fx.Node) -> fx.Node:
    """W R for E, (W R)^T for F."""
    weight = turned(graph, transposed(graph, right, before) if forward else right, before)
    return transposed(graph, weight, before) if forward else weight


def error_tokens(graph: fx.Graph, product: Product) -> None:
    """H over the tokens of E_Y, on the left of E, undone on its rows."""
    node, tokens = product.node, fact(product.left).shape[0]
    users, after = list(node.users), node.next
    node.update_arg(0, transposed(graph, over_tokens(graph, product.left, node), node))
    refresh(node)
    back = turned(graph, transposed(graph, node, after), after, undo=True)
    back = transposed(graph, emit(graph, aten.slice.Tensor, back, 1, 0, tokens, before=after), after)
    for user in users:
        user.replace_input_with(node, back)


def gradient_tokens(graph: fx.Graph, product: Product) -> None:
    """H over tokens in the middle of G: E_Y^T H^T (H X)."""
    node = product.node
    errors = transposed(graph, product.left, node)
    node.update_arg(0, over_tokens(graph, errors, node))
    node.update_arg(1, transposed(graph, over_tokens(graph, product.right, node), node))


def over_tokens(graph: fx.Graph, x: fx.Node, before: fx.Node) -> fx.Node:
    """(H x)^T [features, padded tokens] of x [tokens, features]; rows of zeros make the next order of a matrix."""
    columns, tokens = transposed(graph, x, before), int(fact(x).shape[0])
    if more := padded(tokens) - tokens:
        columns = emit(graph, aten.constant_pad_nd.default, columns, [0, more], before=before)
    return emit(graph, HADAMARD, columns, padded(tokens), False, before=before)


def turned(graph: fx.Graph, x: fx.Node, before: fx.Node, undo: bool = False) -> fx.Node:
    return emit(graph, HADAMARD, x, largest_block(int(fact(x).shape[-1])), undo, before=before)


def _undo(graph: fx.Graph, node: fx.Node) -> None:
    users = list(node.users)
    back = turned(graph, node, node.next, undo=True)
    for user in users:
        user.replace_input_with(node, back)


def cancel(graph: fx.Graph) -> int:
    """Drop rotations that undo each other and join those of sums; returns how many rotations went."""
    before = count(graph)
    while any(_dropped(graph, node) for node in rotations(graph)) or any(
        _joined(graph, node) for node in graph.nodes if node.target is aten.add.Tensor
    ):
        pass
    drop_double_transposes(graph)
    return before - count(graph)


def rotations(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.target is HADAMARD]


def count(graph: fx.Graph) -> int:
    return len(rotations(graph))


def _dropped(graph: fx.Graph, node: fx.Node) -> bool:
    """x R R^T -> x."""
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    if inner.target is not HADAMARD or inner.args[1:] != (node.args[1], not node.args[2]):
        return False
    _replace(graph, node, inner.args[0])  # type: ignore[arg-type]
    return True


def _joined(graph: fx.Graph, total: fx.Node) -> bool:
    """f(x) + f(y) -> f(x + y) for a step f that is linear, where rotations lie below."""
    first, second = total.args
    if not (_single(first) and _single(second)) or first is second or total.kwargs:
        return False
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    same = first.target is second.target and first.args[1:] == second.args[1:]
    inner = first.args[0], second.args[0]
    if not same or not (_turns(first) and _turns(second)) or fact(inner[0]).shape != fact(inner[1]).shape:  # type: ignore[arg-type]
        return False
    plain = emit(graph, aten.add.Tensor, *inner, before=total)
    _replace(graph, total, emit(graph, first.target, plain, *first.args[1:], before=total))  # type: ignore[arg-type]
    return True


def _single(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target in LINEAR and len(node.users) == 1


def _turns(node: object) -> bool:
    """Whether a chain of linear steps holds a rotation."""
    while isinstance(node, fx.Node) and node.target in LINEAR:
        if node.target is HADAMARD:
            return True
        node = node.args[0]
    return False


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    graph.eliminate_dead_code()

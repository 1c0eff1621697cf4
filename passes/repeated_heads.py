"""Keys and values before their heads were repeated for the groups of query heads."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from sylvester.compiler import ops
from sylvester.compiler.calls import same_size, same_sizes
from sylvester.compiler.forms import arguments, form
from sylvester.compiler.program import value
from sylvester.passes.attention_scores import RESHAPES

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
TOKENS_FIRST = [-4, -2, -3, -1]
"""Axes of [batch, heads, tokens, features] in [batch, tokens, heads, features]."""


def unrepeated(emit: Emit, node: fx.Node) -> fx.Node:
    """`node` [batch, heads, tokens, features] with each head once; itself when none was repeated.

    Heads may be repeated before or after they move in front of the tokens, and before they are rotated.
    """
    if node.target is ops.rope.target:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        plain = unrepeated(emit, source)
        return node if plain is source else emit(node.target, plain, *node.args[1:])
    target, args = form(node)
    if target is aten.permute.default and args[1] == TOKENS_FIRST:
        once = _once(emit, args[0], -2)
        return node if once is None else emit(aten.permute.default, once, [0, 2, 1, 3])
    return _once(emit, node, -3) or node


def _once(emit: Emit, node: fx.Node, axis: int) -> fx.Node | None:
    """[..., heads, ...] for the same with every head n times, one after the other, along `axis`."""
    if node.target is aten.repeat_interleave.self_int and arguments(node)[2] == axis:
        return node.args[0]  # type: ignore[return-value]
    if node.target not in RESHAPES:
        return None
    expanded = _below(node.args[0], RESHAPES)
    if expanded.target is not aten.expand.default:
        return None
    grouped = _below(expanded.args[0])
    if not _repeats(grouped, expanded, node, axis):
        return None
    if grouped.target is aten.unsqueeze.default and form(grouped)[1][1] == axis:
        return _below(grouped.args[0])
    return emit(aten.squeeze.dim, grouped, axis)


def _below(x: Any, targets: Container[Any] = ()) -> fx.Node:
    """Past slices that keep everything, and ops of `targets`."""
    node: fx.Node = x
    while node.target in targets or (
        node.target is aten.slice.Tensor and value(node).shape == value(node.args[0]).shape  # type: ignore[arg-type]
    ):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _repeats(grouped: fx.Node, expanded: fx.Node, result: fx.Node, axis: int) -> bool:
    """[..., h, 1, ...] -> [..., h, n, ...] -> [..., h n, ...] with `axis` the one of n, and then of h n."""
    start, wide, end = (list(value(x).shape) for x in (grouped, expanded, result))
    if len(start) != 5 or len(wide) != 5 or len(end) != 4:
        return False
    one, groups, heads = start.pop(axis), wide.pop(axis), end[axis]
    merged = [*wide[:axis], wide[axis] * groups, *wide[axis + 1 :]]
    return (
        same_size(one, 1)
        and same_size(merged[axis], heads)
        and same_sizes(tuple(start), tuple(wide))
        and (same_sizes(tuple(merged), tuple(end)))
    )

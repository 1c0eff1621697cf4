"""One spelling per op call: the canonical target and its full positional arguments, for matching and walking graphs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

VIEWS = {aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int}
RESPELLED: dict[Any, Any] = dict.fromkeys(VIEWS, aten.reshape.default) | {
    aten.transpose.int: aten.permute.default,
    aten.t.default: aten.permute.default,
    aten.square.default: aten.pow.Tensor_Scalar,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
}
COMMUTATIVE = {
    aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.logical_and.default,
}  # fmt: skip
DIMENSIONS = {"dim", "dims", "dim0", "dim1"}
LAYOUT = {"memory_format", "layout", "device", "pin_memory", "non_blocking", "copy"}
SIZES = {"size", "shape", "repeats", "normalized_shape"}
END = sys.maxsize

Form = tuple[Any, tuple[Any, ...]]


def target_of(node: fx.Node) -> Any:
    """The canonical target: views are reshape, transposes permute, squares pow."""
    return RESPELLED.get(node.target, node.target)


def form(node: fx.Node) -> Form:
    """Canonical (target, arguments); dimensions count from the end, sizes and layout are None."""
    target, args = node.target, arguments(node)
    if target in VIEWS:
        args = (args[0], None)
    elif target is aten.transpose.int:
        args = (args[0], _swapped(node, args[1], args[2]))
    elif target is aten.t.default:
        args = (args[0], [-1, -2])
    elif target is aten.square.default:
        args = (args[0], 2)
    elif target is aten.slice.Tensor:
        args = _bounds(node, args)
    return target_of(node), args


class Forms:
    """Forms of the nodes of a graph, kept as long as a node's arguments stay the same."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, tuple[object, object, Form]] = {}

    def __getitem__(self, node: fx.Node) -> Form:
        known = self.known.get(node)
        if known is None or known[0] is not node.args or known[1] is not node.kwargs:
            known = self.known[node] = (node.args, node.kwargs, form(node))
        return known[2]


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments with keywords and defaults filled in, dimensions negative, sizes and layout None."""
    parameters = _schema(node.target)
    if not parameters:
        return (*node.args, *node.kwargs.values())
    given = list(node.args) + [node.kwargs.get(name, default) for name, default in parameters[len(node.args) :]]
    return tuple(_normal(node, name, x) for (name, _), x in zip(parameters, given, strict=True))


def _normal(node: fx.Node, name: str, x: Any) -> Any:
    if name in LAYOUT or (name in SIZES and node.target is not aten.repeat.default):
        return None
    if name in DIMENSIONS and x is not None:
        rank = _rank(node)
        return [_from_end(n, rank) for n in x] if isinstance(x, (list, tuple)) else _from_end(x, rank)
    return x


def _rank(node: fx.Node) -> int:
    """The number of axes that the dimension arguments of a call count."""
    first = node.args[0] if node.args else None
    insertion = node.target in (aten.unsqueeze.default, aten.stack.default)
    source = first if isinstance(first, fx.Node) and not insertion else node
    val = source.meta.get("val")
    return val.dim() if isinstance(val, Tensor) else 0


def _bounds(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Slice arguments with start >= 0 and the end as `END` where it reaches the end."""
    x, dim, start, end, step = args
    size = x.meta["val"].shape[dim]
    start, end = 0 if start is None else start, END if end is None else end
    if isinstance(size, int):
        start = start + size if isinstance(start, int) and start < 0 else start
        end = end + size if isinstance(end, int) and end < 0 else end
        end = END if isinstance(end, int) and end >= size else end
    return x, dim, start, end, step


def _from_end(dim: Any, rank: int) -> Any:
    return dim - rank if isinstance(dim, int) and rank and dim >= 0 else dim


def _swapped(node: fx.Node, first: int, second: int) -> list[int]:
    dims = list(range(-_rank(node), 0))
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@functools.cache
def _schema(target: Callable[..., Any]) -> tuple[tuple[str, Any], ...]:
    """(name, default) of each parameter; empty for Python functions such as getitem."""
    schema = getattr(target, "_schema", None)
    return tuple((a.name, a.default_value) for a in schema.arguments) if schema else ()

"""Whether an entry also holds for a size of 1, which torch.export never sees: no view may read past such an axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sylvester.compiler.program import Entry, value

aten = torch.ops.aten
POSITIONED = (
    aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.unfold.default, aten.diagonal.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
)  # fmt: skip
"""Ops whose arguments name places along an axis: x[:, :2] has 2 columns only where x has."""


def holds_at(entry: Entry, sizes: Mapping[Any, int]) -> bool:
    """Whether every view by position keeps its shape when the symbols have these sizes."""
    return all(_keeps_shape(node, sizes) for node in entry.calls(*POSITIONED))


def _keeps_shape(node: fx.Node, sizes: Mapping[Any, int]) -> bool:
    if any(n < 0 for shape in _shapes(value(node), sizes) for n in shape):
        return False
    try:
        args: Any = map_aggregate(node.args, lambda x: _concrete(x, sizes))
        kwargs: Any = map_aggregate(dict(node.kwargs), lambda x: _concrete(x, sizes))
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    except (IndexError, RuntimeError, ValueError):
        return False
    return _shapes(found, {}) == _shapes(value(node), sizes)


def _concrete(argument: Any, sizes: Mapping[Any, int]) -> Any:
    fact = value(argument) if isinstance(argument, fx.Node) else argument
    if isinstance(fact, Tensor):
        return torch.empty(_shapes(fact, sizes)[0], dtype=fact.dtype, device="meta")
    return _number(fact, sizes) if isinstance(fact, torch.SymInt) else fact


def _shapes(fact: Any, sizes: Mapping[Any, int]) -> list[tuple[int, ...]]:
    tensors = [fact] if isinstance(fact, Tensor) else fact
    return [tuple(_number(n, sizes) for n in tensor.shape) for tensor in tensors]


def _number(n: int | torch.SymInt, sizes: Mapping[Any, int]) -> int:
    return int(n.node.expr.xreplace(dict(sizes))) if isinstance(n, torch.SymInt) else int(n)

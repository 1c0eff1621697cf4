"""Rules: part of split, chunk, unbind -> slice, select; stack -> cat; slices of slices -> one; known size -> number."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from sylvester.compiler.calls import Call, Result, Rule, arguments, known, same_fact
from sylvester.compiler.program import value

aten = torch.ops.aten
END = 2**63 - 1
PARTED = (aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)


def slice_(node: fx.Node) -> Result:
    """Non-negative axis and bounds; a slice of everything is nothing; slices of one axis are one."""
    source = cast(fx.Node, node.args[0])
    if same_fact(source, node):
        return source
    a = arguments(node)
    dim, size = a["dim"] % value(source).dim(), value(source).shape[a["dim"]]
    start, end = (_bound(b, size) for b in (a["start"] or 0, a["end"]))
    inner = arguments(source) if source.target is aten.slice.Tensor else {"dim": None}
    bounds = (start, end, inner.get("start") or 0, inner.get("end"))
    if inner["dim"] == dim and a["step"] == inner["step"] == 1 and all(isinstance(b, int) and b >= 0 for b in bounds):
        start, end = bounds[2] + start, min(bounds[2] + end, bounds[3])
        source = cast(fx.Node, source.args[0])
    return Call(aten.slice.Tensor, (source, dim, start, end, *([a["step"]] if a["step"] != 1 else [])))


def _bound(bound: Any, size: int | torch.SymInt) -> Any:
    """A slice bound counted from the start; the end of the axis is END."""
    if bound is None or (isinstance(bound, int) and isinstance(size, int) and bound >= size):
        return END
    return max(bound + size, 0) if isinstance(bound, int) and bound < 0 and isinstance(size, int) else bound


def select(node: fx.Node) -> Result:
    """Non-negative axis and index; a select of a permuted value selects first."""
    source, dim, index = cast("tuple[fx.Node, int, Any]", node.args)
    dim %= value(source).dim()
    size = value(source).shape[dim]
    if isinstance(index, int) and isinstance(size, int):
        index %= size
    if source.target is not aten.permute.default:
        return Call(aten.select.int, (source, dim, index))
    axes = cast("list[int]", source.args[1])
    rest = [a - (a > axes[dim]) for a in axes if a != axes[dim]]
    return Call(aten.permute.default, (Call(aten.select.int, (source.args[0], axes[dim], index)), rest))


def part(node: fx.Node) -> Result:
    """One part of unbind, chunk or split is a select or a slice."""
    whole, index = cast("tuple[fx.Node, int]", node.args)
    if whole.target not in PARTED:
        return None
    dim = arguments(whole)["dim"] % value(cast(fx.Node, whole.args[0])).dim()
    if whole.target is aten.unbind.int:
        return Call(aten.select.int, (whole.args[0], dim, index))
    length = whole.args[1]
    if whole.target is aten.split.Tensor and isinstance(length, int):
        return Call(aten.slice.Tensor, (whole.args[0], dim, index * length, (index + 1) * length))
    sizes = [p.shape[dim] for p in value(whole)[: index + 1]]
    if not all(isinstance(s, int) for s in sizes):
        return None
    return Call(aten.slice.Tensor, (whole.args[0], dim, sum(sizes[:-1]), sum(sizes)))


def stack(node: fx.Node) -> Result:
    """stack is cat along a new axis."""
    dim = arguments(node)["dim"] % value(node).dim()
    parts = [Call(aten.unsqueeze.default, (x, dim)) for x in cast("Sequence[fx.Node]", node.args[0])]
    return Call(aten.cat.default, (parts, dim))


def cat(node: fx.Node) -> Result:
    """Non-negative axis; cat of one value is that value."""
    parts = cast("Sequence[fx.Node]", node.args[0])
    if len(parts) == 1:
        return parts[0]
    return Call(aten.cat.default, (parts, arguments(node)["dim"] % value(node).dim()))


def size(node: fx.Node) -> Result:
    """A size that is a number at compile time is that number."""
    number = known(value(node))
    return None if isinstance(number, torch.SymInt) else number


RULES: dict[Any, tuple[Rule, ...]] = {
    operator.getitem: (part,),
    aten.slice.Tensor: (slice_,),
    aten.select.int: (select,),
    aten.stack.default: (stack,),
    aten.cat.default: (cat,),
    aten.concat.default: (cat,),
    aten.concatenate.default: (cat,),
    aten.sym_size.int: (size,),
}

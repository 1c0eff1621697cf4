"""Rules: any view -> reshape, any axis swap -> permute; chains of them -> one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import Call, Result, Rule, same_fact, same_size, size_of
from sylvester.compiler.program import value

aten = torch.ops.aten
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view_as.default, aten.reshape_as.default,
    aten._reshape_alias.default,
)  # fmt: skip
SIZED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
TRANSPOSES = (
    aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default,
    aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist,
)  # fmt: skip


def as_reshape(node: fx.Node) -> Result:
    """Any view is a reshape of the value below the views, sizes written in one way."""
    source = cast(fx.Node, node.args[0])
    if same_fact(source, node):
        return source
    base = source.args[0] if source.target in (aten.reshape.default, aten.unsqueeze.default) else source
    given = node.args[1] if node.target in SIZED else [-1] * value(node).dim()
    sizes = _sizes(cast(fx.Node, base), value(node), cast("Sequence[Any]", given))
    return None if sizes is None else Call(aten.reshape.default, (base, sizes))


def _sizes(source: fx.Node, result: Tensor, given: Sequence[Any]) -> list[Any] | None:
    """Numbers where known, -1 for the last unknown size, for the others what was given or a size of `source`.

    Beside a size of 0, -1 could be anything.
    """
    sizes: list[Any] = list(result.shape)
    unknown = [i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    for i in unknown:
        sizes[i] = given[i] if isinstance(given[i], fx.Node) else _found(source, result.shape[i])
    missing = [i for i in unknown if sizes[i] is None]
    empty = 0 in sizes
    if len(missing) > (0 if empty else 1):
        return None
    if unknown and not empty:
        sizes[missing[0] if missing else unknown[-1]] = -1
    return sizes


def _found(source: fx.Node, size: torch.SymInt | int) -> Call | int | None:
    dims = [d for d, other in enumerate(value(source).shape) if same_size(size, other)]
    return size_of(source, dims[0]) if dims else None


def as_permute(node: fx.Node) -> Result:
    """transpose, t, mT, movedim, ... are permutes: torch moves the axis numbers for us."""
    source = cast(fx.Node, node.args[0])
    rank = value(source).dim()
    axes = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = cast(Callable[..., Tensor], node.target)(axes, *node.args[1:])
    return Call(aten.permute.default, (source, [size - 2 for size in moved.shape]))


def permute(node: fx.Node) -> Result:
    """Non-negative axes; permute of permute is one; the identity is nothing."""
    source, axes = cast(fx.Node, node.args[0]), cast("list[int]", node.args[1])
    axes = [a % len(axes) for a in axes]
    if axes == list(range(len(axes))):
        return source
    if source.target is aten.permute.default:
        inner = cast("list[int]", source.args[1])
        return Call(aten.permute.default, (source.args[0], [inner[a] for a in axes]))
    return Call(aten.permute.default, (source, axes))


def drop_moved_unit_axis(node: fx.Node) -> Result:
    """reshape(permute(unsqueeze(x))) that takes the new axis out again -> permute(x)."""
    moved = cast(fx.Node, node.args[0])
    added = moved.args[0] if moved.target is aten.permute.default else None
    if not isinstance(added, fx.Node) or added.target is not aten.unsqueeze.default:
        return None
    axes, (source, new) = cast("list[int]", moved.args[1]), cast("tuple[fx.Node, int]", added.args)
    kept = [a - (a > new) for a in axes if a != new]
    sizes = value(source).shape
    expected = [sizes[a] for a in kept]
    if len(expected) != value(node).dim() or not all(map(same_size, expected, value(node).shape)):
        return None
    return Call(aten.permute.default, (source, kept))


def expand(node: fx.Node) -> Result:
    """-1 where the size stays; expand of expand is one; the identity is nothing."""
    source = cast(fx.Node, node.args[0])
    if same_fact(source, node):
        return source
    after, inner = value(node).shape, source
    given = node.args[1] if node.target is not aten.expand_as.default else _sizes_of(cast(fx.Node, node.args[1]))
    if source.target is aten.expand.default:
        source = cast(fx.Node, source.args[0])
        kept = len(after) - value(inner).dim()
        given = [size_of(inner, i - kept) if g == -1 else g for i, g in enumerate(cast("Sequence[Any]", given))]
    before = value(source).shape
    lead = len(after) - len(before)
    sizes = [after[i] if isinstance(after[i], int) else g for i, g in enumerate(cast("Sequence[Any]", given))]
    for i, size in enumerate(before):
        if same_size(size, after[lead + i]):
            sizes[lead + i] = -1
    return Call(aten.expand.default, (source, sizes))


def _sizes_of(node: fx.Node) -> list[Any]:
    return [size_of(node, d) for d in range(value(node).dim())]


def unsqueeze(node: fx.Node) -> Result:
    """Non-negative axis."""
    source, dim = cast("tuple[fx.Node, int]", node.args)
    return Call(aten.unsqueeze.default, (source, dim % value(node).dim()))


def repeat(node: fx.Node) -> Result:
    """repeat by ones keeps the value."""
    source = cast(fx.Node, node.args[0])
    return source if same_fact(source, node) else None


RULES: dict[Any, tuple[Rule, ...]] = {
    **{target: (as_reshape,) for target in RESHAPES},
    **{target: (as_permute,) for target in TRANSPOSES},
    aten.reshape.default: (drop_moved_unit_axis, as_reshape),
    aten.permute.default: (permute,),
    aten.expand.default: (expand,),
    aten.expand_as.default: (expand,),
    aten.broadcast_to.default: (expand,),
    aten.unsqueeze.default: (unsqueeze,),
    aten.repeat.default: (repeat,),
}

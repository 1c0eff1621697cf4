"""Does an op treat every token by itself? Rules per op on the axis whose size is the token length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sylvester.compiler import ops
from sylvester.compiler.changes import Refusal
from sylvester.compiler.positions import has, token_axes
from sylvester.compiler.program import value
from sylvester.compiler.quantized_ops import LINEARS

aten = torch.ops.aten

POINTWISE = {ops.swiglu.target, ops.geglu.target, aten.to.dtype, aten._to_copy.default, aten.clone.default}
LAST_AXIS = {*LINEARS, ops.rms_norm.target, ops.hadamard.target}
TRACKED = {aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default}
"""Moves of whole axes: the symbol itself says where the token axis went."""
LOOK_UPS = {aten.embedding.default, aten.index_select.default, aten.index.Tensor}
ALONG = {
    aten.slice.Tensor: 0, aten.select.int: 0, aten.cat.default: 0, aten.unbind.int: 0, aten.split.Tensor: 0,
    aten.split_with_sizes.default: 0, aten.chunk.default: 0, aten.softmax.int: None, aten._softmax.default: None,
    aten.log_softmax.int: None, aten.cumsum.default: None, aten.sum.dim_IntList: None, aten.mean.dim: None,
    aten.amax.default: None, aten.amin.default: None, aten.repeat_interleave.self_int: None,
}  # fmt: skip
"""Ops with an axis argument (the default where there is one), which must not be the token axis."""
DIMENSION_AT = {
    aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.repeat_interleave.self_int: 2,
}  # fmt: skip
MATMULS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
SHAPED = {aten.reshape.default, aten.expand.default, aten.full.default, aten.arange.default, aten.slice.Tensor}
"""Ops whose size operands are shapes; anywhere else the token length would enter the arithmetic."""


def mixes(node: fx.Node, symbol: sympy.Symbol) -> Refusal | None:
    """Why a call may combine values of different tokens; None when it treats each token by itself."""
    if any(has(n.meta.get("val"), symbol) for n in node.all_input_nodes):
        shaped = node.target in SHAPED and any(token_axes(fact, symbol) for fact in _tensors(node))
        if not shaped:
            return Refusal("an op computes with the number of tokens", node)
    operands = [n for n in node.all_input_nodes if token_axes(value(n), symbol)]
    if not operands:
        return None
    axes = [token_axes(fact, symbol) for fact in _tensors(node)]
    if any(len(a) != 1 for a in axes) or any(len(token_axes(value(n), symbol)) != 1 for n in operands):
        return Refusal("an op pairs tokens or reduces over them", node)
    rule = _rule(node)
    if rule is None:
        return Refusal(f"it is not known whether {node.target} mixes tokens", node)
    return None if rule(node, symbol, operands, axes[0][0]) else Refusal("an op mixes tokens", node)


def _tensors(node: fx.Node) -> Iterable[Tensor]:
    fact = value(node)
    return fact if isinstance(fact, tuple | list) else [fact]


Rule = Callable[[fx.Node, sympy.Symbol, "list[fx.Node]", int], bool]


def _rule(node: fx.Node) -> Rule | None:
    target: Any = node.target
    if target in POINTWISE or torch.Tag.pointwise in getattr(target, "tags", ()):
        return _aligned
    for targets, rule in TABLE:
        if target in targets:
            return rule
    return None


def _axis(node: fx.Node, symbol: sympy.Symbol) -> int:
    return token_axes(value(node), symbol)[0]


def _from_end(node: fx.Node, symbol: sympy.Symbol) -> int:
    return int(value(node).ndim) - _axis(node, symbol)


def _aligned(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """Broadcasting pairs the token axes with each other."""
    return all(_from_end(n, symbol) == value(node).ndim - axis for n in operands)


def _before_last(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """The op works along the last axis of its first operand, and only that carries tokens."""
    return operands == [node.args[0]] and _from_end(operands[0], symbol) > 1


def _normalized(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    shape: Any = node.args[1]
    return operands == [node.args[0]] and _from_end(operands[0], symbol) > len(shape)


def _moved(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    return len(operands) == 1


def _looked_up(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """Tokens index a table that does not depend on them, or something else indexes another axis than theirs."""
    if len(operands) != 1 or operands[0] is not node.args[0]:
        return len(operands) == 1
    return _axis(operands[0], symbol) not in indexed_axes(node)


def indexed_axes(node: fx.Node) -> list[int]:
    """The axes of its table that a look-up counts along."""
    table, given = node.args[:2]
    if node.target is aten.index.Tensor:
        return [axis for axis, index in enumerate(cast("list[Any]", given)) if index is not None]
    return [cast(int, given) % value(cast(fx.Node, table)).ndim] if node.target is aten.index_select.default else [0]


def _other_axis(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """The axis argument is not the token axis, which is the same for all operands."""
    target: Any = node.target
    given = node.args[DIMENSION_AT.get(target, 1) :]
    dims: Any = given[0] if given else node.kwargs.get("dim", ALONG[target])
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if None in dims or not _stacked(node, symbol, operands, axis):
        return False
    return all(d % value(operands[0]).ndim != _axis(operands[0], symbol) for d in dims)


def _stacked(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    return len({(_axis(n, symbol), value(n).ndim) for n in operands}) == 1


def _kept(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """A reshape keeps tokens whole when as many elements follow the token axis as before."""
    before: Any = value(operands[0]).shape[_axis(operands[0], symbol) + 1 :]
    after: Any = value(node).shape[axis + 1 :]
    return statically_known_true(_product(before) == _product(after))


def _product(shape: Iterable[Any]) -> Any:
    result: Any = 1
    for n in shape:
        result = result * n
    return result


def _not_contracted(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """Tokens are rows of the first or columns of the second factor, or a batch axis of both."""
    left = node.args[0]
    if len(operands) == 2:
        batched = all(_from_end(n, symbol) > 2 for n in operands)
        return batched and _aligned(node, symbol, operands, axis)
    return _from_end(operands[0], symbol) != (1 if operands[0] is left else 2)


def _rows(node: fx.Node, symbol: sympy.Symbol, operands: list[fx.Node], axis: int) -> bool:
    """rope: x and its tables carry tokens on the axis before the last."""
    return all(_from_end(n, symbol) == 2 for n in operands)


TABLE: tuple[tuple[Iterable[Any], Rule], ...] = (
    (LAST_AXIS, _before_last),
    ((aten.layer_norm.default,), _normalized),
    (TRACKED, _moved),
    (LOOK_UPS, _looked_up),
    (ALONG, _other_axis),
    ((aten.stack.default,), _stacked),
    ((aten.reshape.default,), _kept),
    (MATMULS, _not_contracted),
    ((ops.rope.target,), _rows),
)

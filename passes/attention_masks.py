"""Masks of an attention: taken apart where they are sums or intersections, and joined to one operand."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import fx

from sylvester.compiler.calls import tensor
from sylvester.compiler.masks import HIDDEN
from sylvester.compiler.program import Entry, value
from sylvester.passes.attention_scores import FILLS, WHERES, constant, hiding

aten = torch.ops.aten
CONJUNCTIONS = {aten.bitwise_and.Tensor, aten.logical_and.default}


def split_mask(entry: Entry, mask: fx.Node) -> list[fx.Node]:
    """The masks that a mask is made of: terms of a sum, bools that are all true, a bias and what hides it."""
    if mask.target is aten.add.Tensor and not mask.kwargs and value(mask).is_floating_point():
        return mask.all_input_nodes if all(_is_mask(n) for n in mask.args) else []
    if mask.target in CONJUNCTIONS and value(mask).dtype == torch.bool:
        return mask.all_input_nodes
    if mask.target in FILLS | WHERES:
        return _bias_and_hidden(entry, mask)
    return []


def _is_mask(x: object) -> bool:
    fact = tensor(x)
    return fact is not None and fact.dim() > 0 and fact.is_floating_point()


def _bias_and_hidden(entry: Entry, mask: fx.Node) -> list[fx.Node]:
    """where(seen, bias, minus infinity) as the bias and a mask."""
    first, second, third = mask.args[:3]
    inverted = mask.target in FILLS or constant(second) is not None
    bias, hidden, fill = (first, second, third) if mask.target in FILLS else (second, first, third)
    if inverted and mask.target in WHERES:
        bias, fill = fill, bias
    number = constant(fill)
    if number is None or number > HIDDEN or not _is_mask(bias) or not isinstance(hidden, fx.Node):
        return []
    return [bias, hiding(entry, hidden, number, inverted, mask)]  # type: ignore[list-item]


def joined(emit: Any, masks: tuple[fx.Node, ...]) -> fx.Node | None:
    """One mask for several: bool masks are intersected, others added."""
    if not masks:
        return None
    kinds = {value(m).dtype == torch.bool for m in masks}
    if kinds == {True, False}:
        masks = tuple(additive(emit, m) for m in masks)
    join = aten.bitwise_and.Tensor if kinds == {True} else aten.add.Tensor
    return reduce(lambda a, b: emit(join, a, b), masks)


def additive(emit: Any, mask: fx.Node) -> fx.Node:
    """A bool mask as zeros and minus infinities."""
    if value(mask).dtype != torch.bool:
        return mask
    node: fx.Node = emit(aten.where.Scalar, mask, 0.0, -math.inf)
    return node

"""The way from a softmax up to q kᵀ: scales, a soft-cap, masks and views between the two."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from sylvester.compiler.calls import same_size, same_sizes, tensor
from sylvester.compiler.changes import Refusal
from sylvester.compiler.forms import VIEWS, arguments
from sylvester.compiler.masks import HIDDEN
from sylvester.compiler.program import Entry, value

aten = torch.ops.aten
MATMULS = {aten.matmul.default, aten.bmm.default}
PRODUCTS = MATMULS | {aten.baddbmm.default}
CASTS = {aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
SCALES = {aten.mul.Tensor, aten.div.Tensor}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
WHERES = {aten.where.self, aten.where.ScalarOther}
FULL = {aten.full.default, aten.full_like.default, aten.scalar_tensor.default}
RESHAPES = VIEWS | {aten.reshape.default}
ABOVE = dict.fromkeys(CASTS | SCALES | FILLS | RESHAPES | {aten.tanh.default}, 0) | dict.fromkeys(WHERES, 1)
"""Which operand of an op the scores are."""

Step = fx.Node | Refusal | None


class Scores:
    """What lies between a softmax and the product of queries and keys.

    Scores s of the product become `softcap` tanh(s `scale` / `softcap`), without soft-cap s `scale`; `masks` are added
    or hide keys, and `factors` multiply or divide the scores of a query. `flat` are masks of [batch heads, queries,
    keys]; `heads` is known where scores have four axes.
    """

    def __init__(self, entry: Entry, softmax: fx.Node) -> None:
        self.entry = entry
        self.softmax = softmax
        self.scale = 1.0
        self.softcap = 0.0
        self.factors: list[tuple[Any, fx.Node]] = []
        self.masks: list[fx.Node] = []
        self.flat: set[fx.Node] = set()
        self.heads: Any = None
        self.last = softmax

    def walk(self) -> Step:
        """The product node; None when the scores come from something else, by way of `last`."""
        node: Any = self.softmax.args[0]
        while isinstance(node, fx.Node) and node.target not in MATMULS:
            self.last = node
            take = self.STEPS.get(node.target)
            step = take(self, node) if take else None
            if step is None or isinstance(step, Refusal):
                return step
            node = step
        return node if isinstance(node, fx.Node) else None

    def _through(self, node: fx.Node) -> Step:
        return node.args[0]  # type: ignore[return-value]

    def _through_view(self, node: fx.Node) -> Step:
        """Batch and heads as one axis or as two."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if same_sizes(value(source).shape, value(node).shape):
            return source
        heads = split_heads(node, source)
        self.heads = self.heads or heads
        return None if heads is None else source

    def _through_scale(self, node: fx.Node) -> Step:
        scores, factor = node.args[:2]
        if isinstance(factor, (int, float)):
            self.scale *= factor if node.target is aten.mul.Tensor else 1 / factor
        elif isinstance(factor, fx.Node):
            if not is_scores(scores) or self.softcap or not _per_query(node, factor):
                return _if_scores(scores, Refusal("the scores are scaled by a tensor", node))
            self.factors.append((node.target, factor))
        return scores  # type: ignore[return-value]

    def _through_tanh(self, node: fx.Node) -> Step:
        if self.softcap or self.factors:
            return _if_scores(node, Refusal("a soft-cap is scaled by a tensor or lies under another", node))
        self.softcap = abs(self.scale)
        return node.args[0]  # type: ignore[return-value]

    def _through_sum(self, node: fx.Node) -> Step:
        x, y = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node) or tensor(x) is None or tensor(y) is None:
            return None
        minus = node.target is aten.sub.Tensor
        if minus and _is_top(y, x):
            return x
        scores, mask = (x, y) if minus or is_scores(x) else (y, x)
        if not is_scores(scores):
            return None
        if node.kwargs or value(mask).dtype == torch.bool:
            return Refusal("the scores are summed with booleans or with alpha", node)
        return self._add(node, mask, -1 if minus else 1) or scores

    def _through_product(self, node: fx.Node) -> Step:
        """mask beta + q kᵀ alpha."""
        mask, left, right, beta, alpha = arguments(node)
        refusal = self._add(node, mask, beta) if beta else None
        self.scale *= alpha
        return refusal or self.entry.emit(aten.bmm.default, left, right, before=node)

    def _add(self, node: fx.Node, mask: fx.Node, factor: float) -> Refusal | None:
        """A mask that is added at `node`, times what the sum is scaled by."""
        if self.scale * factor != 1.0:
            mask = self.entry.emit(aten.mul.Tensor, mask, self.scale * factor, before=self.softmax)
        return self._keep(node, mask)

    def _keep(self, node: fx.Node, mask: fx.Node) -> Refusal | None:
        if self.softcap or self.factors:
            return Refusal("a mask lies under a soft-cap or a scale by a tensor", node)
        self.masks.append(mask)
        if value(node).dim() == 3 and value(mask).dim() == 3 and value(mask).shape[0] != 1:
            self.flat.add(mask)
        return None

    def _through_fill(self, node: fx.Node) -> Step:
        scores, hidden, fill = node.args[:3]
        return self._filled(node, scores, hidden, constant(fill), inverted=True)

    def _through_where(self, node: fx.Node) -> Step:
        mask, first, second = node.args[:3]
        inverted = constant(first) is not None
        scores, fill = (second, first) if inverted else (first, second)
        number = constant(fill)
        return None if number is None else self._filled(node, scores, mask, number, inverted)

    def _filled(self, node: fx.Node, scores: Any, mask: Any, fill: float | None, inverted: bool) -> Step:
        if fill is None or fill > HIDDEN:
            return _if_scores(scores, Refusal(f"hidden scores become {fill}, expected minus infinity", node))
        return self._keep(node, hiding(self.entry, mask, fill, inverted, self.softmax)) or scores

    STEPS: ClassVar[dict[Any, Callable[[Scores, fx.Node], Step]]] = {
        **dict.fromkeys(CASTS, _through),
        **dict.fromkeys(RESHAPES, _through_view),
        **dict.fromkeys(SCALES, _through_scale),
        **dict.fromkeys(SUMS, _through_sum),
        **dict.fromkeys(FILLS, _through_fill),
        **dict.fromkeys(WHERES, _through_where),
        aten.tanh.default: _through_tanh,
        aten.baddbmm.default: _through_product,
    }


def hiding(entry: Entry, mask: fx.Node, fill: float, inverted: bool, before: fx.Node) -> fx.Node:
    """The mask of scores that become `fill` where bool `mask` is false, or true when inverted.

    Minus infinity hides; a finite fill is added, so that a row without visible keys stays uniform.
    """
    if fill == -torch.inf:
        return entry.emit(aten.bitwise_not.default, mask, before=before) if inverted else mask
    kept, hidden = (fill, 0.0) if inverted else (0.0, fill)
    return entry.emit(aten.where.Scalar, mask, kept, hidden, before=before)


def constant(node: Any) -> float | None:
    """A number, or the one that fills a tensor made by `full` or a conversion of one."""
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target in FULL:
        node = node.args[-1]
    return float(node) if isinstance(node, (int, float)) else None


def split_heads(x: fx.Node, y: fx.Node) -> int | None:
    """The heads in [batch heads, rows, columns] <-> [batch, heads, rows, columns]; None for other pairs of shapes."""
    flat, split = sorted((value(x).shape, value(y).shape), key=len)
    if len(flat) != 3 or len(split) != 4 or not all(same_size(a, b) for a, b in zip(flat[1:], split[2:], strict=True)):
        return None
    return split[1] if isinstance(split[1], int) else None


def _is_top(x: fx.Node, scores: fx.Node) -> bool:
    """The largest score of every query, which a softmax does not see."""
    source = x.args[0] if x.target is operator.getitem else x
    known = isinstance(source, fx.Node) and source.target in (aten.amax.default, aten.max.dim)
    if not known or source.args[0] is not scores:  # type: ignore[union-attr]
        return False
    axes = arguments(source)[1]  # type: ignore[arg-type]
    return axes in (-1, [-1]) and value(x).dim() == value(scores).dim()


def _per_query(node: fx.Node, factor: fx.Node) -> bool:
    """The factor is the same for all keys, so that it may scale the queries instead of the scores at `node`."""
    scale, scores = tensor(factor), value(node)
    if scale is None or scale.dtype != scores.dtype:
        return False
    return scale.dim() == 0 or bool(scale.shape[-1] == 1 and scores.dim() == 4)


def is_scores(x: object) -> bool:
    """A product of queries and keys lies below scales, masks, views and casts."""
    while isinstance(x, fx.Node) and x.target not in PRODUCTS:
        if x.target in SUMS:
            return any(is_scores(n) for n in x.args[:2])
        if x.target not in ABOVE:
            return False
        x = x.args[2 if x.target in WHERES and constant(x.args[1]) is not None else ABOVE[x.target]]
    return isinstance(x, fx.Node)


def _if_scores(node: object, refusal: Refusal) -> Refusal | None:
    return refusal if is_scores(node) else None

"""Find the operands of an attention: from torch's one call, or by walking from a softmax to its matmuls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.changes import Refusal
from sylvester.compiler.forms import arguments, form
from sylvester.compiler.masks import HIDDEN
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, value

aten = torch.ops.aten
MATMULS = {aten.matmul.default, aten.bmm.default}
CASTS = {aten.to.dtype, aten.type_as.default, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
SCALES = {aten.mul.Tensor, aten.div.Tensor}
SWAP = [-1, -2]


@dataclass(frozen=True)
class Attention:
    """Operands of one attention whose result is `out`; every mask is bool (True = visible) or added to the scores."""

    out: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    masks: tuple[fx.Node, ...]
    scale: float
    causal: bool
    window: int = 0


def from_call(node: fx.Node) -> Attention | Refusal:
    """The operands of torch's scaled_dot_product_attention."""
    q, k, v, mask, dropout, causal, scale, _ = arguments(node)
    if dropout:
        return Refusal(f"dropout of {dropout} is active", node)
    if scale is None:
        features = value(q).shape[-1]
        if not isinstance(features, int):
            return Refusal(f"the scale depends on a symbolic head size {features}", node)
        scale = features**-0.5
    return Attention(node, q, k, v, () if mask is None else (mask,), float(scale), bool(causal))


def from_softmax(entry: Entry, node: fx.Node) -> Attention | Refusal | None:
    """Walk from a softmax up through masks and scales to q kᵀ and down to the product with v; None without q kᵀ."""
    scores = Scores(entry, node)
    product = scores.walk()
    if not isinstance(product, fx.Node):
        return product
    if arguments(node)[1] != -1:
        return Refusal("the softmax is not over the keys", node)
    out = _weighted_sum(node)
    if isinstance(out, Refusal):
        return out
    (q, q_scale), (keys, keys_scale) = (_unscaled(n) for n in form(product)[1][:2])
    k, k_scale = _unscaled(_swapped(entry, keys, product))
    scale = scores.scale * q_scale * keys_scale * k_scale
    v: fx.Node = out.args[1]  # type: ignore[assignment]
    return Attention(out, q, k, v, tuple(scores.masks), scale, False)


class Scores:
    """The way from a softmax up to the product of queries and keys, collecting the scale and the masks on it."""

    def __init__(self, entry: Entry, softmax: fx.Node) -> None:
        self.entry = entry
        self.softmax = softmax
        self.scale = 1.0
        self.masks: list[fx.Node] = []

    def walk(self) -> fx.Node | Refusal | None:
        """The product node; None when the scores come from something else."""
        node = self.softmax.args[0]
        while isinstance(node, fx.Node) and node.target not in MATMULS:
            step = self._step(node)
            if step is None or isinstance(step, Refusal):
                return step
            node = step
        return node if isinstance(node, fx.Node) else None

    def _step(self, node: fx.Node) -> fx.Node | Refusal | None:
        if node.target in CASTS:
            return node.args[0]  # type: ignore[return-value]
        if node.target in SCALES:
            return self._through_scale(node)
        if node.target is aten.add.Tensor:
            return self._through_sum(node)
        if node.target is aten.masked_fill.Scalar:
            scores, hidden, fill = node.args[:3]
            return self._through_fill(node, scores, hidden, fill, inverted=True)
        if node.target is aten.where.ScalarOther:
            seen, scores, fill = node.args[:3]
            return self._through_fill(node, scores, seen, fill, inverted=False)
        return self._through_where(node) if node.target is aten.where.self else None

    def _through_scale(self, node: fx.Node) -> fx.Node | Refusal | None:
        scores, factor = node.args[:2]
        if not isinstance(factor, (int, float)):
            return _if_scores(scores, Refusal("the scores are scaled by a tensor", node))
        self.scale *= factor if node.target is aten.mul.Tensor else 1 / factor
        return scores  # type: ignore[return-value]

    def _through_sum(self, node: fx.Node) -> fx.Node | Refusal | None:
        x, y = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return None
        scores, mask = (x, y) if _is_scores(x) else (y, x)
        if not _is_scores(scores):
            return None
        if node.kwargs or value(mask).dtype == torch.bool:
            return Refusal("the scores are summed with booleans or with alpha", node)
        if self.scale != 1.0:
            mask = self._scaled_mask(mask)
        self.masks.append(mask)
        return scores

    def _scaled_mask(self, mask: fx.Node) -> fx.Node:
        return self.entry.emit(aten.mul.Tensor, mask, self.scale, before=self.softmax)

    def _through_fill(
        self, node: fx.Node, scores: Any, mask: Any, fill: Any, inverted: bool
    ) -> fx.Node | Refusal | None:
        if not isinstance(fill, (int, float)) or fill > HIDDEN:
            return _if_scores(scores, Refusal(f"hidden scores become {fill}, expected minus infinity", node))
        self.masks.append(self._bool_mask(mask, fill, inverted))
        return scores  # type: ignore[no-any-return]

    def _bool_mask(self, mask: fx.Node, fill: float, inverted: bool) -> fx.Node:
        """Minus infinity hides; a finite fill is added, so that a row without visible keys stays uniform."""
        emit, before = self.entry.emit, self.softmax
        if fill == -torch.inf:
            return emit(aten.bitwise_not.default, mask, before=before) if inverted else mask
        kept, hidden = (fill, 0.0) if inverted else (0.0, fill)
        return emit(aten.where.Scalar, mask, kept, hidden, before=before)

    def _through_where(self, node: fx.Node) -> fx.Node | Refusal | None:
        seen, scores, other = node.args[:3]
        fill = _constant(other)
        return self._through_fill(node, scores, seen, fill, inverted=False) if fill is not None else None


def _constant(node: Any) -> float | None:
    """The number that fills a tensor made by `full` or a conversion of one."""
    while isinstance(node, fx.Node) and node.target in CASTS:
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target in (aten.full.default, aten.scalar_tensor.default):
        number = node.args[-1]
        return float(number) if isinstance(number, (int, float)) else None
    return None


def _is_scores(node: fx.Node) -> bool:
    """A product of queries and keys lies below scales, masks and casts."""
    below = SCALES | CASTS | {aten.add.Tensor, aten.masked_fill.Scalar}
    while isinstance(node, fx.Node) and node.target in below:
        node = node.args[0]  # type: ignore[assignment]
    return isinstance(node, fx.Node) and node.target in MATMULS


def _if_scores(node: Any, refusal: Refusal) -> Refusal | None:
    return refusal if isinstance(node, fx.Node) and _is_scores(node) else None


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """x for x * c, with c."""
    scale = 1.0
    while node.target in SCALES and isinstance(node.args[1], (int, float)):
        scale *= node.args[1] if node.target is aten.mul.Tensor else 1 / node.args[1]
        node = node.args[0]  # type: ignore[assignment]
    return node, scale


def _swapped(entry: Entry, keys: fx.Node, before: fx.Node) -> fx.Node:
    """The transpose of the last two axes: k for kᵀ."""
    rank = value(keys).dim()
    swap = [*range(-rank, -2), *SWAP]
    if form(keys) == (aten.permute.default, (keys.all_input_nodes[0] if keys.all_input_nodes else None, swap)):
        return keys.all_input_nodes[0]
    return entry.emit(aten.permute.default, keys, [n % rank for n in swap], before=before)


def _weighted_sum(softmax: fx.Node) -> fx.Node | Refusal:
    """The product of the softmax with the values, through casts and inactive dropout."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return Refusal(f"the attention weights have {len(node.users)} uses, expected one", softmax)
        user = next(iter(node.users))
        if user.target in MATMULS and user.args[0] is node:
            return user
        idle = user.target is aten.dropout.default and not (arguments(user)[1] and arguments(user)[2])
        if user.target not in CASTS and not idle:
            return Refusal(f"the attention weights go into {op_name(user.target)}, expected a product", user)
        node = user


def unrepeated(node: fx.Node) -> fx.Node:
    """Key or value heads before each was repeated for its group of query heads; the node itself when none were."""
    if node.target is aten.repeat_interleave.self_int and arguments(node)[2] == -3:
        return node.args[0]  # type: ignore[return-value]
    if form(node)[0] is not aten.reshape.default:
        return node
    expanded = _below_slices(node.args[0])
    if expanded.target is not aten.expand.default:
        return node
    grouped = _below_slices(expanded.args[0])
    if grouped.target is not aten.unsqueeze.default or form(grouped)[1][1] != -3:
        return node
    source = _below_slices(grouped.args[0])
    return source if _repeats(source, expanded, node) else node


def _below_slices(x: Any) -> fx.Node:
    """Past slices that keep everything."""
    node: fx.Node = x
    while node.target is aten.slice.Tensor and value(node).shape == value(node.args[0]).shape:  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return node


def _repeats(source: fx.Node, expanded: fx.Node, result: fx.Node) -> bool:
    """[b, h, t, d] -> [b, h, n, t, d] -> [b, h n, t, d]."""
    start, wide, end = (value(n) for n in (source, expanded, result))
    if not isinstance(start, Tensor) or start.dim() != 4 or wide.dim() != 5 or end.dim() != 4:
        return False
    heads, groups = wide.shape[1], wide.shape[2]
    return bool(start.shape[1] == heads and end.shape[1] == heads * groups and start.shape[2:] == end.shape[2:])

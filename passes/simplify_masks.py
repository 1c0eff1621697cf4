"""Rules: ones, zeros, new_full, ... -> full; a constant condition or mask chooses at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from sylvester.compiler.calls import Call, Result, Rule, arguments, same_fact, same_size, size_of
from sylvester.compiler.program import value

aten = torch.ops.aten
FILLS = {aten.ones.default: 1, aten.zeros.default: 0, aten.new_ones.default: 1, aten.new_zeros.default: 0}
FILLS_LIKE = {aten.ones_like.default: 1, aten.zeros_like.default: 0}
WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
MASKED_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


def fill(node: fx.Node) -> Result:
    """ones, zeros, new_ones, new_zeros and new_full are full with the type written out."""
    a = arguments(node)
    content = FILLS[node.target] if node.target in FILLS else a["fill_value"]
    return _full(node, cast("Sequence[Any]", a["size"]), content)


def fill_like(node: fx.Node) -> Result:
    """ones_like and zeros_like are full_like; of a known shape all are full."""
    a, sizes = arguments(node), value(node).shape
    content = FILLS_LIKE[node.target] if node.target in FILLS_LIKE else a["fill_value"]
    if all(isinstance(size, int) for size in sizes):
        return _full(node, list(sizes), content)
    return Call(aten.full_like.default, (node.args[0], content), {"dtype": value(node).dtype})


def fill_scalar(node: fx.Node) -> Result:
    """scalar_tensor is full without axes."""
    return _full(node, [], node.args[0])


def _full(node: fx.Node, sizes: Sequence[Any], content: Any) -> Call:
    dtype = value(node).dtype
    content = bool(content) if dtype == torch.bool and not isinstance(content, fx.Node) else content
    return Call(aten.full.default, (sizes, content), {"dtype": dtype})


def arange(node: fx.Node) -> Result:
    """arange(0, n) and arange(a, b, 1) in their shortest form."""
    a = arguments(node)
    if a.get("step", 1) != 1:
        return None
    start = a.get("start", 0)
    bounds = (a["end"],) if start == 0 else (start, a["end"])
    implied = torch.int64 if not any(isinstance(b, float) for b in bounds) else None
    dtype = {"dtype": a["dtype"]} if a["dtype"] is not None and a["dtype"] != implied else {}
    if value(node).dtype != torch.int64 and not dtype:
        return None
    return Call(aten.arange.default if len(bounds) == 1 else aten.arange.start, bounds, dtype)


def constant(node: object) -> Any:
    """The one number that fills a tensor, seen through views; None when there is none."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.args[0]
    filled = isinstance(node, fx.Node) and node.target in (aten.full.default, aten.full_like.default)
    content = cast(fx.Node, node).args[1] if filled else None
    return content if isinstance(content, (bool, int, float)) else None


VIEWS = (
    aten.reshape.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor,
    aten.select.int,
)  # fmt: skip


def where(node: fx.Node) -> Result:
    """where with a constant condition is one of its branches."""
    condition, yes, no = node.args
    known = constant(condition)
    if known is None:
        return None
    chosen = yes if known else no
    return cast(fx.Node, chosen) if same_fact(chosen, node) else None


def masked_fill(node: fx.Node) -> Result:
    """masked_fill with a mask that is false everywhere is nothing."""
    source, mask = node.args[:2]
    return cast(fx.Node, source) if constant(mask) is False and same_fact(source, node) else None


def conjunction(node: fx.Node) -> Result:
    """x & true and x | false are x, expanded to the shape of both."""
    neutral = node.target is aten.bitwise_and.Tensor
    for x, y in (node.args[:2], node.args[1::-1]):
        if constant(y) is neutral:
            return expanded(cast(fx.Node, x), cast(fx.Node, y), node)
    return None


def expanded(x: fx.Node, other: fx.Node, like: fx.Node) -> Result:
    """`x` in the shape of `like`, which `x` and `other` broadcast to."""
    if same_fact(x, like):
        return x
    shape = value(like).shape
    lengths = {x: value(x).dim() - len(shape), other: value(other).dim() - len(shape)}
    sizes: list[Any] = []
    for i, size in enumerate(shape):
        sources = [n for n, shift in lengths.items() if i + shift >= 0 and same_size(value(n).shape[i + shift], size)]
        sizes.append(size_of(sources[0], i + lengths[sources[0]]) if sources else size)
    return Call(aten.expand.default, (x, sizes)) if value(x).dtype == value(like).dtype else None


def never_negative(node: fx.Node) -> Result:
    """A range from 0 on is always >= 0: all true."""
    source, bound = cast("tuple[fx.Node, Any]", node.args)
    below = cast("Any", source)
    while isinstance(below, fx.Node) and below.target in VIEWS:
        below = below.args[0]
    if not isinstance(below, fx.Node) or below.target is not aten.arange.default or bound != 0:
        return None
    sizes = [size_of(source, dim) for dim in range(value(source).dim())]
    return Call(aten.full.default, (sizes, True), {"dtype": torch.bool})


def attention_mask(node: fx.Node) -> Result:
    """Attention with a mask that hides nothing has no mask."""
    a = arguments(node)
    if a["attn_mask"] is None or a["dropout_p"] != 0:
        return None
    additive = value(a["attn_mask"]).dtype != torch.bool
    known = constant(a["attn_mask"])
    if known is None or known != (0 if additive else 1):
        return None
    return Call(node.target, (*node.args[:3], None, 0.0, a["is_causal"]), node.kwargs)  # type: ignore[arg-type]


RULES: dict[Any, tuple[Rule, ...]] = {
    **{target: (fill,) for target in (*FILLS, aten.new_full.default)},
    **{target: (fill_like,) for target in (*FILLS_LIKE, aten.full_like.default)},
    **{target: (where,) for target in WHERES},
    **{target: (masked_fill,) for target in MASKED_FILLS},
    aten.scalar_tensor.default: (fill_scalar,),
    aten.full.default: (fill,),
    aten.arange.default: (arange,),
    aten.arange.start: (arange,),
    aten.arange.start_step: (arange,),
    aten.ge.Scalar: (never_negative,),
    aten.bitwise_and.Tensor: (conjunction,),
    aten.bitwise_or.Tensor: (conjunction,),
    aten.scaled_dot_product_attention.default: (attention_mask,),
}

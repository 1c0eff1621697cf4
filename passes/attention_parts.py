"""Find the operands of an attention: from torch's one call, or by walking from a softmax to its matmuls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sylvester.compiler.calls import same_sizes
from sylvester.compiler.changes import Refusal
from sylvester.compiler.forms import arguments, form
from sylvester.compiler.masks import FACTORIES
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, value
from sylvester.passes.attention_scores import CASTS, MATMULS, RESHAPES, SCALES, Scores, constant, split_heads

aten = torch.ops.aten
LAYERS = {aten.linear.default, aten.layer_norm.default, aten.embedding.default}
NEAR = 6
"""Ops between a product and a softmax up to which the two are taken to be a part of one attention."""


@dataclass(frozen=True)
class Attention:
    """Operands of one attention whose result is `out`; every mask is bool (True = visible) or added to the scores.

    Where `merged`, batch and heads are one axis of `out` and two of the operands.
    """

    out: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    masks: tuple[fx.Node, ...]
    scale: float
    causal: bool
    window: int = 0
    softcap: float = 0.0
    merged: bool = False


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
    if product is None:
        return _between_products(scores)
    if isinstance(product, Refusal):
        return product
    if arguments(node)[1] != -1:
        return Refusal("the softmax is not over the keys", node)
    out = _weighted_sum(node)
    if isinstance(out, Refusal):
        return out
    (q, q_scale), (keys, keys_scale) = (_bare(n) for n in form(product)[1][:2])
    k, k_scale = _bare(_swapped(entry, keys, product))
    v = _unmerged(out.args[1])
    scale = scores.scale * q_scale * keys_scale * k_scale
    found = Attention(out, q, k, v, tuple(scores.masks), scale, False, softcap=scores.softcap)
    found = _with_heads(entry, found, scores)
    for target, factor in scores.factors:
        found = replace(found, q=entry.emit(target, found.q, factor, before=out))
    return found


def _between_products(scores: Scores) -> Refusal | None:
    """Why a softmax between two products is no attention; None when it is not between two."""
    above = _near(scores.last, lambda n: n.all_input_nodes)
    below = _near(scores.softmax, lambda n: n.users)
    if not (above and below):
        return None
    name = op_name(scores.last.target)
    return Refusal(f"the scores go through {name}, expected scales, masks and a soft-cap", scores.last)


def _near(start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Whether a product lies near, with no layer between."""
    front = {start}
    for _ in range(NEAR):
        front = {m for n in front for m in neighbours(n) if m.op == "call_function" and m.target not in LAYERS}
        if any(n.target in MATMULS for n in front):
            return True
    return False


def _weighted_sum(softmax: fx.Node) -> fx.Node | Refusal:
    """The product of the softmax with the values, through casts, views and inactive dropout."""
    node = softmax
    while True:
        users = [user for user in node.users if user.target not in FACTORIES]
        if len(users) != 1:
            return Refusal(f"the attention weights have {len(users)} uses, expected one", softmax)
        user = users[0]
        if user.target in MATMULS and user.args[0] is node:
            return user
        if not _passes(node, user) and not _hides_empty_rows(user, softmax):
            return Refusal(f"the attention weights go into {op_name(user.target)}, expected a product", user)
        node = user


def _passes(weights: fx.Node, user: fx.Node) -> bool:
    if user.target is aten.dropout.default:
        return not (arguments(user)[1] and arguments(user)[2])
    if user.target in RESHAPES:
        same = same_sizes(value(weights).shape, value(user).shape)
        return same or split_heads(weights, user) is not None
    return user.target in CASTS


def _hides_empty_rows(node: fx.Node, softmax: fx.Node) -> bool:
    """where(not any(not scores == -inf), 0, weights): the weights of a query that sees no key are 0."""
    if node.target is not aten.where.self or constant(node.args[1]) != 0:
        return False
    chain: list[Any] = [node.args[0]]
    for target in (aten.bitwise_not.default, aten.any.dim, aten.bitwise_not.default):
        if not isinstance(chain[-1], fx.Node) or chain[-1].target is not target:
            return False
        chain.append(chain[-1].args[0])
    equal, (_, dim, keepdim) = chain[-1], arguments(chain[1])
    hidden = equal.target is aten.eq.Scalar and equal.args == (softmax.args[0], -torch.inf)
    return bool(hidden and dim == -1 and keepdim)


def _with_heads(entry: Entry, found: Attention, scores: Scores) -> Attention:
    """Operands of [batch heads, tokens, features] with heads as an axis, where their number is known."""
    operands = (found.q, found.k, found.v)
    heads = scores.heads or next((value(n).shape[1] for n in operands if value(n).dim() == 4), None)
    if not isinstance(heads, int):
        return found

    def split(x: fx.Node) -> fx.Node:
        whole = _unmerged(x)
        return whole if whole is not x else entry.emit(aten.unflatten.int, x, 0, [-1, heads], before=found.out)

    q, k, v = (split(n) if value(n).dim() == 3 else n for n in operands)
    masks = tuple(split(n) if n in scores.flat else n for n in found.masks)
    return replace(found, q=q, k=k, v=v, masks=masks, merged=value(found.out).dim() == 3)


def _unmerged(x: Any) -> fx.Node:
    """[batch, heads, ...] for the same as [batch heads, ...]."""
    node: fx.Node = x
    if node.target not in RESHAPES or value(node).dim() != 3:
        return node
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    return node if split_heads(node, source) is None else source


def _bare(x: Any) -> tuple[fx.Node, float]:
    """x for x * c with c, before its heads were merged with the batch."""
    node, scale = _unmerged(x), 1.0
    while node.target in SCALES and isinstance(node.args[1], (int, float)):
        scale *= node.args[1] if node.target is aten.mul.Tensor else 1 / node.args[1]
        node = _unmerged(node.args[0])
    return node, scale


def _swapped(entry: Entry, keys: fx.Node, before: fx.Node) -> fx.Node:
    """The transpose of the last two axes: k for kᵀ."""
    rank = value(keys).dim()
    target, args = form(keys)
    source, order = args[:2] if target is aten.permute.default else (keys, list(range(-rank, 0)))
    order = [*order[:-2], order[-1], order[-2]]
    if order == list(range(-rank, 0)):
        return source  # type: ignore[no-any-return]
    return entry.emit(aten.permute.default, source, [n % rank for n in order], before=before)

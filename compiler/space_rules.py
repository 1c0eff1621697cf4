"""How each op treats the basis of its features: the rules from which `infer` builds the spaces of a program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments, same_sizes
from sylvester.compiler.program import Program, is_weight, value
from sylvester.compiler.quantized_ops import ATTENTIONS
from sylvester.compiler.space_inference import Inference, Rule, is_stored, op_name
from sylvester.compiler.spaces import Space

aten, dialect = torch.ops.aten, torch.ops.sylvester

NORMS = (aten.layer_norm.default, dialect.rms_norm.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
THRESHOLDS = "features are compared with thresholds, which hold in the plain basis only"


def infer(program: Program, plain_linears: bool = False) -> list[Space]:
    """The feature spaces of a program. With `plain_linears` a linear layer does not tie its weight to what it reads."""
    inference = Inference(program, RULES, plain_linears)
    for entry in program.entries.values():
        inference.visit(entry)
    return inference.unifier.spaces(inference.end)


def _linear(inference: Inference, node: fx.Node) -> bool:
    a = arguments(node)
    x, weight, bias = cast(fx.Node, node.args[0]), a["weight"], a["bias"]
    if not is_stored(weight) or value(weight).dim() != 2 or is_weight(x) or not _one_axis(bias):
        return False
    _contract(inference, node, x, weight)
    if inference.track(node, 1):
        _write(inference, node, weight, bias)
    return True


def _contract(inference: Inference, node: fx.Node, x: fx.Node, weight: fx.Node) -> None:
    """The layer takes x in the basis of the second axis of its weight."""
    if inference.plain_linears:
        inference.read(x, node, "a linear layer reads it")
    elif inference.end.get(x) == 1:
        inference.unifier.unify([x, inference.axis(weight, 1)])
        inference.unifier.reads.append((x, x, node))
    else:
        inference.read(x, node, "a linear layer reads it")
        inference.stored(weight, [1], node, "a linear layer reads values without a basis")


def _sparse_glu(inference: Inference, node: fx.Node) -> bool:
    """x may be in any basis; what the layer makes is compared with thresholds, feature by feature."""
    a = arguments(node)
    x, weight = a["x"], a["weight"]
    if not is_stored(weight) or is_weight(x) or not _one_axis(a["bias"]):
        return False
    _contract(inference, node, x, weight)
    inference.stored(weight, [0], node, THRESHOLDS)
    for other in (a["bias"], a["gate"], a["thresholds"]):
        if other is not None:
            inference.read(other, node, THRESHOLDS)
    inference.made(node, THRESHOLDS)
    return True


def _zero_small(inference: Inference, node: fx.Node) -> bool:
    for operand in node.all_input_nodes:
        inference.read(operand, node, THRESHOLDS)
    inference.made(node, THRESHOLDS)
    return True


def _write(inference: Inference, node: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
    """The node has its features where the first axes of weight and bias are."""
    biases = [] if bias is None else [inference.axis(bias, 0)]
    inference.unifier.unify([node, inference.axis(weight, 0), *biases])


def _one_axis(bias: object) -> bool:
    return bias is None or (is_stored(bias) and value(cast(fx.Node, bias)).dim() == 1)


def _embedding(inference: Inference, node: fx.Node) -> bool:
    return is_weight(node.args[0]) and inference.keep(node, 1, node.args[0])


def _convolution(inference: Inference, node: fx.Node) -> bool:
    a = arguments(node)
    weight, bias = a["weight"], a["bias"]
    if not is_stored(weight) or not _one_axis(bias) or a["groups"] != 1:
        return False
    rank = value(weight).dim()
    inference.read(a["input"], node, "a convolution reads it")
    inference.stored(weight, range(1, rank), node, "a convolution reads other axes")
    if inference.track(node, rank - 1):
        _write(inference, node, weight, bias)
    return True


def _sum(inference: Inference, node: fx.Node) -> bool:
    ends = {inference.end[o] for o in node.all_input_nodes if o in inference.end}
    return len(ends) == 1 and len(node.args) == 2 and inference.keep(node, ends.pop(), *node.args)


def _product(inference: Inference, node: fx.Node) -> bool:
    """A number, or one factor for all features of a row, commutes with every rotation."""
    x, factor = node.args[:2]
    if node.target is aten.mul.Tensor and inference.features(x) < inference.features(factor):
        x, factor = factor, x
    if not isinstance(x, fx.Node) or x not in inference.end or len(node.args) > 2 or node.kwargs:
        return False
    end = inference.end[x]
    if isinstance(factor, fx.Node) and isinstance(fact := value(factor), Tensor):
        if fact.dim() >= end and fact.shape[-end] != 1:
            return False
        inference.read(factor, node, f"{op_name(node)} scales rows by it")
    return inference.keep(node, end, x)


def _same(inference: Inference, node: fx.Node) -> bool:
    x = cast(fx.Node, node.args[0])
    return x in inference.end and inference.keep(node, inference.end[x], x)


def _rms_norm(inference: Inference, node: fx.Node) -> bool:
    x, weight = node.args[:2]
    return weight is None and inference.keep(node, 1, x)


def _reshape(inference: Inference, node: fx.Node) -> bool:
    x = cast(fx.Node, node.args[0])
    if x not in inference.end:
        return False
    end, before, after = inference.end[x], value(x).shape, value(node).shape
    if end > 1:
        place = len(before) - end
        if not same_sizes(tuple(before[: place + 1]), tuple(after[: place + 1])):
            return False
        end = len(after) - place
    if not inference.track(node, end):
        return False
    small, large = sorted((inference.size(x, inference.end[x]), inference.size(node, end)))
    if large % small:
        return False
    inference.unifier.unify([x, node])
    return True


def _moved(inference: Inference, node: fx.Node, places: Iterable[int | None]) -> bool:
    """`places`: for each axis of the result the axis of the operand it is, or None for a new one."""
    x = cast(fx.Node, node.args[0])
    if x not in inference.end:
        return False
    found, rank = list(places), value(x).dim()
    feature = rank - inference.end[x]
    if feature not in found or not inference.track(node, len(found) - found.index(feature)):
        return False
    inference.unifier.unify([x, node])
    return inference.size(node, inference.end[node]) == inference.size(x, inference.end[x])


def _permute(inference: Inference, node: fx.Node) -> bool:
    """Plain features that come to the last axis become plain there, where a transform can follow."""
    x = cast(fx.Node, node.args[0])
    rank = value(x).dim()
    places = [d % rank for d in cast("list[int]", node.args[1])]
    if x in inference.plain and inference.end[x] > 1 and places[-1] == rank - inference.end[x]:
        inference.read(x, node, "moved to the last axis")
        inference.made(node, "features of another axis")
        return True
    return _moved(inference, node, places)


def _unsqueeze(inference: Inference, node: fx.Node) -> bool:
    rank, dim = value(node).dim(), cast(int, node.args[1])
    old: list[int | None] = list(range(rank - 1))
    old.insert(dim % rank, None)
    return _moved(inference, node, old)


def _expand(inference: Inference, node: fx.Node) -> bool:
    x = cast(fx.Node, node.args[0])
    return x in inference.end and inference.keep(node, inference.end[x], x)


def _slice(inference: Inference, node: fx.Node) -> bool:
    rank = value(node).dim()
    x, dim = cast(fx.Node, node.args[0]), arguments(node)["dim"] % rank
    return x in inference.end and dim != rank - inference.end[x] and inference.keep(node, inference.end[x], x)


def _dropped(inference: Inference, node: fx.Node) -> bool:
    """select, and reductions over other axes than the features."""
    x, a = cast(fx.Node, node.args[0]), arguments(node)
    rank, dims = value(x).dim(), a["dim"]
    if dims is None:
        return False
    gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    kept = range(rank) if a.get("keepdim") else [d for d in range(rank) if d not in gone]
    return x in inference.end and rank - inference.end[x] not in gone and _moved(inference, node, kept)


def _cat(inference: Inference, node: fx.Node) -> bool:
    parts = cast("list[fx.Node]", node.args[0])
    ends = {inference.end[p] for p in parts if p in inference.end}
    rank, dim = value(node).dim(), arguments(node)["dim"]
    return len(ends) == 1 and dim % rank != rank - min(ends) and inference.keep(node, ends.pop(), *parts)


def _attention(inference: Inference, node: fx.Node) -> bool:
    """q k^T does not change when both are rotated; the mean of values is one of rotated values."""
    q, k, v = cast("list[fx.Node]", node.args[:3])
    others = [x for x in (*node.args[3:], *node.kwargs.values()) if isinstance(x, fx.Node)]
    if any(inference.end.get(x) != 1 for x in (q, k, v)) or {q, k, v} & set(others):
        return False
    if not inference.keep(node, 1, v):
        return False
    inference.unifier.unify([q, k])
    for other in others:
        inference.read(other, node, "attention takes it as a mask")
    return True


def _kv_update(inference: Inference, node: fx.Node) -> bool:
    cache, new = node.args[:2]
    return inference.keep(node, 1, cache, new)


RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    dialect.sparse_linear.default: _linear,
    dialect.sparse_glu.default: _sparse_glu,
    dialect.zero_small.default: _zero_small,
    aten.embedding.default: _embedding,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), _product),
    **dict.fromkeys((aten.neg.default, aten.clone.default, aten.alias.default, aten.to.dtype), _same),
    dialect.rms_norm.default: _rms_norm,
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    **dict.fromkeys((aten.select.int, aten.mean.dim, aten.sum.dim_IntList), _dropped),
    aten.cat.default: _cat,
    **dict.fromkeys((*ATTENTIONS, aten.scaled_dot_product_attention.default), _attention),
    dialect.kv_update.default: _kv_update,
}

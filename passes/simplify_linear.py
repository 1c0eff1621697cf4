"""Rules: addmm, mm, matmul with a matrix, sum with a bias -> linear; flattening of rows moves below row-wise ops."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from sylvester.compiler.calls import Call, Result, Rule, arguments, resized, same_fact, same_size, same_sizes, tensor
from sylvester.compiler.program import is_weight, value

aten = torch.ops.aten
ROW_WISE = (
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default, aten.neg.default,
    aten.pow.Tensor_Scalar, aten.to.dtype, aten.clamp.default, aten.hardswish.default, aten.leaky_relu.default,
    aten.elu.default, aten.softplus.default, aten.mish.default, aten.exp.default, aten.abs.default, aten.sqrt.default,
    aten.rsqrt.default, aten.erf.default,
)  # fmt: skip


def addmm(node: fx.Node) -> Result:
    """addmm(b, x, w) is linear(x, w^T, b) for a vector b."""
    bias, x, weight = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args)
    if node.kwargs or value(bias).dim() != 1 or not same_size(value(bias).shape[0], value(weight).shape[1]):
        return None
    return Call(aten.linear.default, (x, _transposed(weight), bias))


def matmul(node: fx.Node) -> Result:
    """x @ w with a matrix made of weights is linear(x, w^T); every other product is `matmul`."""
    x, weight = cast("tuple[fx.Node, fx.Node]", node.args)
    if value(weight).dim() == 2 and value(x).dim() >= 2 and from_weights(weight):
        return Call(aten.linear.default, (x, _transposed(weight)))
    return Call(aten.matmul.default, (x, weight))


def _transposed(matrix: fx.Node) -> Call:
    fact = value(matrix)
    return Call(aten.permute.default, (matrix, [1, 0]), fact=resized(fact, fact.shape[::-1], fact.dtype))


def from_weights(node: fx.Node) -> bool:
    """A weight, or a view of one."""
    while node.target in (aten.permute.default, aten.reshape.default, aten.slice.Tensor, aten.to.dtype):
        node = cast(fx.Node, node.args[0])
    return is_weight(node)


def add_bias(node: fx.Node) -> Result:
    """linear(x, w) + b is linear(x, w, b) when nothing else uses the product."""
    product, bias = node.args[:2]
    if node.kwargs or not isinstance(product, fx.Node) or not isinstance(bias, fx.Node):
        return None
    if product.target is not aten.linear.default or len(product.args) != 2 or len(product.users) != 1:
        return None
    if not from_weights(bias) or not same_sizes(value(bias).shape, value(product).shape[-1:]):
        return None
    return Call(aten.linear.default, (*product.args, bias)) if value(bias).dtype == value(product).dtype else None


def after_rows(node: fx.Node) -> Result:
    """op(reshape(x)) with leading axes merged is reshape(op(x)) for an op on each row."""
    flat = cast(fx.Node, node.args[0])
    if not _merges_rows(flat) or tensor(node) is None:
        return None
    width = value(node).shape[-1]
    if not isinstance(width, int):
        return None
    source = cast(fx.Node, flat.args[0])
    fact = resized(value(source), (*value(source).shape[:-1], width), value(node).dtype)
    inner = Call(node.target, (source, *node.args[1:]), node.kwargs, fact)  # type: ignore[arg-type]
    return Call(aten.reshape.default, (inner, [*cast("list[Any]", flat.args[1])[:-1], width]))


def _merges_rows(flat: fx.Node) -> bool:
    if flat.op != "call_function" or flat.target is not aten.reshape.default:
        return False
    before, after = value(cast(fx.Node, flat.args[0])).shape, value(flat).shape
    return len(before) > len(after) >= 2 and same_size(before[-1], after[-1])


def after_both_rows(node: fx.Node) -> Result:
    """op(reshape(x), reshape(y)), leading axes merged alike, is reshape(op(x, y)); y may be a number or vector."""
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not _merges_rows(first) or not same_fact(first, node):
        return None
    inside, merged = first.args[0], second
    if isinstance(second, fx.Node) and value(second).dim() > 1:
        if not _merges_rows(second) or not same_fact(second.args[0], inside):
            return None
        merged = second.args[0]
    inner = Call(node.target, (inside, merged, *node.args[2:]), node.kwargs, tensor(inside))  # type: ignore[arg-type]
    return Call(aten.reshape.default, (inner, first.args[1]))


def layer_norm_rows(node: fx.Node) -> Result:
    """A norm over the last axis works on each row."""
    return after_rows(node) if len(arguments(node)["normalized_shape"]) == 1 else None


RULES: dict[Any, tuple[Rule, ...]] = {
    **{target: (after_rows,) for target in ROW_WISE},
    aten.linear.default: (after_rows,),
    aten.layer_norm.default: (layer_norm_rows,),
    aten.addmm.default: (addmm,),
    aten.mm.default: (matmul,),
    aten.bmm.default: (matmul,),
    aten.matmul.default: (matmul,),
    aten.add.Tensor: (add_bias, after_both_rows),
    aten.sub.Tensor: (after_both_rows,),
    aten.mul.Tensor: (after_both_rows,),
    aten.div.Tensor: (after_both_rows,),
}

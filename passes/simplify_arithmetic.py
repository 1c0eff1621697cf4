"""Rules: no-op casts, copies and neutral operands vanish; one spelling for casts, scalars, squares and logic."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import fx

from sylvester.compiler.calls import Call, Result, Rule, arguments, same_fact, tensor
from sylvester.compiler.program import is_weight, value

aten = torch.ops.aten
COPIES = (
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default, aten.view_copy.default, aten.positive.default, aten.resolve_conj.default,
    aten.resolve_neg.default,
)  # fmt: skip
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
)  # fmt: skip
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
SPELLINGS: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor, aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor, aten.true_divide.Tensor: aten.div.Tensor, aten.subtract.Tensor: aten.sub.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor, aten.divide.Tensor: aten.div.Tensor, aten.negative.default: aten.neg.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor, aten.clamp_min.default: aten.clamp.default,
}  # fmt: skip
LOGIC: dict[Any, Any] = {
    aten.logical_and.default: aten.bitwise_and.Tensor, aten.logical_or.default: aten.bitwise_or.Tensor,
    aten.logical_not.default: aten.bitwise_not.default, aten.logical_xor.default: aten.bitwise_xor.Tensor,
}  # fmt: skip
NEUTRAL: dict[Any, int] = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
POWERS = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default}


def copy(node: fx.Node) -> Result:
    """A copy is the value it copies."""
    source = cast(fx.Node, node.args[0])
    return source if same_fact(source, node) else None


def cast_(node: fx.Node) -> Result:
    """Any conversion is `to(x, dtype)`; a conversion to the type it has is nothing."""
    source = cast(fx.Node, node.args[0])
    return source if same_fact(source, node) else Call(aten.to.dtype, (source, value(node).dtype))


def dropout(node: fx.Node) -> Result:
    """Dropout is nothing in inference."""
    source, probability, train = cast("tuple[fx.Node, float, bool]", node.args)
    return source if not train or probability == 0 else None


def spelling(node: fx.Node) -> Result:
    return Call(SPELLINGS[node.target], node.args, node.kwargs)


def logic(node: fx.Node) -> Result:
    """Logic of booleans is bitwise."""
    operands = [tensor(a) for a in node.args]
    if not all(x is not None and x.dtype == torch.bool for x in operands):
        return None
    return Call(LOGIC[node.target], node.args)


def neutral(node: fx.Node) -> Result:
    """x + 0, x - 0, x * 1, x / 1 are x."""
    source, other = node.args[:2]
    literal = isinstance(other, (int, float)) and other == NEUTRAL[node.target]
    return cast(fx.Node, source) if literal and same_fact(source, node) else None


def weight_second(node: fx.Node) -> Result:
    """A weight is the second operand of a sum or product of a value and a weight."""
    first, second = node.args[:2]
    swap = is_weight(first) and isinstance(second, fx.Node) and not is_weight(second) and not node.kwargs
    return Call(node.target, (second, first)) if swap else None  # type: ignore[arg-type]


def square(node: fx.Node) -> Result:
    """x * x and square(x) are x ** 2."""
    if value(node).dtype == torch.bool or (node.target is aten.mul.Tensor and node.args[0] is not node.args[1]):
        return None
    return Call(aten.pow.Tensor_Scalar, (node.args[0], 2))


def power(node: fx.Node) -> Result:
    """x ** 1 is x; the powers 1/2 and -1/2 are sqrt and rsqrt."""
    source, exponent = cast("tuple[fx.Node, float]", node.args)
    if exponent == 1 and same_fact(source, node):
        return source
    return Call(POWERS[exponent], (source,)) if exponent in POWERS else None


def reciprocal_root(node: fx.Node) -> Result:
    """1 / sqrt(x) is rsqrt(x)."""
    root = cast(fx.Node, node.args[0])
    return Call(aten.rsqrt.default, root.args) if root.target is aten.sqrt.default else None


def reverse_subtract(node: fx.Node) -> Result:
    """rsub(x, y) is y - x; from a number it is -x + y."""
    source, other = node.args[:2]
    if len(node.args) > 2 or node.kwargs:
        return None
    if isinstance(other, fx.Node):
        return Call(aten.sub.Tensor, (other, source))
    return Call(aten.add.Tensor, (Call(aten.neg.default, (source,)), other))


def clamp_of_nothing(node: fx.Node) -> Result:
    """A clamp between infinities is nothing."""
    a = arguments(node)
    low, high = a["min"], a["max"]
    free = (low is None or low == -math.inf) and (high is None or high == math.inf)
    return cast(fx.Node, node.args[0]) if free and same_fact(node.args[0], node) else None


def hardtanh(node: fx.Node) -> Result:
    """hardtanh and relu6 are clamps."""
    a = arguments(node)
    low, high = (0, 6) if node.target is aten.relu6.default else (a["min_val"], a["max_val"])
    return Call(aten.clamp.default, (node.args[0], low, high))


def embedding(node: fx.Node) -> Result:
    """The padding index of an embedding only concerns its gradient."""
    return Call(aten.embedding.default, node.args[:2])


RULES: dict[Any, tuple[Rule, ...]] = {
    **{target: (copy,) for target in COPIES},
    **{target: (cast_,) for target in CASTS},
    **{target: (dropout,) for target in DROPOUTS},
    **{target: (spelling,) for target in SPELLINGS},
    **{target: (logic,) for target in LOGIC},
    aten.add.Tensor: (neutral, weight_second),
    aten.mul.Tensor: (neutral, square, weight_second),
    aten.sub.Tensor: (neutral,),
    aten.div.Tensor: (neutral,),
    aten.square.default: (square,),
    aten.pow.Tensor_Scalar: (power,),
    aten.reciprocal.default: (reciprocal_root,),
    aten.rsub.Scalar: (reverse_subtract,),
    aten.rsub.Tensor: (reverse_subtract,),
    aten.clamp.default: (clamp_of_nothing,),
    aten.hardtanh.default: (hardtanh,),
    aten.relu6.default: (hardtanh,),
    aten.embedding.default: (embedding,),
}

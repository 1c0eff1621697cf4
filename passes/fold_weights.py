"""bn(x W^T + b) -> x (s W)^T + s b + t; s (x W^T) -> x (s W)^T; (s x) W^T -> x (W s)^T; s (q k^T): attention scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments, same_fact
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

aten = torch.ops.aten
LINEAR = aten.linear.default
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
SCALES = (aten.mul.Tensor, aten.div.Tensor)
SDPA = aten.scaled_dot_product_attention.default
ATTENTION = torch.ops.sylvester.attention.default
HEAD_VIEWS = (aten.reshape.default, aten.permute.default)
VALUES_AT_ONCE = 1 << 20
Answer = Refusal | bool
"""True: folded; False: nothing of this kind here; a refusal: found, but not foldable."""


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Folds in float64 and casts back. A scaled weight gets a new key; one that several calls share is left alone."""

    name: ClassVar[str] = "fold-weights"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        fold = Fold(program)
        for entry in program.entries.values():
            for step in STEPS:
                for node in entry.calls(*step.targets):
                    fold.visit(entry, node, step)
        return fold.changes


@dataclass(frozen=True)
class Step:
    """One kind of fold and the ops it starts from."""

    fold: Callable[[Fold, Entry, fx.Node], Answer]
    targets: tuple[Any, ...]


@dataclass
class Fold:
    """Scales weights; an equal scaling of a weight in another entry is the same new weight."""

    program: Program
    changes: Changes = field(default_factory=Changes)
    made: dict[tuple[str, bytes, int], str] = field(default_factory=dict)

    def visit(self, entry: Entry, node: fx.Node, step: Step) -> None:
        answer = step.fold(self, entry, node)
        if isinstance(answer, Refusal):
            self.changes.refuse(step.fold.__name__, answer, node)
        elif answer:
            self.changes.apply(step.fold.__name__, node)

    def tensor(self, node: object) -> Tensor | None:
        """A weight in float64, or None for anything else."""
        if not isinstance(node, fx.Node) or not is_weight(node):
            return None
        return self.program.weights[binding(node).key].double()

    def scale(self, entry: Entry, weight: fx.Node, factor: Tensor, axis: int) -> fx.Node:
        """The weight times `factor` (a scalar or a vector along `axis`), as a new weight."""
        key = binding(weight).key
        name = (key, factor.numpy().tobytes(), axis)
        if name not in self.made:
            old = self.program.weights[key]
            broadcast = factor.reshape([-1 if d == axis else 1 for d in range(old.dim())]) if factor.dim() else factor
            self.made[name] = self.keep(f"{key}.scaled", _scaled(old, broadcast.expand(old.shape)))
        new = self.made[name]
        return entry.bind("weight", new, self.program.weights[new])

    def keep(self, key: str, tensor: Tensor) -> str:
        """Store a tensor under a free key."""
        key = self.program.weights.fresh(key)
        self.program.weights[key] = tensor
        return key

    def affine(self, entry: Entry, op: fx.Node, factor: Tensor, shift: Tensor | None = None) -> None:
        """Let a linear or convolution give its result times `factor` plus `shift`, per output channel."""
        x, weight, bias = (*op.args, None)[:3]
        new = [x, self.scale(entry, cast(fx.Node, weight), factor, 0), bias]
        if shift is not None:
            old = self.tensor(bias)
            total = shift if old is None else old * factor + shift
            stem = binding(cast(fx.Node, weight)).key.removesuffix("weight")
            key = self.keep(f"{stem}bias.shifted", total.to(value(cast(fx.Node, weight)).dtype))
            new[2] = entry.bind("weight", key, self.program.weights[key])
        elif isinstance(bias, fx.Node):
            new[2] = self.scale(entry, bias, factor, 0)
        op.args = (*(new if new[2] is not None else new[:2]), *op.args[3:])


def _scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """The product in float64, cast back; only a slice of rows has a float64 copy."""
    if not weight.dim():
        return (weight.double() * factor).to(weight.dtype)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    rows = max(1, VALUES_AT_ONCE * len(weight) // max(1, weight.numel()))
    for made, old, by in zip(*(t.split(rows) for t in (result, weight, factor)), strict=True):
        made.copy_(old.double() * by)
    return result


def fold_attention_scale(fold: Fold, entry: Entry, node: fx.Node) -> Answer:
    """attention(q * s, k, v, scale) is attention(q, k, v, s * scale), for queries and keys."""
    folded = False
    for operand in node.args[:2]:
        if node.args.count(operand) > 1:
            continue
        product = _below_views(cast(fx.Node, operand))
        if product is None or product.target not in SCALES or not isinstance(product.args[1], (int, float)):
            continue
        source, factor = cast("tuple[fx.Node, float]", product.args)
        if not same_fact(source, product) or factor == 0:
            continue
        _set_scale(node, factor if product.target is aten.mul.Tensor else 1 / factor)
        _erase(entry, product, source)
        folded = True
    return folded


def _below_views(node: fx.Node) -> fx.Node | None:
    """What the views over a head are taken of, when nothing else uses it on the way."""
    while node.target in HEAD_VIEWS and len(node.users) == 1:
        node = cast(fx.Node, node.args[0])
    return node if len(node.users) == 1 else None


def _set_scale(node: fx.Node, factor: float) -> None:
    if node.target is ATTENTION:
        node.args = (*node.args[:5], cast(float, node.args[5]) * factor, *node.args[6:])
        return
    width = value(cast(fx.Node, node.args[0])).shape[-1]
    scale = arguments(node)["scale"]
    node.kwargs = {**node.kwargs, "scale": (width**-0.5 if scale is None else scale) * factor}


def fold_batch_norm(fold: Fold, entry: Entry, node: fx.Node) -> Answer:
    """A batch norm in inference is a scale and a shift per channel, of the weights before it where possible."""
    a = arguments(node)
    mean, variance = fold.tensor(a["running_mean"]), fold.tensor(a["running_var"])
    if a["training"] or mean is None or variance is None:
        return Refusal("batch norm uses the statistics of the batch", node)
    gain, bias = fold.tensor(a["weight"]), fold.tensor(a["bias"])
    factor = (variance + a["eps"]).rsqrt() * (1 if gain is None else gain)
    shift = (0 if bias is None else bias) - mean * factor
    source = cast(fx.Node, node.args[0])
    channels_second = source.target in CONVOLUTIONS or (source.target is LINEAR and value(source).dim() == 2)
    if channels_second and len(source.users) == 1 and not _shared(source):
        fold.affine(entry, source, factor, shift)
        _erase(entry, node, source)
    else:
        _standalone(fold, entry, node, factor, shift)
    return True


def _standalone(fold: Fold, entry: Entry, node: fx.Node, factor: Tensor, shift: Tensor) -> None:
    source, stat = cast("tuple[fx.Node, fx.Node]", (node.args[0], node.args[3]))
    shape, dtype = [-1, *[1] * (value(node).dim() - 2)], value(node).dtype
    stem = binding(stat).key.removesuffix("running_mean")
    keys = [fold.keep(f"{stem}{n}", t.reshape(shape).to(dtype)) for n, t in (("scale", factor), ("shift", shift))]
    scale, offset = (entry.bind("weight", key, fold.program.weights[key]) for key in keys)
    product = entry.emit(aten.mul.Tensor, source, scale, before=node, made_by=FoldWeights.name)
    _erase(entry, node, entry.emit(aten.add.Tensor, product, offset, before=node, made_by=FoldWeights.name))


def fold_output_scale(fold: Fold, entry: Entry, node: fx.Node) -> Answer:
    """A product or quotient with a number, or a weight per output channel, right after a linear or convolution."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target not in (LINEAR, *CONVOLUTIONS) or len(source.users) > 1:
        return False
    axis = -1 if source.target is LINEAR else -value(cast(fx.Node, source.args[1])).dim() + 1
    factor = _factor(fold, node, axis)
    if factor is None or not same_fact(source, node):
        return False
    if refusal := _shared(source):
        return refusal
    fold.affine(entry, source, factor)
    _erase(entry, node, source)
    return True


def fold_input_scale(fold: Fold, entry: Entry, node: fx.Node) -> Answer:
    """A product with a number, or a weight per channel, that only linears read."""
    source, users = node.args[0], list(node.users)
    if not isinstance(source, fx.Node) or not same_fact(source, node) or not users:
        return False
    factor = _factor(fold, node, -1)
    if factor is None or any(u.target is not LINEAR or u.args[0] is not node for u in users):
        return False
    if refusal := next((r for u in users if (r := _shared(u))), None):
        return refusal
    for user in users:
        weight = fold.scale(entry, cast(fx.Node, user.args[1]), factor, 1)
        user.args = (source, weight, *user.args[2:])
    _erase(entry, node, source)
    return True


def _factor(fold: Fold, node: fx.Node, axis: int) -> Tensor | None:
    """What a product or quotient multiplies by: a scalar, or a vector for a weight that varies along `axis` only."""
    other = node.args[1]
    factor = torch.tensor(other, dtype=torch.float64) if isinstance(other, (int, float)) else fold.tensor(other)
    if factor is None or not factor.all() or len(node.args) > 2 or node.kwargs:
        return None
    if factor.numel() == 1:
        factor = factor.reshape(())
    elif factor.dim() < -axis or factor.shape[axis] != factor.numel():
        return None
    else:
        factor = factor.flatten()
    return factor if node.target is aten.mul.Tensor else 1 / factor


def _shared(op: fx.Node) -> Refusal | None:
    """Why the weight and bias of `op` cannot be scaled for it alone."""
    weight, bias = (*op.args, None)[1:3]
    if not isinstance(weight, fx.Node) or not is_weight(weight):
        return Refusal("its weight is computed", op)
    if bias is not None and not is_weight(bias):
        return Refusal("its bias is computed", op)
    if len(weight.users) > 1:
        return Refusal(f"weight {binding(weight).key!r} is shared by {len(weight.users)} calls", op)
    return None


def _erase(entry: Entry, node: fx.Node, by: fx.Node) -> None:
    entry.replace(node, by)
    entry.graph.erase_node(node)


STEPS = (
    Step(fold_attention_scale, (SDPA, ATTENTION)),
    Step(fold_batch_norm, (aten.batch_norm.default,)),
    Step(fold_output_scale, SCALES),
    Step(fold_input_scale, SCALES),
)

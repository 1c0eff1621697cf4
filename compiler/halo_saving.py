"""A graph that trains, with 8 bits for what its ops save for the backward pass, where gradients bear it.

Products, norms, activations and attention read saved values as factors: an error of the value is one of the gradient.
Ops that divide by them, or take them as exponents, are not among these: logarithms, quotients, the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from sylvester.compiler.dataflow import reached
from sylvester.compiler.differentiable import fused_attention
from sylvester.compiler.halo_ops import HALO_LINEAR, level_of
from sylvester.compiler.halo_quantise import Rounded, format_of
from sylvester.compiler.halo_saved import LEAST, Keeper, Kind, Noise, Operand, Result, Sign
from sylvester.compiler.halo_segments import Segment

aten = torch.ops.aten
ROUNDED = frozenset({
    aten.mul.Tensor, aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default,
    aten.group_norm.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
    aten.hardswish.default, aten.mish.default, aten.softplus.default, aten.erf.default, aten.exp.default,
    aten.softmax.int, aten._softmax.default, aten.linear.default, aten.matmul.default, aten.mm.default,
    aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.convolution.default,
})  # fmt: skip
"""Ops whose saved activations are rounded; so are those of attention, and of squares and cubes."""
ATTENTION = (fused_attention, aten.scaled_dot_product_attention.default)
SAME_VALUES = frozenset({
    aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
    aten.flatten.using_ints, aten.contiguous.default,
})  # fmt: skip
GATES: dict[Any, Any] = {aten.silu.default: aten.silu_backward.default, aten.gelu.default: aten.gelu_backward.default}
"""Activations whose value is computed again from their operand, with their gradient."""
SMALL_PART = 8
"""What has so many times fewer values than the operands of an op is a scale or a statistic of rows."""


def saving(module: fx.GraphModule, inputs: Iterable[int]) -> fx.GraphModule:
    """The module with ops that keep what they save in 8 bits; `inputs` are positions of placeholders of activations."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    placeholders = graph.find_nodes(op="placeholder")
    data = reached([placeholders[i] for i in inputs])
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        keeper = graph.call_function(Keeper)
    wrapped = [(node, _weights(node, data)) for node in graph.nodes if node in data and node.op == "call_function"]
    for node, weights in reversed(wrapped):
        _wrap(graph, node, keeper, weights)
    for number, linears in enumerate(_shared_inputs(graph)):
        for linear in linears:
            _replace(graph, linear, linear_that_shares, keeper, number)
    found = fx.GraphModule({name: _part(part) for name, part in module.named_children()}, graph)
    found.graph.eliminate_dead_code()
    found.recompile()
    return found


def _part(found: nn.Module) -> nn.Module:
    """A block with its part of the graph, whose last placeholders are parameters."""
    if not isinstance(found, Segment):
        return found
    given = len(found.graph.graph.find_nodes(op="placeholder")) - len(found.places)
    return Segment(found.block, saving(found.graph, range(given)), found.places)


def counted(module: fx.GraphModule) -> dict[str, int]:
    """Ops whose saved activations are in 8 bits, by name, of a graph from `saving`."""
    parts = (part for part in module.children() if isinstance(part, Segment))
    found = sum((Counter(counted(part.graph)) for part in parts), Counter[str]())
    for node in module.graph.nodes:
        if node.target in (attending, attending_before_linear):
            found["attention"] += 1
        elif node.target is gated:
            found[f"{_name(node.args[1])} * x"] += 1
        elif node.target in (rounding, keeping_signs, keeping_noise):
            found[_name(node.args[1])] += 1
    return dict(found)


def _name(op: Any) -> str:
    return str(op._schema.name.split("::")[1])


def _weights(node: fx.Node, data: set[fx.Node]) -> tuple[int, ...]:
    """Places of arguments that no input decides."""
    return tuple(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node) and arg not in data)


def _wrap(graph: fx.Graph, node: fx.Node, keeper: fx.Node, weights: tuple[int, ...]) -> None:
    """Put what keeps 8 bits in the place of an op that can."""
    linear = output_layer(node) if node.target in ATTENTION else None
    if linear is not None:
        _replace(graph, node, attending_before_linear, keeper, node.target is fused_attention)
        _replace(graph, linear, linear_that_keeps, keeper)
    elif node.target in ATTENTION:
        _replace(graph, node, attending, keeper, node.target is fused_attention)
    elif (activation := _gate(node)) is not None:
        _gate_together(graph, node, activation, keeper)
    elif node.target is aten.relu.default:
        _replace(graph, node, keeping_signs, keeper, node.target)
    elif node.target is aten.dropout.default:
        _replace(graph, node, keeping_noise, keeper, node.target)
    elif node.target in ROUNDED or _is_power(node):
        _replace(graph, node, rounding, keeper, node.target, weights)


def _replace(graph: fx.Graph, node: fx.Node, function: Callable[..., Any], *before: Any) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(function, (*before, *node.args), node.kwargs)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def output_layer(node: fx.Node) -> fx.Node | None:
    """The linear layer that alone reads an attention, whose values it keeps over features."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is HALO_LINEAR and [i for i, arg in enumerate(user.args) if arg is node] == [0]:
            return user if _keeps_input(user) else None
        if user.target not in SAME_VALUES:
            return None
        node = user
    return None


def _keeps_input(linear: fx.Node) -> bool:
    """Whether a linear layer keeps what it multiplies with forward, in 8 bits."""
    level, format = cast(int, linear.args[3]), cast(str, linear.args[4])
    return not level_of(level).gradient.middle and not format_of(format).exact


def _shared_inputs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Linear layers that round the same tensor alike, in order, where there are several."""
    found: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=HALO_LINEAR):
        if _keeps_input(node):
            found.setdefault((node.args[0], *node.args[3:5]), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _gate(node: fx.Node) -> fx.Node | None:
    """The activation of f(x) y, which nothing else reads."""
    if node.target is not aten.mul.Tensor:
        return None
    factors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    found = (f for f in factors if f.target in GATES and len(f.users) == 1)
    return next(found, None) if len(set(factors)) == 2 else None


def _gate_together(graph: fx.Graph, node: fx.Node, activation: fx.Node, keeper: fx.Node) -> None:
    other = next(arg for arg in node.args if arg is not activation)
    target = cast(Any, activation.target)
    with graph.inserting_before(node):
        new = graph.call_function(gated, (keeper, target, activation.args[0], other), activation.kwargs)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_power(node: fx.Node) -> bool:
    return node.target is aten.pow.Tensor_Scalar and node.args[1] in (2, 3)


def rounding(keeper: Keeper, op: Any, weights: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """An op whose saved activations are rounded; `weights` are places of arguments that are none."""
    with keeper.around(_kind(Kind, args, weights)):
        return op(*args, **options)


def keeping_signs(keeper: Keeper, op: Any, x: Tensor) -> Any:
    with keeper.around(_kind(Sign, (x,))):
        return op(x)


def keeping_noise(keeper: Keeper, op: Any, x: Tensor, share: float, train: bool) -> Any:
    with keeper.around(_kind(Noise, (x,), share=1 - share)):
        return op(x, share, train)


def attending(
    keeper: Keeper, fused: bool, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *args: Any, **options: Any
) -> Any:
    """Attention that keeps q, k, v and its result in 8 bits; masks, which may be infinite, as they are."""
    with keeper.around(_kind(Kind, (q, k, v, mask), (3,))):
        return _attention(fused)(q, k, v, mask, *args, **options)


def attending_before_linear(
    keeper: Keeper, fused: bool, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *args: Any, **options: Any
) -> Any:
    """The same where a linear layer keeps the result."""
    with keeper.around(_kind(Result, (q, k, v, mask), (3,), operands=tuple(map(Operand.of, (q, k, v))))):
        return _attention(fused)(q, k, v, mask, *args, **options)


def _attention(fused: bool) -> Callable[..., Any]:
    return fused_attention if fused else cast(Callable[..., Any], aten.scaled_dot_product_attention.default)


def linear_that_keeps(keeper: Keeper, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """`halo_linear`, whose rounded x is kept once, for it and for the attention that gave x."""
    with keeper.seeing() as saved:
        y = HALO_LINEAR(x, weight, *args)
        if saved and weight.requires_grad:
            keeper.offer(x, Rounded(*saved[:2]), level_of(args[1]).forward.middle)
    keeper.settle()
    return y


def linear_that_shares(keeper: Keeper, number: int, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    """`halo_linear`, whose x is rounded and kept once for all layers that read it."""
    given = keeper.inputs.get(number, (None, None))
    with keeper.seeing() as saved:
        y = HALO_LINEAR(x, weight, *args, None, None, *given)
        if saved and weight.requires_grad:
            keeper.inputs.setdefault(number, Rounded(*saved[:2]))
    return y


def gated(keeper: Keeper, activation: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """f(x) y, which saves x and y alone."""
    with keeper.around(_kind(Kind, (x, y))):
        if x.shape == y.shape and x.dtype == y.dtype:
            return cast(Callable[..., Tensor], Gated.apply)(x, y, activation, options)
        return cast(Tensor, activation(x, **options) * y)


class Gated(torch.autograd.Function):
    """f(x) y; the backward pass computes f(x) again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, activation: Any, options: Mapping[str, Any]) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.activation, ctx.options = activation, options
        return cast(Tensor, activation(x, **options) * y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        dx = GATES[ctx.activation](given * y, x, **ctx.options) if ctx.needs_input_grad[0] else None
        dy = given * ctx.activation(x, **ctx.options) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None


def _kind(cls: type[Kind], args: Iterable[Any], weights: tuple[int, ...] = (), **options: Any) -> Kind:
    tensors = {i: arg for i, arg in enumerate(args) if isinstance(arg, Tensor)}
    largest = max((x.numel() for i, x in tensors.items() if i not in weights), default=0)
    left = tuple(Operand.of(tensors[i]) for i in weights if i in tensors)
    return cls(left, max(LEAST, largest // SMALL_PART), **options)

"""layer_norm(x) -> rms_norm(x M) with M = I - 1 1^T / d folded into all that writes x; epsilon stays the same."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.program import Entry, Program, binding, is_weight
from sylvester.compiler.quantized_ops import ATTENTIONS
from sylvester.compiler.space_rules import infer
from sylvester.compiler.spaces import Axis, Space

aten = torch.ops.aten
EMBEDDING, LINEAR, LAYER_NORM = aten.embedding.default, aten.linear.default, aten.layer_norm.default
RMS_NORM = torch.ops.sylvester.rms_norm.default
NONLINEAR = (RMS_NORM, *ATTENTIONS)
"""Ops that commute with rotations, but not with taking the mean away."""
MADE_BY = "fold-norms"


def center_streams(program: Program, changes: Changes) -> None:
    """Every stream that only layer norms read loses its mean, which they would take away; plain ones become RMS norms.

    A table that something else reads too is left alone, and what it gives is centred at run time.
    """
    for space in infer(program, plain_linears=True):
        norms = [pin.user for pin in space.read() if pin.user is not None and pin.user.target is LAYER_NORM]
        plain = [norm for norm in dict.fromkeys(norms) if arguments(norm)["weight"] is arguments(norm)["bias"] is None]
        if not plain:
            continue
        refusal = _refusal(program, space)
        if not refusal and len(_at_run_time(program, space)) >= len(plain):
            refusal = Refusal("centring it at run time costs as much as its layer norms do")
        if refusal:
            changes.refuse("centre", refusal, plain[0])
            continue
        _center(program, space, changes)
        for norm in plain:
            entry = program.entry_of(norm)
            x, eps = norm.args[0], arguments(norm)["eps"]
            entry.replace(norm, entry.emit(RMS_NORM, x, None, eps, before=norm, made_by=MADE_BY))
            changes.apply("layer norm to RMS norm", norm)


def _refusal(program: Program, space: Space) -> Refusal | None:
    if space.slots or space.sizes != {space.width}:
        return Refusal("the stream is used in parts")
    for pin in (*space.stored(), *space.read()):
        if pin.kind != "read" or pin.user is None or pin.user.target is not LAYER_NORM:
            return Refusal(f"not only layer norms read the stream: {pin.reason}", pin.user or pin.node)
        if len(arguments(pin.user)["normalized_shape"]) != 1 or space.nodes[pin.node] != 1:
            return Refusal("the layer norm is not over the features of the stream", pin.user)
    for user in (user for node in space.nodes for user in node.users):
        if user.target in NONLINEAR:
            return Refusal("not only layer norms read the stream", user)
    for axis in space.axes:
        outside = _outside(program, axis, space)
        if outside and not _looked_up(program, axis, space):
            return Refusal(f"{axis.key} is read by more than the stream", outside[0])
    return None


def _center(program: Program, space: Space, changes: Changes) -> None:
    for node in _at_run_time(program, space):
        _center_at_run_time(program.entry_of(node), node, space, changes)
    for axis in space.axes:
        if not _outside(program, axis, space):
            program.weights[axis.key] = centered(program.weights[axis.key], axis.axis)


def _at_run_time(program: Program, space: Space) -> list[fx.Node]:
    """Values that no weight can centre: results of other ops, and rows of tables that something else reads too."""
    shared = {axis.key for axis in space.axes if _outside(program, axis, space)}
    looked_up = [n for n in space.nodes if n.target is EMBEDDING and _key(n.args[0]) in shared]
    return [*looked_up, *(node for node in space.made() if space.inside(node))]


def _outside(program: Program, axis: Axis, space: Space) -> list[fx.Node]:
    """The users of a weight that do not write this axis of it to the stream."""
    users = program.users(axis.key)
    return [user for user in users if user not in space.nodes or (user.target is LINEAR and axis.axis == 1)]


def _center_at_run_time(entry: Entry, node: fx.Node, space: Space, changes: Changes) -> None:
    """The stream and the layer norms that read it there get the difference; other readers keep the value."""
    norms = [pin.user for pin in space.read() if pin.node is node and pin.user is not None]
    users, after = [*space.inside(node), *norms], node.next
    mean = entry.emit(aten.mean.dim, node, [-space.nodes[node]], True, before=after, made_by=MADE_BY)
    difference = entry.emit(aten.sub.Tensor, node, mean, before=after, made_by=MADE_BY)
    for user in users:
        user.replace_input_with(node, difference)
    changes.apply("centre at run time", node)


def centered(weight: Tensor, axis: int) -> Tensor:
    """The weight minus its mean along the axis, in float64 a few rows or columns at a time."""
    result, other = torch.empty_like(weight, memory_format=torch.contiguous_format), 0 if axis else weight.dim() - 1
    if weight.dim() == 1:
        return (weight.double() - weight.double().mean()).to(weight.dtype)
    size = max(1, (1 << 20) * weight.shape[other] // max(1, weight.numel()))
    for new, old in zip(result.split(size, other), weight.split(size, other), strict=True):
        new.copy_(old.double() - old.double().mean(axis, keepdim=True))
    return result


def _looked_up(program: Program, axis: Axis, space: Space) -> bool:
    """Whether the stream takes the weight only by embeddings, which can be centred after them."""
    outside = _outside(program, axis, space)
    return all(user.target is EMBEDDING for user in program.users(axis.key) if user not in outside)


def _key(weight: object) -> str:
    return binding(weight).key if isinstance(weight, fx.Node) and is_weight(weight) else ""

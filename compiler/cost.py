"""Flops and bytes of nodes and programs, at the example sizes (a symbolic size counts as its hint)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.ops import NAMESPACE, OPS, Cost
from sylvester.compiler.program import Entry, Program, value

aten = torch.ops.aten
MATMULS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
FREE = (aten.reshape.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim)


def hint(size: Any) -> int:
    """The concrete example size behind a possibly symbolic one."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(hint(n) for n in tensor.shape)


def concrete(val: Any) -> Any:
    """A meta tensor of the example sizes for a fake one; other values with their hints."""
    if isinstance(val, Tensor):
        return torch.empty(shape(val), dtype=val.dtype, device="meta")
    return hint(val) if isinstance(val, (torch.SymInt, int)) and not isinstance(val, bool) else val


def node_cost(node: fx.Node) -> Cost:
    """Work of one op call; views are free."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, Tensor) or node.target in FREE:
        return Cost(0, 0)
    args = map_arg(node.args, lambda n: concrete(value(n)))
    kwargs = map_arg(dict(node.kwargs), lambda n: concrete(value(n)))
    name = str(node.target).split(".")
    if name[0] == NAMESPACE:
        return OPS[name[1]].cost(*args, **kwargs)
    result = concrete(val)
    tensors = [t for t in args if isinstance(t, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in [*tensors, result])
    return Cost(_flops(node, tensors, result), moved)


def _flops(node: fx.Node, operands: list[Tensor], result: Tensor) -> int:
    if node.target is aten.linear.default:
        return 2 * result.numel() * operands[1].shape[-1]
    if node.target in MATMULS:
        return 2 * result.numel() * operands[0].shape[-1]
    if "conv" in str(node.target):
        return 2 * result.numel() * math.prod(operands[1].shape[1:])
    if node.target is aten.scaled_dot_product_attention.default:
        return 4 * result.numel() * operands[1].shape[-2]
    return result.numel()


def entry_cost(entry: Entry) -> Cost:
    """Sum over the nodes of an entry."""
    costs = [node_cost(node) for node in entry.calls()]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))


def program_cost(program: Program) -> Cost:
    """Sum over all entries."""
    costs = [entry_cost(entry) for entry in program.entries.values()]
    return Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))

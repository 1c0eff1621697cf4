"""Does a row of a batch depend only on itself? From what each op does along the axis whose size is the batch."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from sylvester.compiler.changes import Refusal
from sylvester.compiler.positions import token_axes
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.token_axis import mixes

NAMESPACE = "sylvester"
aten = torch.ops.aten
SIZES = {aten.sym_size.int}
LEADING = {
    aten.reshape.default, aten.conv1d.default, aten.conv2d.default, aten.max_pool2d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default, aten.group_norm.default,
}  # fmt: skip
"""What stands along the first axis stays apart; a reshape cuts rows that follow each other into what follows."""


def dependences(program: Program) -> dict[str, Refusal]:
    """Of entries with a symbolic batch, the first op that may let a row depend on another; good ones are left out.

    Dialect ops treat what stands along their first axis one by one; caches that hold what all rows begin with are an
    operand, no dependence. An op that is not known is reported.
    """
    found = {name: dependence(entry) for name, entry in program.entries.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def dependence(entry: Entry) -> Refusal | None:
    symbol = batch_symbol(entry)
    if symbol is None:
        return None
    return next((why for node in entry.calls() if (why := _mixes_rows(node, symbol))), None)


def batch_symbol(entry: Entry) -> sympy.Symbol | None:
    """The size of the first axis of the inputs, where it is any."""
    for node in entry.placeholders("input"):
        fact = value(node)
        if fact.ndim and isinstance(fact.shape[0], torch.SymInt) and fact.shape[0].node.expr.is_Symbol:
            symbol: sympy.Symbol = fact.shape[0].node.expr
            return symbol
    return None


def _mixes_rows(node: fx.Node, symbol: sympy.Symbol) -> Refusal | None:
    if node.target in SIZES:
        return None
    why = mixes(node, symbol)
    apart = _is_dialect(node) or node.target in LEADING
    if why is None or (apart and _leads(node, symbol)):
        return None
    return Refusal(why.reason.replace("tokens", "rows of a batch"), node)


def _is_dialect(node: fx.Node) -> bool:
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def _leads(node: fx.Node, symbol: sympy.Symbol) -> bool:
    """The batch is the first axis of everything that has it."""
    facts = [value(operand) for operand in node.all_input_nodes]
    results = value(node) if isinstance(value(node), tuple | list) else [value(node)]
    tensors = [fact for fact in (*facts, *results) if isinstance(fact, Tensor)]
    return all(token_axes(fact, symbol) in ([], [0]) for fact in tensors)

"""Run-time branches of a plan: what only one `add_where` reads is not run when its mask has no row set.

y = x + where(m, f(x), 0)   ->   y = x; if any(m): y = x + where(m, f(x), 0)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sylvester.codegen.index import index
from sylvester.codegen.lazy import Buffer, Indices, Lazy, Store, of_buffer
from sylvester.codegen.scalar import Call, Constant, Expr
from sylvester.compiler import skip_ops  # noqa: F401  (registers the op below)
from sylvester.compiler.program import Entry, is_weight

if TYPE_CHECKING:
    from sylvester.codegen.lowering import Lowering

ADD_WHERE = torch.ops.sylvester.add_where.default


@dataclass(frozen=True)
class Opened:
    """A branch that is being lowered: the flag its steps depend on, and the sum, which holds x so far."""

    flag: str
    x: Lazy
    mask: Lazy
    total: Buffer


def branches(entry: Entry) -> dict[fx.Node, fx.Node]:
    """Node -> the `add_where` that alone needs it; the sums themselves are in it too, where anything else is."""
    found: dict[fx.Node, fx.Node] = {}
    for end in entry.calls(ADD_WHERE):
        inside = _inside(end)
        if len(inside) > 1:
            found |= dict.fromkeys(inside, end)
    return found


def _inside(end: fx.Node) -> set[fx.Node]:
    """What is only needed for the second operand of a sum and comes after its mask, and the sum."""
    x, part, mask = (a for a in end.args if isinstance(a, fx.Node))
    inside, waiting = {end}, [part]
    while waiting:
        node = waiting.pop()
        own = node.op == "call_function" and node not in (x, mask) and all(u in inside for u in node.users)
        if own and mask < node and node not in inside:
            inside.add(node)
            waiting += node.all_input_nodes
    return inside


def open_branch(lowering: Lowering, end: fx.Node, inside: set[fx.Node]) -> Opened:
    """Everything the branch reads is in memory before it begins, so that no step in it serves one outside."""
    for node in _read_from_outside(inside):
        made = lowering.value_of(node)
        if isinstance(made, Lazy):
            lowering.kept(made)
    x, mask = (lowering.value_of(end.args[n]) for n in (0, 2))  # type: ignore[arg-type]
    lowering.reduce("max", (index(1),), mask.shape, mask.dtype, lambda _, i: mask.load(i))
    flag = lowering.plan.steps[-1].buffer  # type: ignore[union-attr]
    total = lowering.buffer("arena", x.shape, x.dtype)
    lowering.plan.steps.append(Store(total.name, x.shape, x.dtype, x.load, total.offset))
    return Opened(flag, x, mask, total)


def _read_from_outside(inside: set[fx.Node]) -> Iterator[fx.Node]:
    seen = {u for node in inside for u in node.all_input_nodes if u not in inside and not is_weight(u)}
    yield from sorted(u for u in seen if isinstance(u.meta.get("val"), torch.Tensor))


def close_branch(lowering: Lowering, opened: Opened, part: Lazy) -> Lazy:
    """The rows of the mask get what the branch computed."""
    total = opened.total
    store = Store(total.name, total.shape, total.dtype, sum_where(opened.x, part, opened.mask), total.offset)
    lowering.plan.steps.append(store)
    return of_buffer(total)


def sum_where(x: Lazy, part: Lazy, mask: Lazy) -> Any:
    """x + part where the mask of the row is set, else x."""

    def load(i: Indices) -> Expr:
        own = x.load(i)
        is_set = Call("gt", (mask.load(i[:-1]), Constant(0.0, "f32")), "b8")
        return Call("where", (is_set, Call("add", (own, part.at(i)), own.dtype), own), own.dtype)

    return load

"""Run-time branches of a plan: what only one `add_unless` reads is not run when every row skips it.

y = where(n > 0, x, x + f(x))   ->   y = x; if any(n <= 0): y = where(n > 0, x, x + f(x))

Caches that only such a part updates are updated in its branch.
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

ADD_UNLESS = torch.ops.sylvester.add_unless.default
UPDATE_UNLESS = torch.ops.sylvester.update_unless.default


@dataclass(frozen=True)
class Opened:
    """A branch that is being lowered: the flag its steps depend on, and the sum, which holds x so far."""

    flag: str
    x: Lazy
    left: Lazy
    total: Buffer


def branches(entry: Entry) -> dict[fx.Node, fx.Node]:
    """Node -> the `add_unless` that alone needs it; the sums themselves are in it too, where anything else is."""
    found: dict[fx.Node, fx.Node] = {}
    for end in entry.calls(ADD_UNLESS):
        inside = _inside(end)
        if len(inside) > 1:
            found |= dict.fromkeys(inside, end)
    return found


def _inside(end: fx.Node) -> set[fx.Node]:
    """What is only needed for the second operand of a sum, or for its caches, and comes after its counts; the sum."""
    x, part, left = (a for a in end.args if isinstance(a, fx.Node))
    caches = [user for user in left.users if user.target is UPDATE_UNLESS]
    inside, waiting = {end, *caches}, [part, *(node for cache in caches for node in cache.all_input_nodes)]
    while waiting:
        node = waiting.pop()
        own = node.op == "call_function" and node not in (x, left) and all(u in inside for u in node.users)
        if own and left < node and node not in inside:
            inside.add(node)
            waiting += node.all_input_nodes
    return inside


def calls_before(inside: set[fx.Node]) -> list[fx.Node]:
    """The calls that a branch depends on, in graph order."""
    found: set[fx.Node] = set()
    waiting = [u for node in inside for u in node.all_input_nodes]
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in inside and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return sorted(found)


def open_branch(lowering: Lowering, end: fx.Node, inside: set[fx.Node]) -> Opened:
    """Everything the branch reads is in memory before it begins, so that no step in it serves one outside."""
    for node in _read_from_outside(inside):
        made = lowering.value_of(node)
        if isinstance(made, Lazy):
            lowering.kept(made)
    x, left = (lowering.value_of(end.args[n]) for n in (0, 2))  # type: ignore[arg-type]
    flag = _flag(lowering, left)
    total = lowering.buffer("arena", x.shape, x.dtype)
    lowering.plan.steps.append(Store(total.name, x.shape, x.dtype, x.load, total.offset))
    return Opened(flag, x, left, total)


def _flag(lowering: Lowering, left: Lazy) -> str:
    """The buffer [1] of the least count: a single one is that itself."""
    if all(n.constant == 1 for n in left.shape):
        return lowering.contiguous(left).name
    lowering.reduce("min", (index(1),), left.shape, left.dtype, lambda _, i: left.load(i))
    return lowering.plan.steps[-1].buffer  # type: ignore[union-attr]


def _read_from_outside(inside: set[fx.Node]) -> Iterator[fx.Node]:
    seen = {u for node in inside for u in node.all_input_nodes if u not in inside and not is_weight(u)}
    yield from sorted(u for u in seen if isinstance(u.meta.get("val"), torch.Tensor))


def close_branch(lowering: Lowering, opened: Opened, part: Lazy) -> Lazy:
    """The rows that do not skip it get what the branch computed."""
    total = opened.total
    store = Store(total.name, total.shape, total.dtype, sum_unless(opened.x, part, opened.left), total.offset)
    lowering.plan.steps.append(store)
    return of_buffer(total)


def sum_unless(x: Lazy, part: Lazy, left: Lazy) -> Any:
    """x where the row skips the part, else x + part."""

    def load(i: Indices) -> Expr:
        own = x.load(i)
        skips = Call("gt", (left.at(i[:-1]), Constant(0.0, "f32")), "b8")
        return Call("where", (skips, own, Call("add", (own, part.at(i)), own.dtype)), own.dtype)

    return load

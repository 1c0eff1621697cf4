"""prefill -> start, which gives the logits of the last token only: select(f(x), last) -> f(select(x, last))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.check import TIGHT, TOLERANCE, random_state, relative_error
from sylvester.compiler.errors import ContractBroken, Unsupported
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.positions import has, token_axes
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.token_axis import mixes

aten = torch.ops.aten
PREFILL, START = "prefill", "start"


@dataclass(frozen=True)
class LastLogits(Pass):
    """Entry `start` beside `prefill`, over the same weights: all keys and values, logits [batch, 1, vocabulary].

    Ops that treat each token by itself and feed nothing else see the last token only: the head, the last norm, and what
    follows the last attention. With `check`, the logits are compared with those of `prefill`.
    """

    name: ClassVar[str] = "last-logits"
    contract: ClassVar[Contract] = "exact"
    check: bool = True

    def requires(self, program: Program) -> None:
        if PREFILL not in program.entries or not program.state:
            raise Unsupported(f"no entry {PREFILL!r} with caches, found {list(program.entries)}", hint="derive-decode")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        entry = program.entries[PREFILL].clone()
        symbol = value(entry.placeholders("input")[0]).shape[1].node.expr
        logits = _keep_logits(entry)
        sliced = _per_token(entry, logits, symbol)
        if logits not in sliced:
            changes.refuse("logits", Refusal("it is not known to treat each token by itself", logits))
            return changes
        for node in _slice(entry, sliced, logits, symbol):
            changes.apply("per-token", node)
        entry.sweep()
        program.entries[START] = entry
        if self.check and entry.examples:
            _self_check(program)
        return changes


def _keep_logits(entry: Entry) -> fx.Node:
    """Drop all outputs but the logits and the caches; returns the logits."""
    names = [o.name for o in entry.outputs if o.kind == "output"]
    wanted = "logits" if "logits" in names else names[0]
    pairs = list(zip(entry.outputs, entry.results(), strict=True))
    kept = [(o, n) for o, n in pairs if o.kind == "state" or o.name == wanted]
    entry.outputs = [o for o, _ in kept]
    entry.graph.output_node().args = (tuple(n for _, n in kept),)
    return next(n for o, n in kept if o.name == wanted)


def _per_token(entry: Entry, logits: fx.Node, symbol: sympy.Symbol) -> set[fx.Node]:
    """Calls of which only the last token matters: `logits`, and those that nothing but such calls reads."""
    found: set[fx.Node] = set()
    for node in reversed(entry.calls()):
        wanted = node is logits or (node.users and all(user in found for user in node.users))
        if wanted and _sliceable(node, symbol):
            found.add(node)
    return found


def _sliceable(node: fx.Node, symbol: sympy.Symbol) -> bool:
    """A tensor of whole tokens that comes token by token from tensors of whole tokens."""
    operands = [n for n in node.all_input_nodes if token_axes(n.meta.get("val"), symbol)]
    if not operands or not all(_has_token_axis(n, symbol) for n in (node, *operands)):
        return False
    sized = [n for n in node.all_input_nodes if has(n.meta.get("val"), symbol)]
    plain = node.target is aten.reshape.default and all(value(n).node.expr == symbol for n in sized)
    return (plain or not sized) and mixes(node, symbol) is None


def _has_token_axis(node: fx.Node, symbol: sympy.Symbol) -> bool:
    fact = node.meta.get("val")
    axes = token_axes(fact, symbol)
    return len(axes) == 1 and bool(cast(Any, fact).shape[axes[0]].node.expr == symbol)


def _slice(entry: Entry, sliced: set[fx.Node], logits: fx.Node, symbol: sympy.Symbol) -> list[fx.Node]:
    """Compute `sliced` for the last token; returns the new nodes, the logits last."""
    last: dict[fx.Node, Any] = {}
    for node in [n for n in entry.calls() if n in sliced]:
        for operand in node.all_input_nodes:
            if operand not in last:
                last[operand] = _last(entry, operand, symbol, node)
        args, kwargs = map_arg((node.args, dict(node.kwargs)), last.__getitem__)
        last[node] = entry.emit(node.target, *args, before=node, made_by="last-logits", **kwargs)  # type: ignore[arg-type]
    entry.replace(logits, last[logits])
    return [last[n] for n in last if n in sliced]


def _last(entry: Entry, operand: fx.Node, symbol: sympy.Symbol, before: fx.Node) -> Any:
    """An operand for the last token alone: a tensor keeps its token axis, a number of tokens is 1."""
    fact = value(operand)
    if has(fact, symbol):
        return 1
    if not token_axes(fact, symbol):
        return operand
    axis = token_axes(fact, symbol)[0]
    row = entry.emit(aten.select.int, operand, axis, -1, before=before, made_by="last-logits")
    return entry.emit(aten.unsqueeze.default, row, axis, before=before, made_by="last-logits")


def _self_check(program: Program) -> None:
    """The last logits and all caches are those of `prefill`."""
    prefill = program.entries[PREFILL]
    state = random_state(program, prefill)
    whole, found = (program.run(name, prefill.examples, state) for name in (PREFILL, START))
    for output in program.entries[START].outputs:
        expected = whole[output.name] if output.kind == "state" else whole[output.name][:, -1:]
        error, allowed = relative_error(expected, found[output.name]), TOLERANCE.get(expected.dtype, TIGHT)
        if not error <= allowed:
            where = f"{output.name!r} of {START!r} differs from {PREFILL!r}"
            raise ContractBroken(f"{where} by {error:.1e}, expected at most {allowed:.0e}")

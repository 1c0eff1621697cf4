"""Any graph -> the same values in one spelling: few ops, no views, no copies, nothing computed twice or for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from torch import fx
from torch.fx.node import map_arg

from sylvester.compiler.calls import Call, Result, Rule, known, normal, resized, retarget, tensor
from sylvester.compiler.changes import Changes
from sylvester.compiler.common_subexpressions import CommonValues
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program
from sylvester.passes import simplify_arithmetic, simplify_linear, simplify_masks, simplify_slices, simplify_views

SWEEPS = 20
STEPS = 20
FAMILIES = (simplify_views, simplify_slices, simplify_arithmetic, simplify_masks, simplify_linear)
TABLES = [family.RULES for family in FAMILIES]
RULES: dict[Any, tuple[Rule, ...]] = {
    target: tuple(chain.from_iterable(table.get(target, ()) for table in TABLES))
    for target in chain.from_iterable(TABLES)
}


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Sweeps of local rules and sharing, until nothing changes. Facts are reused: only new inner calls compute one."""

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        changes = Changes()
        for entry in program.entries.values():
            changes.extend(canonicalize(entry))
        return changes


def canonicalize(entry: Entry) -> Changes:
    """Bring one entry into normal form."""
    changes = Changes()
    specialise(entry)
    for _ in range(SWEEPS):
        before = len(changes.applied)
        share(entry, changes)
        entry.sweep()
        for node in entry.calls():
            simplify(entry, node, changes)
        if len(changes.applied) == before:
            return changes
    raise CompileError(f"no normal form after {SWEEPS} sweeps", hint=f"still applied: {changes.applied[-1].rule}")


def specialise(entry: Entry) -> None:
    """Sizes that a guard of the trace has fixed become numbers in the facts."""
    for node in entry.graph.nodes:
        fact = tensor(node)
        if fact is not None and any(known(n) is not n for n in fact.shape):
            node.meta["val"] = resized(fact, [known(n) for n in fact.shape], fact.dtype)


def share(entry: Entry, changes: Changes) -> None:
    """Equal calls become one, operands first."""
    common = CommonValues()
    for node in entry.calls():
        twin = common.twin(node)
        if twin is not None:
            changes.apply("common_subexpression", node)
            _substitute(entry, node, twin)


def simplify(entry: Entry, node: fx.Node, changes: Changes) -> None:
    """Rewrite one call until no rule applies or it gives way to another value."""
    for _ in range(STEPS):
        call = normal(Call(node.target, node.args, node.kwargs))  # type: ignore[arg-type]
        node.args, node.kwargs = call.args, dict(call.kwargs)
        rule, result = _first_result(node)
        if rule is None:
            return
        changes.apply(rule.__name__.strip("_"), node)
        if not isinstance(result, Call):
            _substitute(entry, node, result)
            return
        retarget(entry, node, result, made_by=Canonicalize.name)
    raise CompileError(f"no normal form after {STEPS} steps", at=node)


def _first_result(node: fx.Node) -> tuple[Rule | None, Result]:
    for rule in RULES.get(node.target, ()):
        result = rule(node)
        if result is not None and not _says_the_same(result, node):
            return rule, result
    return None, None


def _says_the_same(result: Result, node: fx.Node) -> bool:
    if not isinstance(result, Call) or result.target is not node.target:
        return False
    call = normal(result)
    return call.args == node.args and call.kwargs == node.kwargs


def _substitute(entry: Entry, node: fx.Node, by: Any) -> None:
    """Users of `node` take `by`, a node or a number."""
    if isinstance(by, fx.Node):
        entry.replace(node, by)
    else:
        for user in list(node.users):
            user.args = map_arg(user.args, lambda n: by if n is node else n)
            user.kwargs = map_arg(user.kwargs, lambda n: by if n is node else n)
    entry.graph.erase_node(node)

"""A program -> one translation unit and, per entry, the order of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sylvester.codegen import (
    aten_activations,
    aten_factories,
    aten_indexing,
    aten_norms,
    aten_pointwise,
    aten_reductions,
    aten_views,
    attention_calls,
    combined,
    convolution,
    dialect,
    families,
    linears,
    low_bit,
    pooling,
    rotations,
    skipping,
    sparse_layers,
)
from sylvester.codegen.combined import atom_layouts
from sylvester.codegen.epilogue import fuse_epilogues
from sylvester.codegen.fusions import fusions
from sylvester.codegen.index import Size, Var, atom, flatten, product
from sylvester.codegen.layout import Layout
from sylvester.codegen.lazy import Buffer, Extern, Linear, Plan, Store
from sylvester.codegen.linear import linear_extern
from sylvester.codegen.linear_groups import linear_groups
from sylvester.codegen.linears import lower_group, stored_weight
from sylvester.codegen.lowering import Lowering, StoredLayers, require_lowerings
from sylvester.codegen.plan import Unit
from sylvester.codegen.problems import problems_of, worth_tuning
from sylvester.codegen.reads import step_reads
from sylvester.codegen.scalar import Load
from sylvester.codegen.shapes import size
from sylvester.codegen.space import Problem
from sylvester.codegen.sparse_layers import strided_layouts
from sylvester.codegen.web_problems import Uses, add_uses
from sylvester.compiler.ledger import Fusion
from sylvester.compiler.program import Entry, Program, value

REGISTERED = (
    aten_activations, aten_factories, aten_indexing, aten_norms, aten_pointwise, aten_reductions, aten_views,
    attention_calls, combined, convolution, dialect, families, linears, low_bit, pooling, rotations,
    skipping, sparse_layers,
)  # fmt: skip
"""Every module whose import registers lowerings."""


@dataclass(frozen=True)
class Compiled:
    """Per entry: the stored tensors in the order of their pointers, and what the kernels may be tuned for.

    `panels`: what a page may choose micro-kernels for.
    """

    unit: Unit
    weights: Mapping[str, tuple[Layout, ...]]
    problems: Mapping[str, Counter[Problem]]
    fusions: tuple[Fusion, ...]
    panels: Uses


def compile_program(program: Program) -> Compiled:
    """Lower every entry; `Unsupported` lists the ops that have no lowering."""
    unit, weights, problems, fused = Unit(), {}, {}, []
    panels: Uses = {}
    for name, plan in plans(program).items():
        hints = hints_of(program.entries[name])
        outputs = [in_place(plan, b) for b in plan.of_kind("output")]
        problems[name] = problems_of(plan, hints)
        add_uses(panels, plan)
        fused += fuse(plan, hints)
        unit.add(plan, outputs, hints)
        weights[name] = tuple(b.layout for b in plan.of_kind("weight") if b.layout)
    return Compiled(unit, weights, worth_tuning(problems), tuple(fused), panels)


def program_problems(program: Program) -> dict[str, Counter[Problem]]:
    """What the kernels of every entry may be tuned for."""
    found = {name: problems_of(plan, hints_of(program.entries[name])) for name, plan in plans(program).items()}
    return worth_tuning(found)


def plans(program: Program) -> dict[str, Plan]:
    """Every entry as steps in graph order, nothing fused yet but linear layers over one input."""
    require_lowerings(program.entries.values())
    groups = linear_groups(program)
    single = {g.weights[0]: stored_weight(g) for found in groups.values() for g in found.values() if len(g.nodes) == 1}
    single |= atom_layouts(program)
    single |= strided_layouts(program)
    return {
        name: Lowering(name, program, entry, StoredLayers(groups[name], single, lower_group)).run()
        for name, entry in program.entries.items()
    }


def fuse(plan: Plan, hints: Mapping[Size, int]) -> list[Fusion]:
    """Put elementwise work into the kernels of linear layers, make those calls, and say what they now hold."""
    plan.steps = fuse_epilogues(plan)
    found = fusions(plan, hints)
    plan.steps = [_call(s, plan) if isinstance(s, Linear) else s for s in plan.steps]
    _drop_unread(plan)
    return found


def _call(step: Linear, plan: Plan) -> Extern:
    return replace(linear_extern(step, plan.buffers), guard=step.guard)


def _drop_unread(plan: Plan) -> None:
    """Forget stored tensors that no step reads."""
    read = set().union(*(step_reads(s) for s in plan.steps))
    for buffer in plan.of_kind("weight"):
        if buffer.name not in read:
            del plan.buffers[buffer.name]


def in_place(plan: Plan, output: Buffer) -> Buffer:
    """When an output is a plain copy of an arena buffer, that buffer becomes the output and the copy is dropped."""
    copy = next(s for s in plan.steps if isinstance(s, Store) and s.buffer == output.name)
    source = _copied(plan, copy)
    if source is None:
        return output
    plan.steps.remove(copy)
    del plan.buffers[output.name]
    plan.buffers[source.name] = replace(source, kind="output", key=output.key)
    return replace(plan.buffers[source.name], shape=output.shape)


def _copied(plan: Plan, copy: Store) -> Buffer | None:
    indices = [atom(Var(f"q{d}", n)) for d, n in enumerate(copy.shape)]
    element = copy.make(indices)
    if not isinstance(element, Load) or element.offset != flatten(indices, copy.shape):
        return None
    source = plan.buffers[element.buffer]
    return source if source.kind == "arena" and product(source.shape) == product(copy.shape) else None


def hints_of(entry: Entry) -> dict[Size, int]:
    """Example values of the symbols, to compare buffer sizes by."""
    hints: dict[Size, int] = {}
    for node in entry.placeholders():
        for n in value(node).shape:
            if isinstance(n, torch.SymInt):
                for a in size(n).atoms:
                    if isinstance(a, Size):
                        hints.setdefault(a, int(n.node.hint))
    return hints

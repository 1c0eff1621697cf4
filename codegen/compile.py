"""A program -> one translation unit and, per entry, the order of its weights."""

from __future__ import annotations

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
    convolution,
    dialect,
    families,
    pooling,
)
from sylvester.codegen.index import Size, Var, atom, flatten, product
from sylvester.codegen.lazy import Buffer, Plan, Store
from sylvester.codegen.lowering import Lowering, require_lowerings
from sylvester.codegen.plan import Unit
from sylvester.codegen.scalar import Load
from sylvester.codegen.shapes import size
from sylvester.compiler.program import Entry, Program, value

REGISTERED = (
    aten_activations, aten_factories, aten_indexing, aten_norms, aten_pointwise, aten_reductions, aten_views,
    convolution, dialect, families, pooling,
)  # fmt: skip
"""Every module whose import registers lowerings."""


@dataclass(frozen=True)
class WeightUse:
    """A stored tensor of an entry: the weight's key, and whether it is stored in panels."""

    key: str
    packed: bool

    @property
    def name(self) -> str:
        return f"{self.key}@panels" if self.packed else self.key


@dataclass(frozen=True)
class Compiled:
    unit: Unit
    weights: Mapping[str, tuple[WeightUse, ...]]


def compile_program(program: Program) -> Compiled:
    """Lower every entry; `Unsupported` lists the ops that have no lowering."""
    require_lowerings(program.entries.values())
    unit, weights = Unit(), {}
    for name, entry in program.entries.items():
        plan = Lowering(name, program, entry).run()
        outputs = [_in_place(plan, b) for b in plan.of_kind("output")]
        unit.add(plan, outputs, _hints(entry))
        weights[name] = tuple(WeightUse(b.key, b.packed) for b in plan.of_kind("weight"))
    return Compiled(unit, weights)


def _in_place(plan: Plan, output: Buffer) -> Buffer:
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


def _hints(entry: Entry) -> dict[Size, int]:
    """Example values of the symbols, to compare buffer sizes by."""
    hints: dict[Size, int] = {}
    for node in entry.placeholders():
        for n in value(node).shape:
            if isinstance(n, torch.SymInt):
                for a in size(n).atoms:
                    if isinstance(a, Size):
                        hints.setdefault(a, int(n.node.hint))
    return hints

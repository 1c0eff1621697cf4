"""combine(stored, ..., resident=True) -> a weight that no file holds: it is made once, when the artefact is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sylvester.backends.derived import sources_of
from sylvester.backends.packed_weights import stored_tensors
from sylvester.backends.tensor_writer import Deferred
from sylvester.codegen.layout import Layout, plain
from sylvester.compiler.calls import arguments
from sylvester.compiler.manifest import DerivedSpec, SumSpec
from sylvester.compiler.program import Program, binding, is_weight, value
from sylvester.compiler.shared_ops import combine

LINEAR = torch.ops.aten.linear.default
OPERANDS = ("atoms", "coefficients", "left", "right")
Layouts = Mapping[str, Iterable[Layout]]


@dataclass(frozen=True)
class Resident:
    """The program with such sums as weights, which have a shape but no data, and what each is made of, by key."""

    program: Program
    sums: Mapping[str, SumSpec]

    def tensors(self, weights: Layouts) -> tuple[dict[str, Deferred], dict[str, Deferred]]:
        """What the file holds, and what memory holds besides."""
        derived = self._derived(weights)
        given = {entry: [layout for layout in found if layout.name not in derived] for entry, found in weights.items()}
        parts = [part for layout in derived.values() for part in self._parts(layout)]
        sources = list(dict.fromkeys(name for part in parts for name in sources_of(part)))
        stored = stored_tensors(self.program, {**given, "": [plain(name) for name in sources]})
        return stored, stored_tensors(self.program, {"": list(derived.values())})

    def derived(self, weights: Layouts) -> dict[str, DerivedSpec]:
        """How a loader makes every tensor that the file does not hold."""
        found = self._derived(weights)
        return {n: DerivedSpec(self._parts(x), x.kind == "panels", x.ways) for n, x in found.items()}

    def _derived(self, weights: Layouts) -> dict[str, Layout]:
        layouts = {layout.name: layout for found in weights.values() for layout in found}
        return {name: layout for name, layout in layouts.items() if any(key in self.sums for key in layout.keys)}

    def _parts(self, layout: Layout) -> tuple[SumSpec, ...]:
        return tuple(self.sums.get(key) or SumSpec(weight=key) for key in layout.keys)


def resident(program: Program) -> Resident:
    """A clone of the program where linear layers read sums as weights; the program itself when there are none."""
    if not any(_lasts(node) for entry in program.entries.values() for node in entry.calls(combine.target)):
        return Resident(program, {})
    program, sums = program.clone(), dict[str, SumSpec]()
    for entry in program.entries.values():
        for node in filter(_lasts, entry.calls(combine.target)):
            given = arguments(node)
            part = SumSpec(**{name: binding(given[name]).key for name in OPERANDS if given[name] is not None})
            key = "*".join(filter(None, (part.coefficients, part.atoms, part.left, part.right)))
            fact: Tensor = value(node)
            sums[key], program.weights[key] = part, torch.empty(tuple(fact.shape), dtype=fact.dtype, device="meta")
            entry.replace(node, entry.bind("weight", key, fact))
        entry.sweep()
    return Resident(program, sums)


def _lasts(node: fx.Node) -> bool:
    """Whether only linear layers read a sum of stored float32 tensors that may last."""
    given = arguments(node)
    parts = [given[name] for name in OPERANDS if given[name] is not None]
    stored = all(is_weight(part) and value(part).dtype == torch.float32 for part in parts)
    readers = all(u.target is LINEAR and u.args[1] is node and u.args[0] is not node for u in node.users)
    return bool(given["resident"] and stored and readers and node.users)

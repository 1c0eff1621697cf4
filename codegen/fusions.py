"""What was fused into the linear kernels of an entry, and the bytes that no longer go through memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from sylvester.codegen.index import Atom, Index, Size, index
from sylvester.codegen.lazy import Linear, Plan
from sylvester.compiler.ledger import Fusion

FLOAT = 4


def fusions(plan: Plan, hints: Mapping[Size, int]) -> list[Fusion]:
    """Of the linear steps of a plan after `fuse_epilogues`, by kind; bytes at the sizes `hints`."""
    values: dict[Atom, Index] = {size: index(n) for size, n in hints.items()}
    counts: dict[str, list[int]] = defaultdict(list)
    for step in plan.steps:
        for kind, saved in _of(step) if isinstance(step, Linear) else ():
            counts[kind].append(saved.substitute(values).constant or 0)
    return [Fusion(plan.name, kind, len(saved), sum(saved)) for kind, saved in counts.items()]


def _of(step: Linear) -> Iterator[tuple[str, Index]]:
    rows, results = step.m * step.k * FLOAT, step.m * step.n * len(step.outputs) * FLOAT
    if step.layers > 1:
        yield f"{step.layers} linear layers over one input", rows * (step.layers - 1)
    if step.norm is not None:
        yield f"{step.norm} into the packing of a linear layer", 2 * rows
    if step.epilogue is not None:
        yield "elementwise work into the epilogue of a linear layer", 2 * results

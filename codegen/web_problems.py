"""What a page may choose micro-kernels for: products of stored panels, by format, depth and rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sylvester.codegen.index import Index
from sylvester.codegen.layout import PANEL, Format
from sylvester.codegen.lazy import Linear, Plan
from sylvester.codegen.problems import DECODE
from sylvester.codegen.space import row_class
from sylvester.codegen.web_candidates import CLASSES, FORMATS


@dataclass(frozen=True)
class PanelProblem:
    """Products of `rows` rows, as the representative of their class, with panels of 32 columns of depth k.

    A micro-kernel sees one panel, so that all layers of one depth are one problem.
    """

    format: Format
    depth: int
    rows: int


@dataclass
class PanelUse:
    """Where the panels of a problem lie: panels by stored tensor, and the share of the work of an entry."""

    panels: dict[str, int] = field(default_factory=dict)
    work: int = 0


Uses = dict[PanelProblem, PanelUse]


def add_uses(uses: Uses, plan: Plan) -> None:
    """Open numbers of rows are every class; an entry `decode` is one sequence, a token at a time."""
    for step in plan.steps:
        if not isinstance(step, Linear) or step.format.name not in FORMATS:
            continue
        layout, depth, columns = plan.buffers[step.weight].layout, step.k.constant, step.n.constant
        if layout is None or depth is None or columns is None:
            continue
        panels = -(-columns // PANEL) * len(step.outputs)
        for rows in _rows(plan.name, step.m, step.format.records):
            use = uses.setdefault(PanelProblem(step.format.stored, depth, rows), PanelUse())
            use.panels[layout.name] = panels
            use.work += rows * depth * panels


def _rows(entry: str, m: Index, records: int) -> Iterable[int]:
    if m.constant is None:
        return CLASSES[:1] if entry == DECODE else CLASSES[1:]
    return [row_class(m.constant * records)] if m.constant else []


def ranked(uses: Uses) -> list[PanelProblem]:
    """The order in which they are worth the time: a single row first, it is what a token waits for; then by work."""
    return sorted(uses, key=lambda p: (p.rows > 1, -uses[p].work, p.depth))

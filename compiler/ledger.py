"""The ledger: per pass what was applied and refused, sizes and work before and after, time, and the measured error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

from sylvester.compiler.changes import Changes, Figure
from sylvester.compiler.cost import program_cost
from sylvester.compiler.measure import Measured
from sylvester.compiler.program import Program
from sylvester.compiler.quality import Judged
from sylvester.compiler.totals import EXPLAINED, Totals

HEADINGS = ("pass", "contract", "applied", "refused", "nodes", "weights MB", "Mflop", "pass ms", "run ms", "max error")


@dataclass(frozen=True)
class Facts:
    """Size of a program: op nodes, bytes of parameters, flops of one run of every entry on its example sizes."""

    nodes: int
    parameter_bytes: int
    flops: int

    @staticmethod
    def of(program: Program) -> Facts:
        nodes = sum(len(entry.calls()) for entry in program.entries.values())
        return Facts(nodes, program.weights.nbytes, program_cost(program).flops)


@dataclass(frozen=True)
class Row:
    """One pass. `error` is the largest relative error of any output; None when nothing was compared.

    `measured` says more of what a lossy pass changed, on the example inputs; `quality` what it and the passes before
    it lost against the float program, on calibration data.
    `runs` is how many seconds plain PyTorch took for the examples of every entry before and after, when they were run.
    """

    text: str
    contract: str
    changes: Changes
    before: Facts
    after: Facts
    seconds: float
    error: float | None = None
    runs: tuple[float, float] | None = None
    measured: tuple[Measured, ...] = ()
    quality: tuple[Judged, ...] = ()

    def refusals(self) -> dict[tuple[str, str], tuple[int, str]]:
        """(rule, reason) -> how often, and the first place."""
        counts = Counter((r.rule, r.reason) for r in self.changes.refused)
        first = {(r.rule, r.reason): r.where for r in reversed(self.changes.refused)}
        return {key: (count, first[key]) for key, count in counts.items()}

    def cells(self) -> tuple[str, ...]:
        before, after = self.before, self.after
        return (
            self.text,
            self.contract,
            str(len(self.changes.applied)),
            str(len(self.changes.refused)),
            _arrow(str(before.nodes), str(after.nodes)),
            _arrow(f"{before.parameter_bytes / 1e6:.2f}", f"{after.parameter_bytes / 1e6:.2f}"),
            _arrow(f"{before.flops / 1e6:.1f}", f"{after.flops / 1e6:.1f}"),
            f"{self.seconds * 1e3:.0f}",
            "-" if self.runs is None else _arrow(*(f"{t * 1e3:.1f}" for t in self.runs)),
            "-" if self.error is None else f"{self.error:.1e}",
        )


@dataclass(frozen=True)
class Fusion:
    """Steps of an entry that one kernel does: how often, and the bytes of memory traffic saved on the example."""

    entry: str
    kind: str
    count: int
    bytes_saved: int

    def __str__(self) -> str:
        return f"fused in {self.entry}: {self.kind} x{self.count}, {self.bytes_saved / 1e3:.1f} kB less moved"


@dataclass
class Ledger:
    """Rows in the order the passes ran, notes about the capture (fixed dimensions, what was left out), and fusions.

    From row `start` on they are passes that the caller asked for: their sizes, times and losses are added up.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fusions: list[Fusion] = field(default_factory=list)
    start: int = 0

    def __str__(self) -> str:
        """An aligned table, what each pass applied and refused and why, then size, time and quality over the passes."""
        notes = [*map(str, self.fusions), *(f"note: {note}" for note in self.notes)]
        rows = _table([HEADINGS, *(row.cells() for row in self.rows)])
        return "\n".join([*rows, *self._details(), *self._way(), *notes])

    def totals(self) -> Totals:
        """Size, time and quality after every pass that the caller asked for."""
        return Totals.of(self.to_dict()[self.start :])

    def _way(self) -> list[str]:
        totals = self.totals()
        if not totals.steps:
            return []
        cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in line] for line in totals.table()]
        return [f"from pass to pass ({EXPLAINED}):", *_table(cells)]

    def fused(self) -> list[dict[str, object]]:
        return [asdict(fusion) for fusion in self.fusions]

    def _details(self) -> list[str]:
        lines = []
        for row in self.rows:
            lines += [f"{row.text}: {rule} x{count}" for rule, count in row.changes.counts().items()]
            found = (*row.measured, *row.quality, *row.changes.notes, *summaries(row.changes.figures))
            lines += [f"{row.text}: {item}" for item in found]
            for (rule, reason), (count, where) in row.refusals().items():
                lines.append(f"{row.text}: refused {rule} x{count}: {reason} (at {where})")
        return lines

    def to_dict(self) -> list[dict[str, object]]:
        return [
            {
                "pass": row.text,
                "contract": row.contract,
                "applied": row.changes.counts(),
                "refused": [
                    {"rule": rule, "reason": reason, "count": count, "at": where}
                    for (rule, reason), (count, where) in row.refusals().items()
                ],
                "before": asdict(row.before),
                "after": asdict(row.after),
                "seconds": row.seconds,
                "error": row.error,
                "runs": row.runs,
                "measured": [asdict(measured) for measured in row.measured],
                "quality": [asdict(judged) for judged in row.quality],
                "notes": list(row.changes.notes),
                "figures": [asdict(figure) for figure in row.changes.figures],
                "layers": [asdict(became) for became in row.changes.layers],
            }
            for row in self.rows
        ]

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)


def summaries(figures: Sequence[Figure]) -> list[str]:
    """One line per name: the least, the median and the largest value, and where the extremes are."""
    lines = []
    for name in dict.fromkeys(figure.name for figure in figures):
        alike = sorted((f for f in figures if f.name == name), key=lambda f: f.value)
        least, most, middle = alike[0], alike[-1], median(f.value for f in alike)
        lines.append(
            f"{name}: {least.value:.4g} at {least.where}, median {middle:.4g}, {most.value:.4g} at {most.where}"
            if len(alike) > 1
            else f"{name}: {least.value:.4g} at {least.where}"
        )
    return lines


def _arrow(before: str, after: str) -> str:
    return after if before == after else f"{before} -> {after}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

"""Rows beside the best peer, the bound of the machine and the goal: as a table, as JSON and as a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from benchmarks.drawing import Bar, bars
from benchmarks.measure import Row
from benchmarks.suite.works import PRECISIONS, Work

OURS = "sylvester"
UNITS = {"fp32": "f32", "bf16": "bf16", "int8": "int8", "int4": "int8"}
"""int4 weights are multiplied with int8 activations."""
HEADER = (
    f"{'work':22} {'engine':22} {'kind':5} {'median ms':>10} {'best ms':>9} {'vs best peer':>13} {'of limit':>9} "
    f"{'error':>8}  goal"
)


class Limits(Protocol):
    def bandwidth(self, working_set: float, threads: int | None = None) -> float: ...

    def peak(self, arithmetic: str, threads: int | None = None) -> float: ...


@dataclass(frozen=True)
class Line:
    """A row and what it is compared with; `ratio`: the median of the best peer over this one's."""

    row: Row
    ratio: float | None = None
    bound: float | None = None
    goal: str = ""


def lines(work: Work, rows: Sequence[Row], limits: Limits | None, threads: int) -> list[Line]:
    return [_line(work, row, rows, limits, threads) for row in rows]


def _line(work: Work, row: Row, rows: Sequence[Row], limits: Limits | None, threads: int) -> Line:
    bound = bound_ms(work, row.precision, limits, threads) if limits else None
    best = best_peer(rows, row.precision)
    ratio = best / row.median if best and row.median else None
    return Line(row, ratio, bound, goal(work, row, ratio, bound) if row.engine == OURS else "")


def best_peer(rows: Sequence[Row], precision: str) -> float | None:
    """Median ms of the fastest peer at this precision or a higher one."""
    allowed = PRECISIONS[PRECISIONS.index(precision) :]
    times = [row.median for row in rows if row.engine != OURS and row.precision in allowed and not row.failure]
    return min(times, default=None)


def bound_ms(work: Work, precision: str, limits: Limits, threads: int) -> float | None:
    """The longer of reading the bytes from where they fit and of the operations at full rate."""
    if work.kind == "zoo":
        return None
    size = work.read(precision)
    reading = size / limits.bandwidth(size, threads)
    return 1e3 * max(reading, work.operations() / limits.peak(UNITS[precision], threads))


def goal(work: Work, row: Row, ratio: float | None, bound: float | None) -> str:
    """What is asked for, and whether it is met."""
    wanted = work.goals.get(row.precision)
    if wanted is None:
        return ""
    parts = [f"{wanted.peers}x {_met(ratio, wanted.peers)}"]
    if wanted.limit:
        reached = bound / row.median if bound and row.median else None
        parts.append(f"{wanted.limit:.0%} {_met(reached, wanted.limit)}")
    return ", ".join(parts)


def _met(found: float | None, wanted: float) -> str:
    return "?" if found is None else "met" if found >= wanted else "missed"


def table(found: Sequence[Line]) -> Iterator[str]:
    yield HEADER
    for line in found:
        yield _text(line)


def _text(line: Line) -> str:
    row = line.row
    start = f"{row.work:22} {row.engine:22} {row.precision:5}"
    if row.failure:
        return f"{start} failed: {row.failure}"
    ratio = f"{line.ratio:.2f}x" if line.ratio else "-"
    fraction = f"{line.bound / row.median:.0%}" if line.bound else "-"
    error = "-" if row.error is None else f"{row.error:.1e}"
    return f"{start} {row.median:10.3f} {row.best:9.3f} {ratio:>13} {fraction:>9} {error:>8}  {line.goal}".rstrip()


def document(found: Sequence[Line], facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **facts,
        "rows": [{**asdict(line.row), "ratio": line.ratio, "bound": line.bound, "goal": line.goal} for line in found],
    }


def drawing(found: Sequence[Line]) -> str:
    """The medians of every work; the tick is the bound of the machine at that precision."""
    groups: dict[str, list[Bar]] = {}
    for line in found:
        if not line.row.failure:
            label = f"{line.row.engine} {line.row.precision}"
            groups.setdefault(line.row.work, []).append(
                Bar(label, line.row.median, line.row.engine == OURS, line.bound)
            )
    return bars(groups)

"""Tandem repeats: the runs x y x y x y in a sequence."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Run:
    """`count` neighbouring copies of `period` items, from `start`."""

    start: int
    period: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.count

    def copies(self) -> list[range]:
        """The index range of each copy."""
        return [range(i, i + self.period) for i in range(self.start, self.end, self.period)]


def longest(items: Sequence[Hashable]) -> Run | None:
    """The run of at least two copies that covers most items; the shorter period of equals, then the first."""
    best: Run | None = None
    for period in range(1, len(items) // 2 + 1):
        for run in _of_period(items, period):
            if best is None or run.period * run.count > best.period * best.count:
                best = run
    return best


def _of_period(items: Sequence[Hashable], period: int) -> list[Run]:
    """All maximal runs of one period, from where the equality of neighbours begins to where it ends."""
    found, start = [], 0
    for i in range(len(items) - period + 1):
        if i < len(items) - period and items[i] == items[i + period]:
            continue
        count = (i - start) // period + 1
        if count >= 2:
            found.append(Run(start, period, count))
        start = i + 1
    return found


def runs(items: Sequence[Hashable], anchor: Sequence[bool]) -> list[Run]:
    """Disjoint runs that hold an anchor, longest first, in order of place; each copy begins with an anchor."""
    found: list[Run] = []
    free = [(0, len(items))]
    while free:
        low, high = free.pop()
        run = longest(items[low:high])
        if run is None:
            continue
        run = Run(run.start + low, run.period, run.count)
        if any(anchor[run.start : run.start + run.period]):
            found.append(_rotated(run, items, anchor, high))
            free += [(low, found[-1].start), (found[-1].end, high)]
        else:
            free += [(low, run.start), (run.end, high)]
    return sorted(run for run in found if run.count >= 2)


def _rotated(run: Run, items: Sequence[Hashable], anchor: Sequence[bool], high: int) -> Run:
    """The same run, begun at its first anchor and followed as far as it goes on."""
    shift = next(i for i in range(run.period) if anchor[run.start + i])
    start, end = run.start + shift, run.end
    while end < high and items[end] == items[end - run.period]:
        end += 1
    return Run(start, run.period, (end - start) // run.period)

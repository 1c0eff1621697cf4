"""Successive halving: measure every candidate a little, keep the better half, measure those longer (Jamieson 2016)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sylvester.codegen.space import Candidate

Measure = Callable[[Candidate, int], Sequence[int]]
"""Nanoseconds of each of some runs of a candidate."""

FIRST_ROUND = 8
LAST_ROUND = 256
BURST = 4
MARGIN = 0.03
"""A candidate must beat the default by this part, or by what the spread of the runs can hide."""


@dataclass
class Standing:
    """What is known of one candidate. `dropped`: others are better, it is not measured again."""

    samples: list[int] = field(default_factory=list)
    dropped: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples) if self.samples else math.inf

    @property
    def fast(self) -> float:
        """The lower quartile. Other work on the machine only delays runs: the fast ones tell most about the kernel."""
        return sorted(self.samples)[len(self.samples) // 4] if self.samples else math.inf

    @property
    def error(self) -> float:
        """Standard error of the median as a part of it, from the median deviation."""
        if len(self.samples) < 2:
            return 1.0
        spread = statistics.median(abs(s - self.median) for s in self.samples)
        return 1.4826 * 1.2533 * spread / math.sqrt(len(self.samples)) / max(self.median, 1)


@dataclass
class Race:
    """The candidates of one problem, the default first. Interrupted, it goes on from the samples it has."""

    standings: dict[Candidate, Standing]

    @property
    def default(self) -> Candidate:
        return next(iter(self.standings))

    @property
    def open(self) -> list[Candidate]:
        """Candidates that may still win, the default always among them."""
        return [c for c, s in self.standings.items() if c == self.default or not s.dropped]

    @property
    def finished(self) -> bool:
        return len(self.open) == 1 or (len(self.open) == 2 and self._count() >= self._enough())

    def margin(self, candidate: Candidate) -> float:
        """The smallest gain over the default that counts."""
        errors = self.standings[candidate].error, self.standings[self.default].error
        return max(MARGIN, 3 * math.hypot(*errors))

    @property
    def winner(self) -> Candidate:
        """The fastest open candidate, or the default when that is a near-tie by the median or by the fast runs."""
        best = min(self.open, key=lambda c: self.standings[c].fast)
        return best if self.ratio(best) < 1 - self.margin(best) else self.default

    def ratio(self, candidate: Candidate) -> float:
        """Time of a candidate as a part of the default's: the median's or the fast runs', whichever is worse.

        Runs of the default count up to the round in which the candidate was dropped.
        """
        mine, whole = self.standings[candidate], self.standings[self.default]
        base = Standing(whole.samples[: len(mine.samples)])
        if not (mine.samples and base.samples):
            return 1.0
        return max(mine.median / max(base.median, 1), mine.fast / max(base.fast, 1))

    def run(self, measure: Measure, *, spent: Callable[[], bool], round_done: Callable[[], None]) -> None:
        """Race until two are left and well measured, or the time is spent; `round_done` may save what is known."""
        while not self.finished and not spent():
            self._round(measure, max(FIRST_ROUND, 2 * self._count()), spent)
            if not spent():
                self._drop_worse_half()
            round_done()

    def _count(self) -> int:
        """Runs that every open candidate has."""
        return min(len(self.standings[c].samples) for c in self.open)

    def _enough(self) -> int:
        """Runs after which the last two are compared: as many as the halvings make, a first round more."""
        halvings = max(1, math.ceil(math.log2(max(2, len(self.standings) - 1))))
        return min(LAST_ROUND, FIRST_ROUND << halvings)

    def _round(self, measure: Measure, runs: int, spent: Callable[[], bool]) -> None:
        """Bring every open candidate to `runs` samples, in turns, so that a slow moment of the machine hits all."""
        while not spent():
            waiting = [c for c in self.open if len(self.standings[c].samples) < runs]
            if not waiting:
                return
            for candidate in waiting:
                if spent():
                    return
                samples = self.standings[candidate].samples
                samples.extend(measure(candidate, min(BURST, runs - len(samples))))

    def _drop_worse_half(self) -> None:
        others = sorted(self.open[1:], key=lambda c: self.standings[c].fast)
        for candidate in others[max(1, len(others) // 2) :]:
            self.standings[candidate].dropped = True

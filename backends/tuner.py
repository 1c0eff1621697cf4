"""Times the candidates of problems and keeps what it learns, so that an interrupted search goes on where it was."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sylvester.backends import fingerprint
from sylvester.backends.halving import Measure, Race, Standing
from sylvester.backends.toolchain import Compiler
from sylvester.backends.tuning_bench import Bench, Library, build
from sylvester.backends.tuning_database import Database, Entry, Key, Time
from sylvester.codegen.isa import Isa
from sylvester.codegen.space import Candidate, Problem
from sylvester.codegen.tunable import Family, estimate, family_of
from sylvester.compiler.progress import Progress, silent

BUILDERS = 2
LEAST_SHARE = 0.5
"""Of the time an equal split would give a problem."""


@dataclass(frozen=True)
class Setting:
    """Where the code will run: variant, threads, and what compiles it."""

    isa: Isa
    threads: int
    compiler: Compiler

    def key(self, problem: Problem) -> Key:
        """Where the database keeps the problem."""
        kernel = family_of(problem).kernel_hash(self.isa)
        cpu, compiler = fingerprint.target(self.isa), fingerprint.toolchain(self.compiler, self.isa)
        return Key(kernel, str(problem), cpu, self.threads, compiler)


class Tuner:
    """Tunes problems within a time budget; use it in a `with`, it owns a folder of built candidates."""

    def __init__(
        self,
        setting: Setting,
        database: Database,
        progress: Progress = silent,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.setting, self.database, self.progress, self.clock = setting, database, progress, clock
        self._libraries: dict[Family, dict[Candidate, Library]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Tuner:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @cached_property
    def _folder(self) -> Path:
        return Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="sylvester-tune-")))

    def tune(self, problems: Mapping[Problem, int], seconds: float) -> set[Problem]:
        """Race the problems that the database has no finished race of, cheap ones first; returns them.

        A problem gets its share of the time by its estimated cost and how often it runs, and what others left.
        """
        end, measured = self.clock() + seconds, set()
        waiting = sorted(
            (p for p in problems if not self._finished(p)), key=lambda p: (problems[p] * estimate(p), str(p))
        )
        for done, problem in enumerate(waiting):
            self.progress(f"tune {problem}", done, len(waiting))
            costs = [problems[p] * estimate(p) for p in waiting[done:]]
            share = max(costs[0] / sum(costs), LEAST_SHARE / len(costs))
            libraries = self._built(family_of(problem), end)
            deadline = self.clock() + (end - self.clock()) * share
            measured.add(problem)
            if libraries and self.clock() < deadline:
                self._race(problem, libraries, deadline)
        if waiting:
            self.progress("tune", len(waiting), len(waiting))
        return measured

    def _finished(self, problem: Problem) -> bool:
        entry = self.database.look_up(self.setting.key(problem))
        return entry is not None and resumed(entry, family_of(problem).space(self.setting.isa).candidates).finished

    def _race(self, problem: Problem, libraries: Mapping[Candidate, Library], deadline: float) -> None:
        with closing(Bench(libraries, family_of(problem), problem, self.setting.threads)) as bench:
            bench.check()
            key = self.setting.key(problem)
            run_race(self.database, key, list(libraries), bench.measure, spent=lambda: self.clock() >= deadline)

    def _built(self, of: Family, end: float) -> dict[Candidate, Library]:
        """All candidates, or nothing when the time does not allow to build them."""
        if of not in self._libraries:
            with ThreadPoolExecutor(BUILDERS) as pool:
                jobs = {c: pool.submit(self._build_before, end, of, c) for c in of.space(self.setting.isa).candidates}
                try:
                    built = {c: library for c, job in jobs.items() if (library := job.result()) is not None}
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            self._libraries[of] = built if len(built) == len(jobs) else {}
        return self._libraries[of]

    def _build_before(self, end: float, of: Family, candidate: Candidate) -> Library | None:
        if self.clock() >= end:
            return None
        return build(of, self.setting.isa, candidate, self._folder, self.setting.compiler)


def run_race(
    database: Database, key: Key, candidates: Iterable[Candidate], measure: Measure, *, spent: Callable[[], bool]
) -> Entry:
    """Race from where the database is; every round is stored as it ends, and so is what an interrupt cuts short."""
    race = resumed(database.look_up(key), candidates)
    try:
        race.run(measure, spent=spent, round_done=lambda: database.record(entry_of(key, race)))
    finally:
        if any(s.samples for s in race.standings.values()):
            database.record(entry_of(key, race))
    return entry_of(key, race)


def resumed(entry: Entry | None, candidates: Iterable[Candidate]) -> Race:
    """A race with the runs that are stored."""
    known = {} if entry is None else entry.times
    times = {candidate: known.get(str(candidate)) for candidate in candidates}
    return Race({c: Standing() if t is None else Standing(list(t.samples), t.dropped) for c, t in times.items()})


def entry_of(key: Key, race: Race) -> Entry:
    times = {str(c): Time(round(s.median), tuple(s.samples), s.dropped) for c, s in race.standings.items() if s.samples}
    return Entry(key, str(race.winner), race.finished, race.margin(race.winner), times)

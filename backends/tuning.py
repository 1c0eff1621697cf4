"""The tuned macros of a program: what the database knows of its problems, after measuring them when that is asked."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sylvester.backends.cpu_library import ABI, usable
from sylvester.backends.halving import MARGIN, Race, Standing
from sylvester.backends.toolchain import Compiler, build_shared
from sylvester.backends.tuner import Setting, Tuner
from sylvester.backends.tuning_database import Database, DatabaseError, Entry, default_path
from sylvester.backends.tuning_exchange import explain
from sylvester.codegen.isa import Isa
from sylvester.codegen.prelude import render, system
from sylvester.codegen.space import Candidate, Problem
from sylvester.codegen.tunable import Choices, family_of
from sylvester.compiler import knobs
from sylvester.compiler.errors import ArtefactError, Unsupported
from sylvester.compiler.progress import Progress, silent
from sylvester.compiler.target import Target, host_architecture

NAME = "tuning.json"
Problems = Mapping[str, Mapping[Problem, int]]
"""Entry -> problem -> how often one call of the entry runs it."""


@dataclass(frozen=True)
class Finding:
    """What is known of a problem on the variant this machine loads; `entry` None: nothing, `text` says why."""

    problem: Problem
    entry: Entry | None
    text: str


@dataclass(frozen=True)
class Tuning:
    """The variants with their macros, and how they were found."""

    isas: tuple[Isa, ...]
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Lines for the ledger; of what is not known, the first reason."""
        known = [f.text for f in self.findings if f.entry is not None]
        unknown = [f.text for f in self.findings if f.entry is None]
        if unknown:
            known.append(f"{len(unknown)} of {len(self.findings)} kernels are not tuned; {unknown[0]}")
        built = [
            f"{isa.name} built with {' '.join(f'{n}={v}' for n, v in isa.macros)}" for isa in self.isas if isa.macros
        ]
        return [f"tuning: {line}" for line in (*known, *self.remarks, *built)]


def tune(
    problems: Problems,
    isas: Sequence[Isa],
    target: Target,
    compiler: Compiler,
    *,
    seconds: float | None = None,
    progress: Progress = silent,
    path: Path | None = None,
) -> Tuning:
    """Choose macros for every variant. `seconds` None only asks the database; without one the defaults stay."""
    path, threads = path or default_path(), target.threads or knobs.threads()
    if knobs.TUNE.get() == "0" or not any(problems.values()) or (seconds is None and not path.exists()):
        return Tuning(tuple(isas), remarks=() if seconds is None else ("off, or nothing to tune: defaults",))
    measured: set[Problem] = set()
    try:
        with Database(path) as database:
            best = None
            if seconds is not None:
                best = runnable(isas, target, compiler)
                with Tuner(Setting(best, threads, compiler), database, progress) as tuner:
                    measured = tuner.tune(_total(problems), seconds)
            chosen = [_choose(problems, Setting(isa, threads, compiler), database) for isa in isas]
            told = best or _known_variant(problems, [Setting(isa, threads, compiler) for isa in isas], database)
            findings = _findings(problems, Setting(told, threads, compiler), database, measured)
    except DatabaseError as error:
        if seconds is not None:
            raise
        return Tuning(tuple(isas), remarks=(f"{error.message}: defaults ({error.hint})",))
    return Tuning(tuple(chosen), tuple(findings))


def runnable(isas: Sequence[Isa], target: Target, compiler: Compiler) -> Isa:
    """The variant this machine would load: the highest it has and may use, or the one the knob forces."""
    if target.architecture != host_architecture():
        raise Unsupported(
            f"cannot time code for {target.architecture} on {host_architecture()}",
            hint="tune on such a machine, then bring the results here with `sylvester tune --merge`",
        )
    with tempfile.TemporaryDirectory(prefix="sylvester-level-") as folder:
        source = "\n".join([system(host_architecture()), render("abi.h.in", ABI=ABI)])
        library = build_shared(source, Path(folder, "level.so"), isas[0], compiler=compiler)
        return usable(isas, [isa.name for isa in isas], library)[0]


def _known_variant(problems: Problems, settings: Sequence[Setting], database: Database) -> Isa:
    """The highest variant that the database knows a problem for, else the highest."""
    for setting in reversed(settings):
        if any(database.look_up(setting.key(problem)) for problem in _total(problems)):
            return setting.isa
    return settings[-1].isa


def _total(problems: Problems) -> dict[Problem, int]:
    total: dict[Problem, int] = {}
    for counts in problems.values():
        for problem, count in counts.items():
            total[problem] = total.get(problem, 0) + count
    return total


def _choose(problems: Problems, setting: Setting, database: Database) -> Isa:
    """One value per macro for the whole program, because all its layers share the micro-kernels."""
    entries = {p: database.look_up(setting.key(p)) for p in _total(problems)}
    known = {p: e for p, e in entries.items() if e is not None}
    distinct: list[Choices] = []
    for problem in known:
        distinct += [c for c in family_of(problem).choices if c not in distinct]
    isa = setting.isa
    for choices in distinct:
        isa = isa.tuned(best_for_program(choices, problems, known).parameters)
    return isa


def best_for_program(choices: Choices, problems: Problems, entries: Mapping[Problem, Entry]) -> Candidate:
    """Of the choices that win some problem, the one with the least time over the program, or the default.

    Every entry of the program counts alike, whatever its length: its time is taken relative to the default's.
    """
    ours = {p: e for p, e in entries.items() if choices in family_of(p).choices}
    winners = [c for c in map(Candidate, choices) if str(c) in {e.chosen for e in ours.values()}]
    used = [counts for counts in problems.values() if any(p in ours for p in counts)]
    scores = {c: statistics.fmean(_relative(str(c), counts, ours) for counts in used) for c in winners if used}
    best = min(scores, key=lambda c: scores[c], default=Candidate())
    return best if scores.get(best, 1.0) < 1 - MARGIN / max(1, len(used)) else Candidate()


def _relative(name: str, counts: Mapping[Problem, int], entries: Mapping[Problem, Entry]) -> float:
    """The time of one entry's layers with a candidate, as a part of that with the default."""
    ours = {p: entries[p] for p in counts if p in entries and "default" in entries[p].times}
    timed = [(counts[p] * e.times["default"].median, _ratio(name, e)) for p, e in ours.items()]
    return sum(time * ratio for time, ratio in timed) / max(1, sum(time for time, _ in timed))


def _ratio(name: str, entry: Entry) -> float:
    """How a candidate compares with the default in a race; 1 where it did not win and noise explains the difference."""
    default, mine = Candidate(), Candidate({"candidate": 1})
    samples = {default: entry.times.get("default"), mine: entry.times.get(name)}
    race = Race({c: Standing(list(t.samples) if t else []) for c, t in samples.items()})
    ratio = race.ratio(mine)
    return ratio if name == entry.chosen or abs(ratio - 1) > 2 * race.margin(mine) else 1.0


def _findings(problems: Problems, setting: Setting, database: Database, measured: set[Problem]) -> list[Finding]:
    findings = []
    for problem in _total(problems):
        key = setting.key(problem)
        entry = database.look_up(key)
        if entry is None:
            why = f"{problem}: the time ran out first" if problem in measured else explain(database, key)
            findings.append(Finding(problem, None, f"{why}: default"))
            continue
        origin = "measured now" if problem in measured else f"from the database, {entry.at[:10]}"
        where = f"{problem}, {setting.isa.name}, {setting.threads} threads"
        findings.append(Finding(problem, entry, f"{where}: {gain(entry)}, {origin}"))
    return findings


def gain(entry: Entry) -> str:
    """The candidate chosen and what it gains, in words."""
    default, chosen = entry.times.get("default"), entry.times.get(entry.chosen)
    state = "" if entry.finished else ", time ran out"
    if default is None or chosen is None:
        return f"default{state}"
    if entry.chosen == "default" and entry.finished:
        best = min(entry.times.values(), key=lambda t: t.median)
        return f"default, nothing beats it by {entry.margin:.1%} (best {default.median / best.median:.3f}x)"
    if entry.chosen == "default":
        return f"default{state}"
    return f"{entry.chosen}, {default.median / chosen.median:.2f}x the speed of the default{state}"


def write_problems(folder: Path, problems: Problems, tuning: Tuning) -> None:
    """tuning.json of an artefact: its problems, and the macros of every variant."""
    data = {
        "problems": {e: [[p.family, p.format, p.shape, n] for p, n in of.items()] for e, of in problems.items()},
        "macros": {isa.name: dict(isa.macros) for isa in tuning.isas},
    }
    (folder / NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_problems(folder: Path) -> dict[str, dict[Problem, int]]:
    """The problems of a saved artefact."""
    path = folder / NAME
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["problems"]
        return {
            entry: {Problem(name, form, tuple(shape)): int(n) for name, form, shape, n in of}
            for entry, of in data.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{str(folder)!r} does not say what it can be tuned for: {error}", hint="compile the model again"
        ) from error

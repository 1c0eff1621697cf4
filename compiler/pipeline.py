"""What a pass is and how passes compose: requires, run, sweep, verify, check, observe. Knows no concrete pass."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from sylvester.compiler import knobs
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.check import ROUNDED, Bases, Results, evaluate, moved, require_same, rounds
from sylvester.compiler.errors import CompileError
from sylvester.compiler.graph_steps import recorder
from sylvester.compiler.ledger import Facts, Ledger, Row
from sylvester.compiler.measure import Measured, measure
from sylvester.compiler.program import Program
from sylvester.compiler.quality import Judge
from sylvester.compiler.row_dependence import dependences
from sylvester.compiler.verify import verify

Contract = Literal["exact", "lossy", "drafted"]


@dataclass(frozen=True)
class Pass(ABC):
    """A named program-to-program step. Its dataclass fields are its options, so `str(p)` rebuilds it.

    exact: the outputs stay the same up to rounding (checked). lossy: they change, and by how much is measured.
    drafted: only proposes tokens that the untouched program verifies.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]

    def requires(self, program: Program) -> None:  # noqa: B027
        """Raise `CompileError` if the program is not one this pass can take."""

    @abstractmethod
    def run(self, program: Program) -> Changes:
        """Edit the program in place and say what was done and what was refused."""

    def __str__(self) -> str:
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != _default(f)]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in given)
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class Event:
    """What an observer sees after each pass: the pass, its place (from 0), the program it left, and its ledger row."""

    step: Pass
    index: int
    program: Program
    row: Row


Observer = Callable[[Event], None]


@dataclass(frozen=True)
class Pipeline:
    """Runs passes in the order written, on a clone. The program is verified at every seam, exact passes numerically.

    What lossy passes change is measured on the example inputs, and against the float program on calibration data.
    """

    passes: tuple[Pass, ...]
    observers: tuple[Observer, ...] = ()
    check: bool = True

    def __call__(self, program: Program) -> Program:
        return self.run(program)[0]

    def run(self, program: Program) -> tuple[Program, Ledger]:
        """The rewritten program, and the ledger with one row per pass."""
        program = program.clone()
        ledger = Ledger()
        witness = Witness() if self.check and knobs.CHECK.get() != "0" else None
        facts = Facts.of(program)
        record, rows = recorder(), dependences(program) if witness else {}
        if record:
            record.begin(program)
        for index, step in enumerate(self.passes):
            with _blame(f"in pass {index + 1}/{len(self.passes)}: {step}"):
                row = _apply(step, program, facts, witness)
            if witness:
                rows = _flag(row.changes, rows, dependences(program))
            ledger.rows.append(row)
            facts = row.after
            if record:
                record.after(str(step), program)
            for observe in self.observers:
                observe(Event(step, index, program, row))
        return program, ledger


class Witness:
    """Remembers what the program computed last, so that each pass costs one run of every entry."""

    def __init__(self) -> None:
        self.last: Results | None = None
        self.seconds = 0.0
        self.quality = Judge()
        self.bases: dict[str, Callable[[Tensor], Tensor]] = {}

    def before(self, program: Program) -> float:
        """Make sure there are results to compare with; returns the seconds they took."""
        if self.last is None:
            self.last = self._evaluate(program)
        return self.seconds

    def after(self, program: Program, bases: Bases) -> float | None:
        """The error against the results before; they become the reference of the next pass."""
        before = moved(self.last or {}, bases)
        self._remember(bases)
        self.last = self._evaluate(program)
        return require_same(before, self.last, ROUNDED if rounds(program) else 0.0)

    def _remember(self, bases: Bases) -> None:
        for name, change in bases.items():
            old = self.bases.get(name)
            self.bases[name] = change if old is None else lambda x, old=old, change=change: change(old(x))  # type: ignore[misc]

    def measure(self, program: Program, renamed: Mapping[str, str]) -> tuple[Measured, ...]:
        """How far the outputs moved from the results before; they become the reference of the next pass."""
        if renamed:
            self.bases = {renamed[name]: basis for name, basis in self.bases.items() if name in renamed}
        before, self.last = self.last, self._evaluate(program)
        return measure(program, before or {}, self.last)

    def _evaluate(self, program: Program) -> Results:
        start = time.perf_counter()
        results = evaluate(program, self.bases)
        self.seconds = time.perf_counter() - start
        return results

    def forget(self) -> None:
        self.last = None


def _flag(changes: Changes, before: Mapping[str, Refusal], after: dict[str, Refusal]) -> dict[str, Refusal]:
    """Notes entries whose rows the pass lets depend on each other; returns what is true of them now."""
    for name, found in after.items():
        if name not in before:
            where = f" at %{found.at.name}" if found.at else ""
            changes.note(f"a row of a batch may depend on other rows in {name!r}: {found.reason}{where}")
    return after


def _apply(step: Pass, program: Program, before: Facts, witness: Witness | None) -> Row:
    step.requires(program)
    judge = None if step.contract == "drafted" else witness
    ran_before = judge.before(program) if judge else 0.0
    if judge and step.contract == "lossy":
        judge.quality.before(program)
    start = time.perf_counter()
    changes = step.run(program)
    if not isinstance(changes, Changes):
        raise CompileError(f"the pass {step.name!r} returned {changes!r}, expected Changes")
    program.sweep()
    seconds = time.perf_counter() - start
    verify(program)
    row = Row(str(step), step.contract, changes, before, Facts.of(program), seconds)
    if judge is None:
        if witness:
            witness.forget()
        return row
    if changes.checked is not None:
        judge.forget()
        return replace(row, error=changes.checked)
    if step.contract == "exact":
        return replace(row, error=judge.after(program, changes.bases), runs=(ran_before, judge.seconds))
    measured = judge.measure(program, changes.renamed)
    largest = max((m.largest for m in measured), default=None)
    quality = judge.quality.after(program)
    return replace(row, error=largest, measured=measured, quality=quality, runs=(ran_before, judge.seconds))


@contextmanager
def _blame(note: str) -> Iterator[None]:
    """Any exception that leaves the block says which pass it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default

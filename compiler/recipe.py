"""What a recipe is: a name for passes that are chosen when program, calibration data and target are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sylvester.compiler.pipeline import Pass
from sylvester.compiler.program import Program

Shape = tuple[int, int]
Seconds = Mapping[Shape, Mapping[int, float]]


@dataclass(frozen=True)
class Step:
    """One call of an entry on the target, in seconds, and each kernel of it by the nodes of the graph it computes."""

    seconds: float
    kernels: tuple[tuple[tuple[str, ...], float], ...]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a program on the target: `stored` by the keys of the weights in one stored tensor.

    `running` is a process at the longest sequence, of which `state` are the caches.
    """

    stored: Mapping[tuple[str, ...], int]
    running: int
    state: int

    @property
    def size(self) -> int:
        return sum(self.stored.values())


class Machine(ABC):
    """The target as a pass may ask about it; what is asked for is measured, or lowered as a build would."""

    @abstractmethod
    def identity(self) -> str:
        """What measured times depend on besides the program: processor, compiler, threads."""

    @abstractmethod
    def linears(self, shapes: Iterable[Shape], bits: Iterable[int]) -> Seconds:
        """Seconds of linear layers [n, k] by the bits of their weights."""

    @abstractmethod
    def steps(self, programs: Sequence[Program], entry: str, length: int) -> list[Step]:
        """The entry of every program on one row, timed in turn; a decode step with caches of `length` tokens."""

    @abstractmethod
    def footprint(self, program: Program) -> Footprint:
        """What the target stores and needs."""


@dataclass(frozen=True)
class Expansion:
    """The passes that a recipe stands for here, what was measured to choose them, and numbers for the report."""

    passes: tuple[Pass, ...]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe(ABC):
    """Its text identifies it, as that of a pass does."""

    name: str

    @abstractmethod
    def expand(self, program: Program, machine: Machine | None) -> Expansion:
        """Choose the passes; `machine` is None where the target cannot be timed here."""

    @abstractmethod
    def summary(self) -> str:
        """One line: what it does."""

    def __str__(self) -> str:
        return self.name

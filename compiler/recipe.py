"""What a recipe is: a name for passes that are chosen when program, calibration data and target are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sylvester.compiler.pipeline import Pass
from sylvester.compiler.program import Program

Shape = tuple[int, int]
Speed = Callable[[Iterable[Shape], Iterable[int]], Mapping[Shape, Mapping[int, float]]]
"""Shapes [n, k] of linear layers and bits of weights -> seconds of each on the target."""


@dataclass(frozen=True)
class Expansion:
    """The passes that a recipe stands for here, and what was measured to choose them."""

    passes: tuple[Pass, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe(ABC):
    """Its text identifies it, as that of a pass does."""

    name: str

    @abstractmethod
    def expand(self, program: Program, speed: Speed | None) -> Expansion:
        """Choose the passes; `speed` is None where the target cannot be timed here."""

    @abstractmethod
    def summary(self) -> str:
        """One line: what it does."""

    def __str__(self) -> str:
        return self.name

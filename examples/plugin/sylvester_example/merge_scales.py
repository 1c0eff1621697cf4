"""`x * a * b` becomes `x * (a * b)`: two walks over a tensor become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.rewrite import Rule, rewrite


class TwoScales(Rule):
    example = ((2, 3), 3.25, 7.5)

    @staticmethod
    def before(x: Tensor, a: float, b: float) -> Tensor:
        return x * a * b

    @staticmethod
    def after(x: Tensor, a: float, b: float) -> Tensor:
        return x * (a * b)


@dataclass(frozen=True)
class MergeScales(Pass):
    """Multiplications by two numbers become one."""

    name: ClassVar[str] = "merge-scales"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        return rewrite(program, (TwoScales(),))

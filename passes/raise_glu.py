"""silu(gate) * up -> swiglu(gate, up);  gelu(gate) * up -> geglu(gate, up);  written-out GELU and SiLU -> one op."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler import ops
from sylvester.compiler.changes import Changes
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.rewrite import Match, Refusal, Rule, either, rewrite

ROOT_HALF = math.sqrt(0.5)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def half_times(x: Tensor, y: Tensor) -> Tensor:
    """0.5 * x * y in any association."""
    return either((x * 0.5) * y, x * (y * 0.5), (x * y) * 0.5)


class Silu(Rule):
    """x * sigmoid(x)."""

    example = ((2, 3, 8),)

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return F.silu(x)


class GeluErf(Rule):
    """0.5 x (1 + erf(x / sqrt(2)))."""

    example = ((2, 3, 8),)

    @staticmethod
    def before(x: Tensor) -> Tensor:
        return half_times(x, torch.erf(either(x / math.sqrt(2), x * ROOT_HALF)) + 1.0)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return F.gelu(x)


class GeluTanh(Rule):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""

    example = ((2, 3, 8),)

    @staticmethod
    def before(x: Tensor) -> Tensor:
        cubic = either(either(x**3, x**2 * x, x * x * x) * CUBIC, x * CUBIC * x * x)
        by_cube = (x + cubic) * ROOT_TWO_OVER_PI
        by_square = x * ROOT_TWO_OVER_PI * (x * CUBIC * x + 1.0)
        return half_times(x, torch.tanh(either(by_cube, by_square)) + 1.0)

    @staticmethod
    def after(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Swiglu(Rule):
    example = ((2, 3, 8), (2, 3, 8))

    @staticmethod
    def before(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    @staticmethod
    def after(gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(gate, up)

    def allow(self, match: Match) -> Refusal | None:
        return same_shape(match)


class Geglu(Rule):
    example = ((2, 3, 8), (2, 3, 8), "none")

    @staticmethod
    def before(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        return F.gelu(gate, approximate=approximate) * up

    @staticmethod
    def after(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        return ops.geglu(gate, up, approximate)

    def allow(self, match: Match) -> Refusal | None:
        return same_shape(match)


def same_shape(match: Match) -> Refusal | None:
    gate, up = list(match.fact("gate").shape), list(match.fact("up").shape)
    return None if gate == up else Refusal(f"gate is {gate} and up is {up}, expected equal shapes", match.root)


@dataclass(frozen=True)
class RaiseGlu(Pass):
    """Activations written out in arithmetic and gated activations become single ops."""

    name: ClassVar[str] = "raise-glu"
    contract: ClassVar[Contract] = "exact"

    def run(self, program: Program) -> Changes:
        return rewrite(program, (Silu(), GeluErf(), GeluTanh(), Swiglu(), Geglu()))

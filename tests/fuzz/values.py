"""What a program should compute: its graph in float64, and how far rounding may move each element.

Every inexact value is moved by a few roundings of float32, several times over (stochastic arithmetic, Vignes, 1993);
what moves far, such as a floor near an integer, is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sylvester.compiler.program import Program, binding
from tests.fuzz.rounding import BOUNDS, EXACT, SHARES, moves

NOISE, PAIRS, FACTOR, WHOLE, FLOOR = 2.0**-21, 2, 20, 1.5, 1e-5
LARGEST, SMALLEST = 1e30, 1e-30
"""Beyond and below these float32 may overflow or lose the number; it counts as noise whether it is 0."""


CANCELS = {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}


class Mismatch(AssertionError):
    """Two ways to run a graph disagree."""


@dataclass(frozen=True)
class Expected:
    """One output: exact values, how far each may be off, and which are the same under noise."""

    exact: Tensor
    allowed: Tensor
    stable: Tensor
    dtype: torch.dtype

    def require(self, found: Tensor, where: str) -> None:
        """Raise `Mismatch` when a stable element differs by more than is allowed."""
        if found.shape != self.exact.shape or found.dtype != self.dtype:
            wanted = f"{self.dtype}{list(self.exact.shape)}"
            raise Mismatch(f"{where}: found {found.dtype}{list(found.shape)}, expected {wanted}")
        actual, exact = found.double(), self.exact.double()
        same = (actual == exact) | (actual.isnan() & exact.isnan())
        wrong = self.stable & ~same & ~((actual - exact).abs() <= self.allowed)
        if wrong.any():
            at = tuple(int(i) for i in wrong.nonzero()[0])
            raise Mismatch(
                f"{where}: {int(wrong.sum())} of {wrong.numel()} elements differ, at {at} found {float(actual[at])!r}, "
                f"expected {float(exact[at])!r} within {float(self.allowed[at]):.1e}"
            )


class _Wide(fx.Interpreter):
    """A graph in float64; a `seed` adds noise, and the negative seed that noise with the other sign.

    `part` is how much of what rounding operands may move is added where an op leaves that to the backend; 0 leaves the
    rounding out.
    """

    def __init__(
        self, module: fx.GraphModule, seed: int, shares: Mapping[Any, float], part: float = 1 / FACTOR
    ) -> None:
        super().__init__(module)
        self.shares, self.part = shares, part
        self.side = 1 if seed > 0 else -1
        self.random = torch.Generator().manual_seed(abs(seed)) if seed else None

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is given moves too, for sums that cancel; values as short as 0.5 are taken as meant."""
        x = super().placeholder(target, args, kwargs)
        if self.random is None or x.dtype != torch.float64:
            return x
        return torch.where(x == x.bfloat16().double(), x, x * (1 + NOISE * self._signs(x.shape)))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map(self._literal, (args, kwargs))
        called = target if self.part else EXACT.get(target, target)
        result = super().call_function(called, args, kwargs)
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = pytree.tree_map(lambda x: self._moved(x, given), result)
        if target in CANCELS and self.random is not None and self.side > 0:
            result = self._cancelled(result, args)
        if self.random is None or not isinstance(result, Tensor) or not result.numel():
            return result
        most = moves(target, args, kwargs, result, self.shares)
        return result if most is None else result + self.part * most * self._signs(result.shape).sign()

    def _literal(self, x: Any) -> Any:
        """float64 for float32; numbers that float32 rounds move as well."""
        if x is torch.float32:
            return torch.float64
        if not isinstance(x, float) or self.random is None or float(np.float32(x)) == x:
            return x
        return x * (1 + NOISE * float(self._signs(())))

    def _signs(self, shape: Sequence[int]) -> Tensor:
        """1/2 to 3/2 with either sign: noise of equal size may cancel."""
        drawn = torch.rand(shape, generator=self.random, dtype=torch.float64) * 2 - 1
        return self.side * (drawn + 0.5 * drawn.sign())

    def _cancelled(self, x: Any, args: tuple[Any, ...]) -> Any:
        """0 for what is left of larger numbers and as small as their rounding: float32 may lose all of it."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        largest = [a.abs() if isinstance(a, Tensor) else torch.tensor(abs(float(a))) for a in args[:2]]
        rounding = 2 * NOISE * torch.maximum(*(a.double().broadcast_to(x.shape) for a in largest))
        return torch.where(x.abs() <= rounding, 0.0, x)

    def _moved(self, x: Any, given: set[int]) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.bfloat16:
            return x
        y = x.double()
        if self.random is None or x.untyped_storage().data_ptr() in given:
            return y
        y = torch.where(y.abs() < SMALLEST, 0.0, y)
        inexact = y.isfinite() & (y != y.float().double())
        return torch.where(inexact, y * (1 + NOISE * self._signs(y.shape)), y)


def expected(
    program: Program, inputs: Mapping[str, Tensor], entry: str = "forward", shares: Mapping[Any, float] = SHARES
) -> dict[str, Expected]:
    """What the outputs should be; `shares` says how far some ops may be off, of their largest value."""
    chosen = program.entries[entry]
    module = fx.GraphModule(torch.nn.Module(), chosen.graph)
    sources: dict[str, Mapping[str, Tensor]] = {"input": inputs, "weight": program.weights}
    given = [sources[binding(n).kind][binding(n).key] for n in chosen.placeholders()]
    plain = program.run(entry, inputs)
    wide = [t.double() if t.dtype == torch.float32 else t for t in given]
    seeds = [0, *(side * (k + 1) for k in range(PAIRS) for side in (1, -1))]
    with torch.no_grad():
        exact, *noisy = (_Wide(module, seed, shares).run(*wide) for seed in seeds)
        rounds = any(node.target in BOUNDS or node.target in shares for node in chosen.calls())
        whole = [_Wide(module, seed, shares, float(seed != 0)).run(*wide) for seed in seeds if rounds]
    return {
        output.name: _expected(exact[k], [run[k] for run in noisy], [run[k] for run in whole], plain[output.name].dtype)
        for k, output in enumerate(chosen.outputs)
    }


def _expected(exact: Tensor, noisy: list[Tensor], whole: list[Tensor], dtype: torch.dtype) -> Expected:
    """Small moves count `FACTOR` times, as far as results are linear in them; whole ones reach past a threshold."""
    wide = exact.double()
    found = [(run.double() - wide).abs().nan_to_num(0.0, 0.0, 0.0) for run in (*noisy, *whole)]
    kinds = [(run.double().isfinite() == wide.isfinite()) & (run.isnan() == wide.isnan()) for run in (*noisy, *whole)]
    factors = [FACTOR] * len(noisy) + [WHOLE] * len(whole)
    stable = torch.stack(kinds).all(0)
    largest = torch.stack([move * factor for move, factor in zip(found, factors, strict=True)]).amax(0)
    if not exact.is_floating_point():
        return Expected(exact, torch.zeros_like(wide), stable & (largest == 0), dtype)
    stable &= ~(wide.isfinite() & (wide.abs() > LARGEST))
    scale = wide.abs().nan_to_num(0.0, 0.0, 0.0)
    scale = scale.max() if scale.numel() else scale.new_zeros(())
    return Expected(exact, largest + FLOOR * (wide.abs() + 0.1 * scale).nan_to_num(0.0, 0.0, 0.0), stable, dtype)

"""f_L(...f_1(f_0(x))) -> f_L(...f_0(x)): layers are skipped while decoding, or everywhere; caches only for the rest.

Unified Layer Skipping (Liu et al., 2024): which layers run depends on the wanted speed-up alone, so that batches and
caches work as before; the prompt is read by all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal, get_args

from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer, chosen, find_layers
from sylvester.compiler.pipeline import Contract, Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.passes import skip_curve
from sylvester.passes.depth import Phase, edited, require_phase
from sylvester.passes.options import require_choice, require_numbers
from sylvester.passes.similarity import similarity
from sylvester.passes.skip_rules import kept_paper, kept_similar, kept_uniform, largest_speedup

Rule = Literal["paper", "uniform", "similarity"]


@dataclass(frozen=True)
class SkipLayers(Pass):
    """Skip the layers with the numbers in `layers` (from 0, in the order they run), or as many as `speedup` asks for.

    With a speed-up of s, floor(L / s) of the L layers of each stack run, the first and the last among them. `rule` is
    "uniform" (equal distances), "paper" (every g-th from the front; for s of 2 and more) or "similarity" (those that
    turn the stream least go, measured on calibration data). `phase` "decode" leaves the reading of prompts alone, "all"
    drops the layers for good.
    """

    name: ClassVar[str] = "skip-layers"
    contract: ClassVar[Contract] = "lossy"
    speedup: float | None = None
    layers: tuple[int, ...] = ()
    rule: Rule = "uniform"
    phase: Phase = "decode"

    def __post_init__(self) -> None:
        require_numbers("layers", self.layers)
        require_choice("rule", self.rule, get_args(Rule))
        require_choice("phase", self.phase, get_args(Phase))
        if (self.speedup is None) == (not self.layers):
            raise ValueError(f"give either speedup or layers, found speedup={self.speedup} and layers={self.layers}")
        if self.speedup is None:
            return
        if isinstance(self.speedup, bool) or not isinstance(self.speedup, (int, float)) or not self.speedup >= 1:
            raise ValueError(f"speedup is {self.speedup!r}, expected a number of 1 or more")
        if self.rule == "paper" and 1 < self.speedup < 2:
            raise ValueError(f"rule='paper' is for a speedup of 2 or more, found {self.speedup}; use rule='uniform'")

    def requires(self, program: Program) -> None:
        require_phase(program, self.phase)
        self._skipped(program, find_layers(program))

    def run(self, program: Program) -> Changes:
        layers = find_layers(program)
        skipped, before = self._skipped(program, layers), program.clone()
        if not skipped:
            return Changes()
        changes = edited(program, layers, self.phase, lambda depth: depth.drop_layers(skipped))
        if self.speedup is not None:
            skip_curve.record(changes, before, self._variants(before, layers, len(skipped)))
        changes.note(f"{len(skipped)} of {len(layers)} layers skipped: {[layer.index for layer in skipped]}")
        return changes

    def _variants(self, program: Program, layers: Sequence[Layer], most: int) -> Iterator[tuple[float, Program]]:
        """Programs that skip fewer layers by the same rule, and their share of all."""
        for gone in skip_curve.parts(most):
            step = replace(self, speedup=len(layers) / (len(layers) - gone))
            numbers = tuple(layer.index for layer in step._skipped(program, find_layers(program)))
            if numbers:
                step = replace(self, speedup=None, layers=numbers)
                yield len(numbers) / len(layers), Pipeline((step,), check=False)(program)

    def _skipped(self, program: Program, layers: Sequence[Layer]) -> list[Layer]:
        if self.layers:
            return chosen(layers, self.layers, "layers")
        stacks = [list(stack) for _, stack in groupby(layers, key=lambda layer: layer.index - layer.place)]
        kept = {layer.index for stack in stacks for layer in self._kept(program, stack)}
        return [layer for layer in layers if layer.index not in kept]

    def _kept(self, program: Program, stack: Sequence[Layer]) -> list[Layer]:
        speedup, count = self.speedup or 1.0, len(stack)
        if speedup > largest_speedup(count):
            raise CompileError(
                f"speedup={speedup:g} is not reachable: the first and the last of {count} layers always run",
                hint=f"give at most {largest_speedup(count):g}, or name the layers",
            )
        if speedup == 1:
            return list(stack)
        if self.rule == "similarity":
            return [stack[n] for n in kept_similar(similarity(program, stack), speedup)]
        rule = kept_paper if self.rule == "paper" else kept_uniform
        return [stack[n] for n in rule(count, speedup)]

"""Which rotations lower the loss of a quantised program: each is tried on calibration data and kept if it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sylvester.compiler import quality
from sylvester.compiler.calibration import Sample
from sylvester.compiler.next_token import language_model
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.passes.equalize import Equalize
from sylvester.passes.quantize import Quantize
from sylvester.passes.rotate_hadamard import RotateHadamard
from sylvester.passes.split_linears import SplitLinears

SAMPLES = 4
"""Calibration samples that a choice is measured on."""
LEAST_GAIN = 0.02
"""Part of the loss that a rotation must take away: less is noise."""
EQUALIZE = "equalize"
ROTATIONS = ("residual", "values", "ffn", "heads", "keys")


@dataclass(frozen=True)
class Choice:
    """The passes to use before rounding, and what was measured."""

    passes: tuple[Pass, ...]
    notes: tuple[str, ...]


def choose_rotations(program: Program, quantize: Quantize, options: Sequence[str]) -> Choice:
    """The set of options with the least loss among none, all, and the better of both with each one changed.

    Options are "equalize" and the rotations. The loss is KL from the float program for language models, else the
    largest relative error of an output; weights are rounded to nearest, whatever the method will be.
    """
    trial = _Trial(program, dataclasses.replace(quantize, method="rtn", static=False))
    none, every = frozenset[str](), frozenset(options)
    best = every if trial.lower(every, none) else none
    notes = [f"{_named(every)}: {trial.name} {trial.loss(none):.3g} -> {trial.loss(every):.3g}"]
    for option in options:
        without, with_it = best - {option}, best | {option}
        kept = trial.lower(with_it, without)
        best = with_it if kept else without
        change = f"{trial.name} {trial.loss(without):.3g} -> {trial.loss(with_it):.3g}"
        notes.append(f"{_named({option})} {'kept' if kept else 'rejected'}: {change}")
    return Choice(_passes(best), tuple(notes))


class _Trial:
    """Losses by the set of rotations; each is measured once."""

    def __init__(self, program: Program, quantize: Quantize) -> None:
        self.program, self.quantize = program, quantize
        self.samples: tuple[Sample, ...] = tuple(
            islice(program.calibration.fit if program.calibration else (), SAMPLES)
        )
        self.name = "KL" if language_model(program) else "error"
        self.losses: dict[frozenset[str], float] = {}

    def loss(self, options: frozenset[str]) -> float:
        if options not in self.losses:
            report(f"try {_named(options)}", len(self.losses), len(self.losses) + 1)
            self.losses[options] = self._measured(options)
        return self.losses[options]

    def lower(self, options: frozenset[str], than: frozenset[str]) -> bool:
        """Whether the loss is lower by more than noise; the first is measured on the model as it came."""
        before = self.loss(than)
        return self.loss(options) < before * (1 - LEAST_GAIN)

    def _measured(self, options: frozenset[str]) -> float:
        bare = self.program.clone()
        bare.calibration = None
        changed = Pipeline((*_passes(options), self.quantize), check=False)(bare)
        if self.name == "KL":
            return quality.compare(self.program, changed, self.samples).kl
        return max((d.error for d in quality.drift(self.program, changed, self.samples)), default=0.0)


def _passes(options: frozenset[str]) -> tuple[Pass, ...]:
    scaled = (SplitLinears(), Equalize()) if EQUALIZE in options else ()
    if not options & set(ROTATIONS):
        return scaled
    chosen: dict[str, Any] = {option: option in options for option in ROTATIONS}
    return *scaled, RotateHadamard(**chosen)


def _named(options: Set[str]) -> str:
    """The options in words."""
    turned = [option for option in ROTATIONS if option in options]
    parts = [*([EQUALIZE] if EQUALIZE in options else []), *([f"rotation {', '.join(turned)}"] if turned else [])]
    return " and ".join(parts) or "no rotation"

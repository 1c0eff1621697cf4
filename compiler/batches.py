"""Which samples a training step sees: windows in an order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sylvester.compiler.calibration import Sample
from sylvester.compiler.next_token import LanguageModel, language_model
from sylvester.compiler.program import Program, binding, value

LEAST = 3
"""Tokens of a window: a prompt, a token to score, and the one that follows it."""
PARTS = 4
"""A batch is computed in so many parts on a CPU, whatever the number of threads, so that sums are the same."""


@dataclass(frozen=True)
class Part:
    """Rows of a batch that run together: the samples with these numbers, one behind the other.

    `share` is their part of the batch, `turn` the number of the step.
    """

    numbers: tuple[int, ...]
    sample: Sample
    share: float
    turn: int


@dataclass
class Batches:
    """`size` samples a step in at most `parts` parts, each sample once before any comes again."""

    program: Program
    samples: Sequence[Sample]
    size: int
    seed: int
    parts: int = PARTS
    _orders: dict[int, Tensor] = field(default_factory=dict)

    def at(self, step: int) -> list[Part]:
        """The parts of a step; rows of equal shape are stacked where the program takes any number of rows."""
        numbers = [self._number(i) for i in range(step * self.size, (step + 1) * self.size)]
        weights = {number: _weight(self.samples[number]) for number in numbers}
        total = sum(weights[number] for number in numbers)
        groups: dict[object, list[int]] = {}
        for place, number in enumerate(numbers):
            shapes = tuple((name, t.shape) for name, t in self.samples[number].items())
            groups.setdefault(shapes if self._any_rows() else place, []).append(number)
        most = max(1, -(-self.size // self.parts))
        chunks = [group[i : i + most] for group in groups.values() for i in range(0, len(group), most)]
        return [
            Part(tuple(chunk), self._stacked(chunk), sum(weights[n] for n in chunk) / total, step) for chunk in chunks
        ]

    def _number(self, place: int) -> int:
        epoch, at = divmod(place, len(self.samples))
        if epoch not in self._orders:
            random = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.samples), generator=random)
        return int(self._orders[epoch][at])

    def _any_rows(self) -> bool:
        facts = [value(node) for node in self.program.main.placeholders("input")]
        return all(fact.ndim and isinstance(fact.shape[0], torch.SymInt) for fact in facts)

    def _stacked(self, numbers: Sequence[int]) -> Sample:
        samples = [self.samples[number] for number in numbers]
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def _weight(sample: Sample) -> int:
    """What a sample counts beside others: its rows, times its tokens where it is made of tokens."""
    first = next(iter(sample.values()))
    if first.ndim == 2 and not first.is_floating_point():
        return first.numel()
    return max(1, len(first)) if first.ndim else 1


def windows(program: Program, samples: Sequence[Sample], window: int) -> list[Sample]:
    """Samples of tokens cut into windows; what is no row of tokens of any length stays whole."""
    model = language_model(program)
    found: list[Sample] = []
    for sample in samples:
        if model is None or list(sample) != [model.tokens] or _fixed(program, model):
            found.append(sample)
            continue
        pieces = sample[model.tokens].split(window, 1)
        found += [{model.tokens: piece} for piece in pieces if piece.shape[1] >= LEAST]
    return found


def _fixed(program: Program, model: LanguageModel) -> bool:
    node = next(n for n in program.main.placeholders("input") if binding(n).key == model.tokens)
    return not isinstance(value(node).shape[1], torch.SymInt)

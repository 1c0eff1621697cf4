"""Calibration data: inputs of the main entry that passes may fit to and measure on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Sample = dict[str, Tensor]
"""One call of the main entry: its inputs by name."""


@dataclass(frozen=True)
class Calibration:
    """Passes fit to `fit`; `held` is data that no pass sees, for reporting only."""

    fit: tuple[Sample, ...]
    held: tuple[Sample, ...] = ()


def spread(samples: Sequence[Sample], count: int) -> tuple[Sample, ...]:
    """So many samples at even distances."""
    return tuple(samples[i * len(samples) // count] for i in range(count))

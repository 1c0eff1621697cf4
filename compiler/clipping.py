"""Scales that cut off the largest values where this lowers the error: a search over a grid of shrink factors.

As in QuaRot (Ashkboos et al. 2024): factors 1.00, 0.99, ..., 0.21 of the widest scale, error |x - x'|^2.4 summed over
what shares a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sylvester.compiler.quantization import Grid, shortened

FACTORS = tuple(percent / 100 for percent in range(100, 20, -1))
POWER = 2.4


def clipped(split: Tensor, grid: Grid, short: bool) -> Tensor:
    """Scales [n, groups, 1] of split weights [n, groups, group]; never worse than the widest ones by this error.

    On a lopsided grid scales of the other sign are tried too, by which the largest value lies at the near end.
    """
    widest = grid.widest_scales(split)
    best = shortened(widest) if short else widest
    least = error(split, best, grid)
    for scales in _candidates(widest, grid):
        scales = shortened(scales) if short else scales
        found = error(split, scales, grid)
        better = found < least
        best, least = torch.where(better, scales, best), torch.where(better, found, least)
    return best


def _candidates(widest: Tensor, grid: Grid) -> list[Tensor]:
    found = [widest * factor for factor in FACTORS[1:]]
    if grid.lopsided:
        found += [widest * (factor * grid.least / grid.most) for factor in FACTORS]
    return found


def error(split: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """[..., group] and [..., 1] -> [..., 1]."""
    rounded = grid.nearest(split, scales).mul_(scales)
    return rounded.sub_(split).abs_().pow_(POWER).sum(-1, keepdim=True)

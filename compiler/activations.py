"""Inputs of a layer on calibration data: how rows are rounded, one step for all of them, how far the output moves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.clipping import FACTORS, error
from sylvester.compiler.quantization import Grid
from sylvester.compiler.quantized_rows import LARGEST, quantize_rows

VALUES_SEARCHED, ROWS_COMPARED = 1 << 20, 1 << 12
"""The most values that a search for a step reads, and the most rows whose outputs are compared."""
TINY = 1e-30


def rounded_rows(x: Tensor, bits: int, step: Tensor | None = None) -> Tensor:
    """What a layer multiplies instead of x; rows of 16 bits are x up to 2^-16 of their maximum."""
    if bits == 16:
        return x
    numbers, scale = quantize_rows(x, bits, step)
    return (numbers * scale).to(x.dtype)


def static_step(xs: Sequence[Tensor], bits: int, clip: bool) -> Tensor:
    """float32 [1]: the largest |x| is the largest number of so many bits, or is cut off where that lowers the error."""
    most = LARGEST[bits]
    widest = torch.stack([x.abs().max() for x in xs]).max().float().reshape(1) / most
    if not clip:
        return widest
    grid, values = Grid(bits, -most, most, 1, lambda numbers: numbers), _spread(xs)
    steps = [widest * factor for factor in FACTORS]
    return min(steps, key=lambda step: float(error(values, step, grid)))


def _spread(xs: Sequence[Tensor]) -> Tensor:
    """Evenly chosen values of all samples."""
    every = -(-sum(x.numel() for x in xs) // VALUES_SEARCHED)
    return torch.cat([x.float().flatten()[::every] for x in xs])


def peak_to_rms(xs: Sequence[Tensor]) -> float:
    """max |x| over the root of the mean square: how much of a grid outliers take up."""
    square = sum(float(x.double().square().sum()) for x in xs)
    rms = math.sqrt(square / max(1, sum(x.numel() for x in xs)))
    return max(float(x.abs().max()) for x in xs) / max(rms, TINY)


def matrix(x: Tensor) -> Tensor:
    """x [..., k] as rows [rows, k]; a vector is one row."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def leading_rows(xs: Sequence[Tensor]) -> list[Tensor]:
    """Some rows [rows, k] of every sample."""
    each = max(1, ROWS_COMPARED // max(1, len(xs)))
    return [matrix(x)[:each] for x in xs]


def output_sqnr(rows: Sequence[Tensor], rounded: Sequence[Tensor], weight: Tensor, stored: Tensor) -> float:
    """10 log10(|x W^T|^2 / |x W^T - x' Q^T|^2) in dB over pairs x, x' of rows."""
    signal, noise = TINY, TINY
    for x, near in zip(rows, rounded, strict=True):
        y = F.linear(x.float(), weight)
        signal += float(y.double().square().sum())
        noise += float((F.linear(near.float(), stored) - y).double().square().sum())
    return 10 * math.log10(signal / noise)

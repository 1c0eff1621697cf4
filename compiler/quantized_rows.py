"""Rows of x -> whole numbers of 4, 8 or 16 bits, or float8, times a scale, as the low-bit linear layers read them."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {4: 7, 8: 127, 16: 32385}
"""The largest whole number of a row of so many bits. Of 16 bits it is 254 q1 + q2 with two numbers of 8 bits."""

FLOAT8, LARGEST_FLOAT8 = torch.float8_e4m3fn, 448.0
"""Four bits of exponent and three of mantissa, no infinities, and its largest number (Micikevicius et al., 2022)."""


def quantize_rows(x: Tensor, bits: int = 8, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers and float32 scales [..., 1], x ~ numbers * scales; float32 throughout.

    The scale is max |x| / `LARGEST` over the last axis, the numbers round(x / scale) with ties to even; a row of zeros
    has scale 0 and numbers 0. With a `step` [1] that is the scale of every row, and numbers past the largest are cut;
    one that is not positive makes all numbers 0.
    Of 16 bits, numbers are 254 q1 + q2 and scales max |x| / 127 / 254: q1 = round(x / s1) with s1 = max |x| / 127, then
    q2 = round((x - s1 q1) / s2) with s2 = s1 / 254.
    """
    if bits not in LARGEST or (bits == 16 and step is not None):
        raise ValueError(f"rows of {bits} bits{' with a step' * (step is not None)}, expected 4, 8, or 16 without")
    if step is not None and step.shape != (1,):
        raise ValueError(f"a step of shape {list(step.shape)}, expected [1]")
    x = x.float()
    if step is not None:
        return _rounded(x, step.float()).clamp(-LARGEST[bits], LARGEST[bits]), step.float()
    if bits != 16:
        scale = x.abs().amax(-1, keepdim=True) / LARGEST[bits]
        return _rounded(x, scale), scale
    first = x.abs().amax(-1, keepdim=True) / LARGEST[8]
    high, second = _rounded(x, first), first / 254
    rest = (x.double() - first.double() * high.double()).float()
    return 254 * high + _rounded(rest, second), second


def float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of `FLOAT8` and float32 scales [..., 1], x ~ numbers * scales; float32 throughout.

    The scale is max |x| / 448 over the last axis, the numbers x / scale to nearest with ties to even; a row of zeros
    has scale 0 and numbers 0.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8
    quotients = torch.where(scale <= 0, 0.0, x / scale)
    return quotients.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8), scale


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale <= 0, 0.0, torch.round(x / scale))

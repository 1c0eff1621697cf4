"""Rows in 8 bits with a scale for every 64 values: what is kept of activations for the backward pass.

s = max|x| / 127 of a group, rounded to bfloat16, q = round(x / s): half a step is at most 0.4 % of the largest value of
a group. As block-wise quantisation of optimizer states (Dettmers et al., 2022), linear and of smaller groups.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.halo_kernels import library_for
from sylvester.compiler.halo_quantise import TINY, Rounded
from sylvester.compiler.halo_rotate import rotate

GROUP = 64
"""Values of a row that have one scale; the last group of a row may have fewer."""
TOP = 127.0


def grouped(x: Tensor) -> Rounded:
    """x [rows, width] as int8 [rows, width] and bfloat16 scales [rows, groups].

    The scale of a group with a NaN or an infinity is NaN, and so is the group when it is restored.
    """
    if kernels := library_for(x):
        found = kernels.grouped(x)
        if found is not None:
            return Rounded(*found)
    return composite_grouped(x)


def composite_grouped(x: Tensor) -> Rounded:
    rows, width = x.shape
    parts = F.pad(x.float(), (0, -width % GROUP)).view(rows, -1, GROUP)
    scales = _scales(parts.abs().amax(-1))
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales.float()).nan_to_num(nan=0.0)
    steps = (parts * inverse.unsqueeze(-1)).round().clamp(-TOP, TOP).nan_to_num(nan=0.0)
    return Rounded(steps.to(torch.int8).view(rows, -1)[:, :width].contiguous(), scales)


def _scales(top: Tensor) -> Tensor:
    scales = torch.where(top / TOP < TINY, 0.0, top / TOP)
    return torch.where(top.isfinite(), scales, torch.nan).bfloat16()


def restored(x: Rounded, dtype: torch.dtype) -> Tensor:
    """What was `grouped`, [rows, width] in a type."""
    if kernels := library_for(*x):
        found = kernels.restored(*x, dtype)
        if found is not None:
            return cast(Tensor, found)
    return composite_restored(x, dtype)


def composite_restored(x: Rounded, dtype: torch.dtype) -> Tensor:
    scales = x.scale.float().repeat_interleave(GROUP, 1)[:, : x.values.shape[1]]
    return (x.values.float() * scales).to(dtype)


def turned_back(x: Rounded, dtype: torch.dtype, features: bool) -> Tensor:
    """A tensor [rows, width] from what a linear layer keeps of it: one scale, rotated where `features`."""
    if kernels := library_for(*x):
        found = kernels.restored(*x, dtype, features)
        if found is not None:
            return cast(Tensor, found)
    wide = x.wide()
    return (rotate(wide, transposed=True) if features else wide).to(dtype)

"""Round to nearest: float weights -> bfloat16, int8 or int4 with scales, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sylvester.compiler.quantized_ops import GROUPS, row_slices

Rounded = tuple[Tensor, Tensor]
"""Stored numbers [n, k] (int4: [n, k / 2]) and float32 scales [n, groups]."""


def round_bf16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16)


def round_int8(weight: Tensor, group: int = 0) -> Rounded:
    """Numbers in [-127, 127] with scale max |w| / 127, of a whole row or of `group` columns, then held by bfloat16."""
    columns = weight.shape[1]
    return _by_rows(weight, lambda rows: _int8(rows, group), columns, columns // group if group else 1)


def round_int4(weight: Tensor, group: int = 32) -> Rounded:
    """Numbers in [-8, 7], two to a byte: the largest of a group in magnitude is -8 times a scale of either sign."""
    if group not in GROUPS:
        raise ValueError(f"int4 has groups of {GROUPS}, found {group}")
    columns = weight.shape[1]
    return _by_rows(weight, lambda rows: _int4(rows, group), columns // 2, columns // group)


def _by_rows(weight: Tensor, rounded: Callable[[Tensor], Rounded], columns: int, groups: int) -> Rounded:
    """Only one slice of rows has temporaries, and the results are there before them: the heap stays in one piece."""
    packed = torch.uint8 if columns < weight.shape[1] else torch.int8
    numbers = torch.empty((len(weight), columns), dtype=packed)
    scales = torch.empty((len(weight), groups), dtype=torch.float32)
    for rows, *results in row_slices(weight, numbers, scales):
        for result, values in zip(results, rounded(rows.float()), strict=True):
            result.copy_(values)
    return numbers, scales


def _int8(rows: Tensor, group: int) -> Rounded:
    split = rows.unflatten(1, (-1, group or rows.shape[1]))
    scales = split.abs().amax(-1, keepdim=True) / 127
    scales = _short(scales) if group else scales
    return _divide(split, scales).clamp(-127, 127).to(torch.int8).flatten(1), scales.squeeze(-1)


def _int4(rows: Tensor, group: int) -> Rounded:
    split = rows.unflatten(1, (-1, group))
    least, most = split.amin(-1, keepdim=True), split.amax(-1, keepdim=True)
    scales = _short(torch.where(most >= -least, most, least) / -8)
    nibbles = (_divide(split, scales).clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales.squeeze(-1)


def _divide(values: Tensor, scales: Tensor) -> Tensor:
    """Quotients rounded half to even; 0 where the scale is 0."""
    return torch.where(scales == 0, 0.0, torch.round(values / scales))


def _short(scales: Tensor) -> Tensor:
    """The nearest values that bfloat16 holds: kernels store the scales of groups so."""
    return scales.bfloat16().float()

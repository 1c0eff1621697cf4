"""Float weights -> short floats, or whole numbers of 8, 4 or 3 bits with scales, a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.packing import packed3, packed4
from sylvester.compiler.quantized_ops import GROUPS, row_slices
from sylvester.compiler.quantized_rows import FLOAT8, float8_rows

Rounded = tuple[Tensor, Tensor]
"""Stored numbers [n, k] (int4: [n, k / 2], int3: [n, 3 k / 8]) and float32 scales [n, groups]."""


@dataclass(frozen=True)
class Grid:
    """Whole numbers least .. most of `bits` bits; `step` columns fill whole bytes.

    `widest` times the scale is the value largest in magnitude: of a lopsided grid its far end, so that the scale has
    the sign that puts this value there.
    """

    bits: int
    least: int
    most: int
    step: int
    pack: Callable[[Tensor], Tensor]

    @property
    def lopsided(self) -> bool:
        return -self.least != self.most

    def widest_scales(self, split: Tensor) -> Tensor:
        """[..., group] -> [..., 1]: nothing of the group lies past the end of the grid by more than half a step."""
        if not self.lopsided:
            return split.abs().amax(-1, keepdim=True) / self.most
        least, most = split.amin(-1, keepdim=True), split.amax(-1, keepdim=True)
        return torch.where(most >= -least, most, least) / self.least

    def nearest(self, values: Tensor, scales: Tensor) -> Tensor:
        """Quotients rounded half to even, in the type of the values; 0 where the scale is 0."""
        return torch.where(scales == 0, 0.0, torch.round(values / scales)).clamp(self.least, self.most)


GRIDS = {
    8: Grid(8, -127, 127, 1, lambda numbers: numbers),
    4: Grid(4, -8, 7, 2, packed4),
    3: Grid(3, -4, 3, 8, packed3),
}
SMALLEST_GROUP = GROUPS[0]
Scaling = Callable[[Tensor, Grid, bool], Tensor]
"""Split weights [n, groups, group], their grid, whether bfloat16 holds the scales -> scales [n, groups, 1]."""


def widest(split: Tensor, grid: Grid, short: bool) -> Tensor:
    """Scales by which nothing is cut off."""
    scales = grid.widest_scales(split)
    return shortened(scales) if short else scales


def shortened(scales: Tensor) -> Tensor:
    """The nearest values that bfloat16 holds: kernels store the scales of groups so."""
    return scales.bfloat16().float()


def round_bf16(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16)


def round_fp16(weight: Tensor) -> Tensor:
    """The nearest values that float16 holds; raises ValueError for one beyond its largest, which would be infinite."""
    largest, most = float(weight.abs().max()) if weight.numel() else 0.0, torch.finfo(torch.float16).max
    if largest > most:
        raise ValueError(f"a value of {largest:.6g} in size, float16 holds at most {most:g}")
    return weight.to(torch.float16)


def round_fp8(weight: Tensor) -> Rounded:
    """float8 numbers (e4m3) [n, k] with scale max |w| / 448 of a whole row, [n, 1]."""
    numbers = torch.empty(weight.shape, dtype=FLOAT8)
    scales = torch.empty((len(weight), 1), dtype=torch.float32)
    for rows, stored, found in row_slices(weight, numbers, scales):
        rounded, scale = float8_rows(rows)
        stored.copy_(rounded)
        found.copy_(scale)
    return numbers, scales


def round_int8(weight: Tensor, group: int = 0) -> Rounded:
    """Numbers in [-127, 127] with scale max |w| / 127, of a whole row or of `group` columns, then held by bfloat16."""
    return round_weight(weight, 8, group)


def round_int4(weight: Tensor, group: int = SMALLEST_GROUP) -> Rounded:
    """Numbers in [-8, 7]: the largest of a group in magnitude is -8 times a scale of either sign."""
    return round_weight(weight, 4, group)


def round_int3(weight: Tensor, group: int = SMALLEST_GROUP) -> Rounded:
    """Numbers in [-4, 3]: the largest of a group in magnitude is -4 times a scale of either sign."""
    return round_weight(weight, 3, group)


def round_weight(weight: Tensor, bits: int, group: int, scaling: Scaling = widest) -> Rounded:
    """Weight [n, k] to nearest, by scales of `group` columns or, where it is 0, of a whole row.

    The last group of a row may be shorter. Only one slice of rows has temporaries, and the results are there before
    them: the heap stays in one piece.
    """
    grid = require_format(bits, group, weight.shape[1])
    n, k = weight.shape
    numbers = torch.empty((n, k * bits // 8), dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty((n, -(-k // group) if group else 1), dtype=torch.float32)
    for rows, packed, found in row_slices(weight, numbers, scales):
        split = split_groups(rows.float(), group)
        found.copy_(scaling(split, grid, group > 0).squeeze(-1))
        whole = grid.nearest(split, found.unsqueeze(-1)).to(torch.int8)
        packed.copy_(grid.pack(whole.flatten(1)[:, :k]))
    return numbers, scales


def require_format(bits: int, group: int, depth: int) -> Grid:
    """The grid of a format that exists; raises ValueError."""
    if bits not in GRIDS:
        raise ValueError(f"whole numbers of {bits} bits, expected one of {list(GRIDS)}")
    if group not in GROUPS and (group or bits != 8):
        raise ValueError(f"int{bits} has groups of {GROUPS}, found {group}")
    if depth % GRIDS[bits].step:
        raise ValueError(f"int{bits} has depths that are multiples of {GRIDS[bits].step}, found {depth}")
    return GRIDS[bits]


def split_groups(rows: Tensor, group: int) -> Tensor:
    """[n, k] -> [n, groups, group], the last group filled up with zeros."""
    if not group:
        return rows.unsqueeze(1)
    split: Tensor = F.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    return split

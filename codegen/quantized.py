"""Packed weights of the q8, q4 and q3 linear layers: panels of 32 rows of W, their scales beside them.

A panel of q8 without groups is [ceil(k / 4)][32][4] bytes w + 128, then 32 float32 scales. With groups of G it is, for
each group, 32 bfloat16 scales and [G / 4][32][4] bytes; the last group is filled with weights of 0. Panels of q4 and q3
always have groups. Of a group, q4 has [G / 4][16][4] bytes, whose low nibbles w + 8 belong to rows 0 .. 15 of the panel
and whose high nibbles to 16 .. 31. q3 has, for every 16 columns along k, 3 lines of [16][4] bytes: line s < 3 holds the
columns 4 s .. 4 s + 3 as q4 does, with w + 4 in the three low bits of each nibble. Bits 0, 1 and 2 of the last four
columns are the top bits of the nibbles of lines 0, 1 and 2.
`row` is an output feature and `column` its place along k; the place functions are integer arithmetic that also takes
symbols.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sylvester.codegen.layout import PANEL

GROUPS = (32, 64, 128)
"""Group sizes along k that the kernels take; q8 also takes 0, one scale per row."""
LARGEST_DEPTH = 1 << 16
"""Of q8 with one scale per row: a sum of k products of at most 255 * 127 fits an int32."""

Bytes = npt.NDArray[np.uint8]
_SCALES = 2 * PANEL
"""Bytes of one group's scales."""


def group_of(k: int, groups: int, *, whole: bool) -> int:
    """The group size of a panel for weights with so many groups, whose last one may be shorter.

    Rows with one scale have 0 where `whole` allows it, else groups that share the scale.
    """
    if whole and groups == 1:
        return 0
    found = next((g for g in GROUPS if -(-k // g) == groups), GROUPS[-1] if groups == 1 else 0)
    if not found:
        raise ValueError(f"groups of {GROUPS} along k, got {groups} groups of k = {k}")
    return found


def panel_bytes_q8(k: Any, group: int) -> Any:
    """Bytes of one panel of q8."""
    if group:
        return _groups(k, group) * _group_bytes(8, group)
    return (k + 3) // 4 * (4 * PANEL) + 4 * PANEL


def panel_bytes_q4(k: Any, group: int) -> Any:
    """Bytes of one panel of q4."""
    return _groups(k, group) * _group_bytes(4, group)


def panel_bytes_q3(k: Any, group: int) -> Any:
    """Bytes of one panel of q3."""
    return _groups(k, group) * _group_bytes(3, group)


def _groups(k: Any, group: int) -> Any:
    return (k + group - 1) // group


def _group_bytes(bits: int, group: int) -> int:
    return _SCALES + PANEL * bits // 8 * group


def place_q8(row: Any, column: Any, k: Any, group: int) -> Any:
    """Byte of weight (row, column), stored as w + 128."""
    panel = row // PANEL * panel_bytes_q8(k, group)
    if not group:
        return panel + column // 4 * (4 * PANEL) + row % PANEL * 4 + column % 4
    start = column // group * _group_bytes(8, group) + _SCALES
    return panel + start + column % group // 4 * (4 * PANEL) + row % PANEL * 4 + column % 4


def scale_place_q8(row: Any, column: Any, k: Any, group: int) -> Any:
    """First byte of the scale of weight (row, column): float32 without groups, else bfloat16."""
    panel = row // PANEL * panel_bytes_q8(k, group)
    if not group:
        return panel + (k + 3) // 4 * (4 * PANEL) + row % PANEL * 4
    return panel + column // group * _group_bytes(8, group) + row % PANEL * 2


def place_q4(row: Any, column: Any, k: Any, group: int) -> tuple[Any, Any]:
    """Byte of weight (row, column) and the shift (0 or 4) of its nibble w + 8 in it."""
    start = row // PANEL * panel_bytes_q4(k, group) + column // group * _group_bytes(4, group) + _SCALES
    return start + column % group // 4 * (2 * PANEL) + row % (PANEL // 2) * 4 + column % 4, row % PANEL // 16 * 4


def scale_place_q4(row: Any, column: Any, k: Any, group: int) -> Any:
    """First byte of the bfloat16 scale of weight (row, column)."""
    return row // PANEL * panel_bytes_q4(k, group) + column // group * _group_bytes(4, group) + row % PANEL * 2


def place_q3(row: Any, column: Any, k: Any, group: int) -> tuple[tuple[Any, Any], ...]:
    """Byte and place in it of each of the three bits of weight (row, column), stored as w + 4; the lowest bit first."""
    start = row // PANEL * panel_bytes_q3(k, group) + column // group * _group_bytes(3, group) + _SCALES
    step, nibble = column % 16 // 4, row % PANEL // 16 * 4
    line = start + column % group // 16 * (6 * PANEL) + row % (PANEL // 2) * 4 + column % 4
    last = step // 3
    return tuple((line + (step + last * (bit - 3)) * (2 * PANEL), nibble + bit + last * (3 - bit)) for bit in range(3))


def scale_place_q3(row: Any, column: Any, k: Any, group: int) -> Any:
    """First byte of the bfloat16 scale of weight (row, column)."""
    return row // PANEL * panel_bytes_q3(k, group) + column // group * _group_bytes(3, group) + row % PANEL * 2

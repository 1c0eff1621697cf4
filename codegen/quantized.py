"""Packed weights of the q8 and q4 linear layers: panels of 32 rows of W, their scales beside them.

A panel of q8 without groups is [ceil(k / 4)][32][4] bytes w + 128, then 32 float32 scales. With groups of G it is, for
each group, 32 bfloat16 scales and [G / 4][32][4] bytes. A panel of q4 is, for each group, 32 bfloat16 scales and
[G / 4][16][4] bytes, whose low nibbles w + 8 belong to rows 0 .. 15 of the panel and whose high nibbles to 16 .. 31.
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
_ZERO_Q8 = 128
_SCALES = 2 * PANEL
"""Bytes of one group's scales."""


def panel_bytes_q8(k: Any, group: int) -> Any:
    """Bytes of one panel of q8."""
    if group:
        return k // group * (_SCALES + PANEL * group)
    return (k + 3) // 4 * (4 * PANEL) + 4 * PANEL


def panel_bytes_q4(k: Any, group: int) -> Any:
    """Bytes of one panel of q4."""
    return k // group * (_SCALES + PANEL // 2 * group)


def place_q8(row: Any, column: Any, k: Any, group: int) -> Any:
    """Byte of weight (row, column), stored as w + 128."""
    panel = row // PANEL * panel_bytes_q8(k, group)
    if not group:
        return panel + column // 4 * (4 * PANEL) + row % PANEL * 4 + column % 4
    start = column // group * (_SCALES + PANEL * group) + _SCALES
    return panel + start + column % group // 4 * (4 * PANEL) + row % PANEL * 4 + column % 4


def scale_place_q8(row: Any, column: Any, k: Any, group: int) -> Any:
    """First byte of the scale of weight (row, column): float32 without groups, else bfloat16."""
    panel = row // PANEL * panel_bytes_q8(k, group)
    if not group:
        return panel + (k + 3) // 4 * (4 * PANEL) + row % PANEL * 4
    return panel + column // group * (_SCALES + PANEL * group) + row % PANEL * 2


def place_q4(row: Any, column: Any, k: Any, group: int) -> tuple[Any, Any]:
    """Byte of weight (row, column) and the shift (0 or 4) of its nibble w + 8 in it."""
    start = row // PANEL * panel_bytes_q4(k, group) + column // group * (_SCALES + PANEL // 2 * group) + _SCALES
    return start + column % group // 4 * (2 * PANEL) + row % (PANEL // 2) * 4 + column % 4, row % PANEL // 16 * 4


def scale_place_q4(row: Any, column: Any, k: Any, group: int) -> Any:
    """First byte of the bfloat16 scale of weight (row, column)."""
    return row // PANEL * panel_bytes_q4(k, group) + column // group * (_SCALES + PANEL // 2 * group) + row % PANEL * 2


def pack_q8(weight: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> Bytes:
    """int8 [n, k] and scales [n, groups] -> [ceil(n / 32), panel_bytes_q8]; one column of scales is group 0."""
    if weight.ndim != 2 or weight.dtype != np.int8:
        raise ValueError(f"a q8 weight is int8 [n, k], got {weight.dtype} {weight.shape}")
    n, k = weight.shape
    group = _group(n, k, scales, whole=True)
    stored = np.full((_panels(n) * PANEL, (k + 3) // 4 * 4), _ZERO_Q8, np.uint8)
    stored[:n, :k] = weight.view(np.uint8) ^ np.uint8(_ZERO_Q8)
    quads = stored.reshape(_panels(n), PANEL, -1, 4).transpose(0, 2, 1, 3).reshape(_panels(n), -1)
    if group:
        return _interleave(quads, _panel_scales(scales, n), k // group)
    return np.concatenate([quads, _padded(scales, n).reshape(-1, PANEL).view(np.uint8)], axis=1)


def pack_q4(weight: Bytes, scales: npt.NDArray[np.float32]) -> Bytes:
    """uint8 [n, k / 2], two nibbles w + 8 per byte (low: even k), and scales [n, k / group] -> panels of q4."""
    if weight.ndim != 2 or weight.dtype != np.uint8:
        raise ValueError(f"a q4 weight is uint8 [n, k / 2], got {weight.dtype} {weight.shape}")
    n, k = weight.shape[0], 2 * weight.shape[1]
    group = _group(n, k, scales, whole=False)
    stored = np.full((_panels(n) * PANEL, k // 2), 0x88, np.uint8)
    stored[:n] = weight
    nibbles = np.stack([stored & 15, stored >> 4], axis=2).reshape(_panels(n), 2, PANEL // 2, -1, 4)
    quads = (nibbles[:, 0] | nibbles[:, 1] << 4).transpose(0, 2, 1, 3).reshape(_panels(n), -1)
    return _interleave(quads, _panel_scales(scales, n), k // group)


def _panels(n: int) -> int:
    return -(-n // PANEL)


def _group(n: int, k: int, scales: npt.NDArray[np.float32], *, whole: bool) -> int:
    """The group size that `scales` stands for; 0 when it has one column and `whole` rows are allowed."""
    if scales.ndim != 2 or scales.dtype != np.float32 or scales.shape[0] != n:
        raise ValueError(f"scales are float32 [{n}, groups], got {scales.dtype} {scales.shape}")
    groups: int = scales.shape[1]
    if whole and groups == 1:
        return 0
    if groups == 0 or k % groups or k // groups not in GROUPS:
        raise ValueError(f"groups of {GROUPS} must divide k, got {groups} groups of k = {k}")
    return k // groups


def _padded(scales: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    padded = np.zeros((_panels(n) * PANEL, scales.shape[1]), np.float32)
    padded[:n] = scales
    return padded


def _panel_scales(scales: npt.NDArray[np.float32], n: int) -> Bytes:
    """Scales rounded to the nearest bfloat16 (ties to even): [panels, groups, 64] bytes."""
    if not np.isfinite(scales).all():
        raise ValueError("scales must be finite")
    bits = _padded(scales, n).view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    panels = halves.reshape(-1, PANEL, scales.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(panels).view(np.uint8)


def _interleave(quads: Bytes, scales: Bytes, groups: int) -> Bytes:
    """Put each group's scales before its weights."""
    panels = quads.shape[0]
    parts = [scales, quads.reshape(panels, groups, -1)]
    return np.concatenate(parts, axis=2).reshape(panels, -1)

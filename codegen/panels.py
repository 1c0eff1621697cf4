"""Stored weights -> panels of 32 rows: float32, and int8, int4 and int3 as codegen/quantized.py describes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sylvester.codegen.layout import PANEL
from sylvester.codegen.quantized import Bytes, group_of

Scales = npt.NDArray[np.float32]
HALF = PANEL // 2


def pack_f32(weight: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """[n, k] -> [ceil(n / 32), k, 32], the last panel padded with zeros."""
    if weight.ndim != 2:
        raise ValueError(f"a linear weight has 2 axes, got shape {weight.shape}")
    n, k = weight.shape
    padded = np.zeros((_panels(n) * PANEL, k), np.float32)
    padded[:n] = weight
    return np.ascontiguousarray(padded.reshape(-1, PANEL, k).transpose(0, 2, 1))


def pack_q8(weight: npt.NDArray[np.int8], scales: Scales) -> Bytes:
    """int8 [n, k] and scales [n, groups] -> [ceil(n / 32), panel_bytes_q8]; one column of scales is group 0."""
    if weight.ndim != 2 or weight.dtype != np.int8:
        raise ValueError(f"a q8 weight is int8 [n, k], got {weight.dtype} {weight.shape}")
    n, k = weight.shape
    group = _group(n, k, scales, whole=True)
    stored = _filled(weight.view(np.uint8) ^ np.uint8(128), group or 4, 128)
    quads = stored.reshape(_panels(n), PANEL, -1, 4).transpose(0, 2, 1, 3).reshape(_panels(n), -1)
    if group:
        return _interleave(quads, scales, k, group)
    return np.concatenate([quads, _padded(scales, n).reshape(-1, PANEL).view(np.uint8)], axis=1)


def pack_q4(weight: Bytes, scales: Scales) -> Bytes:
    """uint8 [n, k / 2], two nibbles w + 8 per byte (low: even k), and scales [n, groups] -> panels of q4."""
    if weight.ndim != 2 or weight.dtype != np.uint8:
        raise ValueError(f"a q4 weight is uint8 [n, k / 2], got {weight.dtype} {weight.shape}")
    n, k = weight.shape[0], 2 * weight.shape[1]
    group = _group(n, k, scales, whole=False)
    halves = _halves(np.stack([weight & 15, weight >> 4], axis=2).reshape(n, k), group, 8)
    quads = (halves[:, 0] | halves[:, 1] << np.uint8(4)).transpose(0, 2, 1, 3).reshape(_panels(n), -1)
    return _interleave(quads, scales, k, group)


def pack_q3(weight: Bytes, scales: Scales) -> Bytes:
    """uint8 [n, 3 k / 8], planes of the two low bits and the high bit of w + 4, and scales [n, groups] -> q3 panels."""
    if weight.ndim != 2 or weight.dtype != np.uint8 or weight.shape[1] % 3:
        raise ValueError(f"a q3 weight is uint8 [n, 3 k / 8], got {weight.dtype} {weight.shape}")
    n, k = weight.shape[0], weight.shape[1] // 3 * 8
    group = _group(n, k, scales, whole=False)
    low, high = weight[:, : k // 4], weight[:, k // 4 :]
    halves = _halves(_fields(low, 2) | _fields(high, 1) << np.uint8(2), group, 4)
    pairs = (halves[:, 0] | halves[:, 1] << np.uint8(4)).reshape(_panels(n), HALF, -1, 4, 4)  # [.., unit, step, 4]
    lines: Bytes = pairs.transpose(0, 2, 3, 1, 4)
    tops: Bytes = (lines[:, :, 3:] >> np.arange(3, dtype=np.uint8)[:, None, None] & np.uint8(0x11)) << np.uint8(3)
    return _interleave(np.bitwise_or(lines[:, :, :3], tops).reshape(_panels(n), -1), scales, k, group)


def _fields(weight: Bytes, bits: int) -> Bytes:
    """Bytes [n, k * bits / 8] -> fields [n, k], the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (weight[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(weight.shape[0], -1)


def _halves(numbers: Bytes, group: int, zero: int) -> Bytes:
    """[n, k] -> [panels, 2, 16, whole groups / 4, 4], filled with `zero`."""
    return _filled(numbers, group, zero).reshape(_panels(len(numbers)), 2, HALF, -1, 4)


def _filled(numbers: Bytes, multiple: int, zero: int) -> Bytes:
    """Whole panels of rows and a multiple of columns, filled with `zero`."""
    n, k = numbers.shape
    filled = np.full((_panels(n) * PANEL, -(-k // multiple) * multiple), zero, np.uint8)
    filled[:n, :k] = numbers
    return filled


def _panels(n: int) -> int:
    return -(-n // PANEL)


def _group(n: int, k: int, scales: Scales, *, whole: bool) -> int:
    """The group size that `scales` stands for."""
    if scales.ndim != 2 or scales.dtype != np.float32 or scales.shape[0] != n or not scales.shape[1]:
        raise ValueError(f"scales are float32 [{n}, groups], got {scales.dtype} {scales.shape}")
    return group_of(k, scales.shape[1], whole=whole)


def _padded(scales: Scales, n: int) -> Scales:
    padded = np.zeros((_panels(n) * PANEL, scales.shape[1]), np.float32)
    padded[:n] = scales
    return padded


def _interleave(quads: Bytes, scales: Scales, k: int, group: int) -> Bytes:
    """Put each group's scales before its weights; one scale of a whole row goes with all its groups."""
    panels, groups = quads.shape[0], -(-k // group)
    each = _panel_scales(np.repeat(scales, groups, 1) if scales.shape[1] == 1 else scales)
    return np.concatenate([each, quads.reshape(panels, groups, -1)], axis=2).reshape(panels, -1)


def _panel_scales(scales: Scales) -> Bytes:
    """Scales rounded to the nearest bfloat16 (ties to even): [panels, groups, 64] bytes."""
    if not np.isfinite(scales).all():
        raise ValueError("scales must be finite")
    bits = _padded(scales, len(scales)).view(np.uint32)
    halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    panels = halves.reshape(-1, PANEL, scales.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(panels).view(np.uint8)

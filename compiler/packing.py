"""Whole numbers of 4 and 3 bits in bytes: rows [n, k] of int8 <-> uint8 [n, k / 2] and [n, 3 k / 8]."""

from __future__ import annotations

import torch
from torch import Tensor


def packed4(numbers: Tensor) -> Tensor:
    """Whole numbers -8 .. 7 [n, k], k even -> uint8 [n, k / 2], as `unpacked4` reads them."""
    _require(numbers, 2, 8)
    stored = (numbers + 8).to(torch.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4


def unpacked4(weight: Tensor) -> Tensor:
    """uint8 [n, k / 2] -> int8 [n, k]: the low half of a byte is the even column, stored as value + 8."""
    return torch.stack((weight & 15, weight >> 4), -1).flatten(1).to(torch.int8) - 8


def packed3(numbers: Tensor) -> Tensor:
    """Whole numbers -4 .. 3 [n, k], k a multiple of 8 -> uint8 [n, 3 k / 8], as `unpacked3` reads them."""
    _require(numbers, 8, 4)
    stored = (numbers + 4).to(torch.uint8)
    return torch.cat((_joined(stored & 3, 2), _joined(stored >> 2, 1)), 1)


def unpacked3(weight: Tensor) -> Tensor:
    """uint8 [n, 3 k / 8] -> int8 [n, k]: two planes of value + 4, each filling bytes from their lowest bit up.

    The first k / 4 bytes of a row hold the two low bits of its columns, four to a byte; the last k / 8 the high bits.
    """
    low, high = weight.split((weight.shape[1] // 3 * 2, weight.shape[1] // 3), 1)
    return (_fields(low, 2) | _fields(high, 1) << 2).to(torch.int8) - 4


def _require(numbers: Tensor, columns: int, limit: int) -> None:
    if numbers.ndim != 2 or numbers.shape[1] % columns:
        raise ValueError(
            f"numbers of shape {list(numbers.shape)}, expected a matrix with a multiple of {columns} columns"
        )
    if numbers.numel() and (numbers.min() < -limit or numbers.max() >= limit):
        raise ValueError(f"numbers {int(numbers.min())} .. {int(numbers.max())}, expected {-limit} .. {limit - 1}")


def _joined(values: Tensor, bits: int) -> Tensor:
    """Fields [n, k] of so many bits -> bytes [n, k * bits / 8]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    fields: Tensor = values.unflatten(1, (-1, 8 // bits)) << shifts
    return fields.sum(-1, dtype=torch.uint8)


def _fields(weight: Tensor, bits: int) -> Tensor:
    """Bytes [n, k * bits / 8] -> fields [n, k]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=weight.device)
    fields: Tensor = weight.unsqueeze(-1) >> shifts & (1 << bits) - 1
    return fields.flatten(1)

"""Dialect ops over quantised caches: one record of bytes per token and head holds its numbers and their scales.

A record of d features, little-endian, all zeros for a row of zeros:

- bits 8: float32 scale, then int8 numbers n, padded with zeros to a multiple of 16; x ~ scale * n, n in [-127, 127].
- bits 4: per group of 64 features a bfloat16 scale and a bfloat16 minimum, then per block of 32 features 16 bytes, of
  which byte i has feature i in its low half and feature i + 16 in its high half, padded with zeros;
  x ~ scale * n + minimum, n in [0, 15].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.ops import Cost, Ints, Records, attention, attention_cost, kv_update, op

BITS = (8, 4)
"""Bits per number of a quantised cache."""
HEADER, ALIGNED = 4, 16
"""Bytes of a scale with its minimum, and the multiple that int8 numbers fill."""
GROUP, BLOCK = 64, 32
"""Features of a 4-bit row that share a scale, and that are packed together."""


def record_bytes(d: int, bits: int) -> int:
    """Bytes of the record of a row of d features."""
    if bits not in BITS:
        raise ValueError(f"a cache has numbers of {bits} bits, expected one of {BITS}")
    if bits == 8:
        return HEADER + -(-d // ALIGNED) * ALIGNED
    return -(-d // GROUP) * HEADER + -(-d // BLOCK) * (BLOCK // 2)


def quantize_records(x: Tensor, bits: int) -> Tensor:
    """Float rows [..., d] -> uint8 [..., record_bytes(d, bits)], rounded to nearest, ties to even, in float32.

    A row with a value that is not finite becomes NaN as a whole.
    """
    record_bytes(x.shape[-1], bits)
    return _quantize8(x.float()) if bits == 8 else _quantize4(x.float())


def dequantize_records(records: Tensor, d: int, bits: int) -> Tensor:
    """uint8 [..., record_bytes(d, bits)] -> float32 [..., d]."""
    expected = record_bytes(d, bits)
    if records.dtype != torch.uint8 or records.shape[-1] != expected:
        found = f"{records.dtype} of {records.shape[-1]}"
        raise ValueError(f"records are {found}, expected torch.uint8 of {expected} bytes for {d} features")
    return _dequantize8(records, d) if bits == 8 else _dequantize4(records, d)


def _quantize8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    numbers = torch.where(scale > 0, torch.round(x / scale), 0.0).clamp(-127, 127).to(torch.int8)
    return torch.cat((_bytes(scale), F.pad(numbers, (0, -x.shape[-1] % ALIGNED)).view(torch.uint8)), -1)


def _dequantize8(records: Tensor, d: int) -> Tensor:
    numbers = records[..., HEADER : HEADER + d].view(torch.int8)
    return numbers.float() * _header(records[..., :HEADER], torch.float32)


def _quantize4(x: Tensor) -> Tensor:
    parts = [_group4(part) for part in x.split(GROUP, -1)]
    return torch.cat([h for h, _ in parts] + [n for _, n in parts], -1)


def _group4(x: Tensor) -> tuple[Tensor, Tensor]:
    """The header [..., 4] of one group and its packed numbers."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least = low.bfloat16().float() + 0.0  # -0 becomes 0
    scale = ((high - least) / 15).clamp(min=0).bfloat16().float()
    valid = scale.isfinite() & least.isfinite()
    numbers = torch.where(valid & (scale > 0), torch.round((x - least) / scale), 0.0).clamp(0, 15).to(torch.uint8)
    halves = F.pad(numbers, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, 2, BLOCK // 2))
    header = torch.cat((scale, least), -1).bfloat16().masked_fill(~valid, torch.nan)
    return _bytes(header), (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def _dequantize4(records: Tensor, d: int) -> Tensor:
    groups = -(-d // GROUP)
    header = _header(records[..., : groups * HEADER], torch.bfloat16).float().unflatten(-1, (groups, 2))
    packed = records[..., groups * HEADER :].unflatten(-1, (-1, BLOCK // 2))
    numbers = torch.stack((packed & 15, packed >> 4), -2).flatten(-3)[..., :d].float()
    parts = [part * header[..., g, :1] + header[..., g, 1:] for g, part in enumerate(numbers.split(GROUP, -1))]
    return torch.cat(parts, -1)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _header(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; the copy is aligned, whatever the place of the record."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _update_cost(cache: Tensor, new: Tensor, past: Tensor, bits: int) -> Cost:
    rows = new.numel() // new.shape[-1]
    return Cost(2 * new.numel(), new.numel() * new.element_size() + rows * cache.shape[-1])


@op(
    cost=_update_cost,
    examples=(
        (Records((2, 3, 16, 8), 8), (2, 3, 2, 8), Ints((), 3), 8),
        (Records((2, 3, 16, 150), 4), (2, 3, 2, 150), Ints((), 3), 4),
    ),
)
def kv_update_q(cache: Tensor, new: Tensor, past: Tensor, bits: int) -> Tensor:
    """`kv_update` of records [batch, heads, capacity, bytes]: `new` is quantised as `quantize_records` says."""
    return kv_update.reference(cache, quantize_records(new, bits), past)


@op(
    cost=attention_cost,
    examples=(
        ((2, 4, 3, 8), Records((2, 2, 16, 8), 8), Records((2, 2, 16, 8), 8), None, Ints((), 13), 0.35, True, 0, 1.5, 8),
        ((2, 4, 5, 70), *2 * (Records((2, 2, 7, 70), 4),), (2, 1, 5, 7), None, 0.1, False, 0, 0.0, 4),
    ),
)
def attention_q(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    bits: int,
    *,
    depths: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """`attention` over records k and v [batch, kv heads, keys, bytes] of as many features as q has."""
    keys, values = (dequantize_records(t, q.shape[-1], bits).to(q.dtype) for t in (k, v))
    given = (q, keys, values, mask, past, scale, causal, window, softcap)
    return attention.reference(*given, depths=depths, shared=shared)


UPDATES: frozenset[Any] = frozenset({kv_update.target, kv_update_q.target})
"""Every op that writes rows into a cache; cache, rows and position are their first arguments."""

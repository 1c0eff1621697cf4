"""Optional operands of attention: a prefix that the rows of a batch share, and lists of the blocks of keys to read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LISTED = 64
"""Queries, and keys, of a block where blocks of keys are listed."""


def require_alone(past: Tensor | None, shared: Tensor | None, blocks: Tensor | None) -> None:
    """`ValueError` where the operands do not go together."""
    if shared is not None and past is None:
        raise ValueError("attention with `shared` keys reads caches, got no `past`")
    if blocks is not None and past is not None:
        raise ValueError("attention over listed `blocks` reads no caches, got `past`")


def with_shared(x: Tensor, shared: Tensor | None) -> Tensor:
    """Keys or values [batch, heads, keys, d]: those at positions below `shared` are row 0's for every row."""
    if shared is None:
        return x
    return torch.where(torch.arange(x.shape[2], device=x.device)[:, None] < shared, x[:1], x)


def with_blocks(mask: Tensor | None, blocks: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """The mask that also hides the keys of blocks that are not listed."""
    if blocks is None:
        return mask
    seen = listed(blocks, queries, keys)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


def listed(blocks: Tensor, queries: int, keys: int) -> Tensor:
    """Lists [..., blocks of queries, most] of numbers of blocks of keys -> bool [..., queries, keys]."""
    numbers = torch.arange(-(-keys // LISTED), device=blocks.device)
    seen = (blocks.unsqueeze(-1) == numbers).any(-2)
    return seen.repeat_interleave(LISTED, -2)[..., :queries, :].repeat_interleave(LISTED, -1)[..., :keys]

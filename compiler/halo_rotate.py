"""Rotations around the products of training: x R over features of any width, H x over any number of tokens."""

from __future__ import annotations

from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler import ops
from sylvester.compiler.hadamard import find, largest_block

FEW_ADDITIONS = 64
"""Most additions per value of a rotation over tokens: the bases of some orders cost as much as the product."""


def rotate(x: Tensor, transposed: bool = False) -> Tensor:
    """x R over the last axis, in blocks of the largest order that divides its width; `transposed` undoes it."""
    block = largest_block(int(x.shape[-1]))
    return ops.hadamard(x, block, transposed) if block > 1 else x


def rotate_tokens(x: Tensor) -> Tensor:
    """H x [padded, features] of x [tokens, features], over tokens filled up with rows of zeros."""
    tokens = int(x.shape[0])
    order = padded(tokens)
    columns = F.pad(x.t().contiguous(), (0, order - tokens))
    return ops.hadamard(columns, order).t()


def restore_tokens(y: Tensor, tokens: int) -> Tensor:
    """The first rows of H^T y: exactly x where y = H x, as the rows that filled x up were zeros."""
    return ops.hadamard(y.t().contiguous(), int(y.shape[0]), True).t()[:tokens]


@lru_cache(4096)
def padded(tokens: int) -> int:
    """The least order of a cheap rotation over at least so many tokens; 1 for none."""
    return next(n for n in range(max(tokens, 1), 2 * max(tokens, 1) + 1) if _cheap(n))


def _cheap(n: int) -> bool:
    found = find(n)
    return found is not None and found.additions <= FEW_ADDITIONS

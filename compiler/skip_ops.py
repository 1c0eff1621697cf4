"""Dialect ops for parts that are skipped: for how many layers a token skips them, sums and caches without them."""

from __future__ import annotations

import torch
from torch import Tensor

from sylvester.compiler.ops import Cost, Ints, elementwise_cost, op


@op(
    cost=elementwise_cost,
    examples=(
        ((2, 3, 8), (2, 3, 8), None, 0.1, 2.0),
        ((1, 5, 7), (1, 5, 7), (1, 5), -2.0, 3.0),
        ((2, 3, 8), (2, 3, 8), None, 2.0, 1.0),
    ),
)
def layers_to_skip(before: Tensor, after: Tensor, left: Tensor | None, threshold: float, run: float) -> Tensor:
    """left - 1 for tokens that skip this layer (left > 0); else `run` where cos(before, after) >= threshold, or 0.

    before and after [batch, tokens, features] are the stream around a part, left and the result [batch, tokens] in the
    dtype of the stream. A token whose stream is 0 is saturated (FFN-SkipLLM, Jaiswal et al., 2024).
    """
    dot = (before * after).sum(-1)
    bound = threshold * torch.sqrt(before.square().sum(-1) * after.square().sum(-1))
    found = (dot >= bound).to(before.dtype) * run
    return found if left is None else torch.where(left > 0, left - 1, found)


@op(
    cost=elementwise_cost,
    examples=(
        ((2, 3, 8), (2, 3, 8), (2, 3)),
        ((1, 5, 7), (1, 5, 7), (1, 5)),
        *(((3, 2, 8), (3, 2, 8), Ints((1, 1), high)) for high in (1, 2)),
    ),
)
def add_unless(x: Tensor, part: Tensor, left: Tensor) -> Tensor:
    """x for tokens with left > 0, x + part for the others; x, part [batch, tokens, features].

    left is [batch, tokens], or [1, 1] for all tokens alike.
    """
    return torch.where(left.unsqueeze(-1) > 0, x, x + part)


@op(
    cost=lambda *_: Cost(0, 0),
    examples=(((2, 2, 16, 8), (2, 2, 16, 8), Ints((1, 1), 1)), ((1, 2, 5, 8), (1, 2, 5, 8), (1, 1))),
)
def update_unless(cache: Tensor, updated: Tensor, left: Tensor) -> Tensor:
    """What a cache holds after a part that is skipped where left [1, 1] > 0: what it held, else what was updated."""
    return torch.where(left.reshape(()) > 0, cache, updated)

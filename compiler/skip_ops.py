"""Dialect ops for parts that some tokens skip: when the stream is saturated, and a sum over the other tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from sylvester.compiler.ops import elementwise_cost, op


@op(
    cost=elementwise_cost,
    examples=(
        ((2, 3, 8), (2, 3, 8), None, 0.1),
        ((1, 5, 7), (1, 5, 7), (1, 5), -2.0),
        ((2, 3, 8), (2, 3, 8), None, 2.0),
    ),
)
def unsaturated(before: Tensor, after: Tensor, active: Tensor | None, threshold: float) -> Tensor:
    """Tokens that go on: 1 where cos(before, after) < threshold and `active` is above 0, else 0.

    before and after [batch, tokens, features] are the stream around a part, active and the result [batch, tokens] in
    the dtype of the stream. A token whose stream is 0 is saturated (FFN-SkipLLM, Jaiswal et al., 2024).
    """
    dot = (before * after).sum(-1)
    bound = threshold * torch.sqrt(before.square().sum(-1) * after.square().sum(-1))
    found = (dot < bound).to(before.dtype)
    return found if active is None else torch.where(active > 0, found, torch.zeros_like(found))


@op(cost=elementwise_cost, examples=(((2, 3, 8), (2, 3, 8), (2, 3)), ((1, 5, 7), (1, 5, 7), (1, 5))))
def add_where(x: Tensor, part: Tensor, active: Tensor) -> Tensor:
    """x + part for tokens that are active (above 0), x for the others; x, part [batch, tokens, features]."""
    return torch.where(active.unsqueeze(-1) > 0, x + part, x)

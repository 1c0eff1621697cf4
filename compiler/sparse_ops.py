"""Dialect ops over values of which many are zero: kernels of one row do not read the weights that meet a zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.ops import Cost, Stored, op

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
"""What a gate goes through, by name."""


def _cost(x: Tensor, weight: Tensor, *others: Any) -> Cost:
    """Of all weights: how many values are zero is not known before a call."""
    rows = x.numel() // x.shape[-1]
    moved = sum(t.numel() * t.element_size() for t in (x, weight, *others) if isinstance(t, Tensor))
    return Cost(2 * rows * weight.numel(), moved + rows * weight.shape[0] * x.element_size())


def _small_cost(x: Tensor, level: Tensor) -> Cost:
    return Cost(x.numel(), 2 * x.numel() * x.element_size())


@op(
    cost=_cost,
    examples=(
        ((1, 40), Stored((37, 40)), None, (1, 37), (37,), "silu"),
        ((2, 3, 24), Stored((70, 24)), (70,), (2, 3, 70), (70,), "gelu"),
        ((3, 9), Stored((33, 9)), Stored((33,)), (3, 33), (33,), "gelu_tanh"),
        ((5, 12), (6, 12), None, (5, 6), (6,), "silu"),
    ),
)
def sparse_glu(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, thresholds: Tensor, activation: str
) -> Tensor:
    """a * (x W^T + bias) with a = activation(gate), and 0 where |a| is at most its threshold (CHESS, He et al., 2024).

    x is [..., k], weight [n, k], gate [..., n], thresholds [n]; see `ACTIVATIONS`. Row i of the weight is needed only
    where a_i is not 0.
    """
    a = ACTIVATIONS[activation](gate)
    small = a.abs() <= thresholds
    return torch.where(small, 0.0, a * F.linear(x, weight, bias))


@op(
    cost=_cost,
    examples=(
        ((1, 40), Stored((37, 40)), None),
        ((2, 3, 24), Stored((70, 24)), Stored((70,))),
        ((3, 9), Stored((33, 9)), (33,)),
        ((2, 12), (6, 12), None),
    ),
)
def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias for an x with many zeros: column j of the weight is needed only where x_j is not 0."""
    return F.linear(x, weight, bias)


@op(cost=_small_cost, examples=(((2, 3, 8), (1,)), ((5, 7), (1,))))
def zero_small(x: Tensor, level: Tensor) -> Tensor:
    """x, and 0 where |x| is at most `level` [1]."""
    return torch.where(x.abs() <= level, 0.0, x)


SPARSE: frozenset[Any] = frozenset({sparse_glu.target, sparse_linear.target})
"""Ops that read x and a weight of which they may skip parts: their first two arguments."""

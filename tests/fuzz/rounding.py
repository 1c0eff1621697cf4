"""How far rounding operands to bfloat16 may move a result: bounds for every element, and shares where there is none.

Ops that multiply bfloat16 leave it to the backend what is rounded. Both sides of a comparison are within the bound of
the exact result, so that they are within twice the bound of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.attention_operands import with_blocks, with_shared
from sylvester.compiler.ops import attention_weights, repeated_heads

dialect = torch.ops.sylvester
UNIT = 2.0**-8
"""A number of 8 significant bits is off by at most this share of it."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """|x'W - xW| <= u |x| |W|, of weights that are bfloat16 already."""
    return UNIT * (x.abs() @ weight.to(x.dtype).abs().transpose(-2, -1))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    *,
    depths: Tensor | None = None,
    shared: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """Of a row whose scores move by at most e, a weight moves by at most exp(2 e) - 1 of it.

    e = (2 u + u^2) |scale| max_j |q| |k_j|; a soft-cap and sums of scores with a mask move by no more. Rounding weights
    and values gives (1 + u)^2, so |y' - y| <= (exp(2 e) (1 + u)^2 - 1) sum_j p_j |v_j|, and never more than both are
    averages of values allow.
    """
    mask = with_blocks(mask, blocks, q.shape[2], k.shape[2])
    k, v = (repeated_heads(with_shared(t, shared).to(q.dtype), q) for t in (k, v))
    weights = attention_weights(q, k, mask, past, scale, causal, window, softcap, depths)
    moved = (2 * UNIT + UNIT**2) * abs(scale) * (q.abs() @ k.abs().transpose(-2, -1))
    most = moved.masked_fill(weights == 0, 0.0).amax(-1, keepdim=True)
    share = torch.exp((2 * most).clamp(max=50)) * (1 + UNIT) ** 2 - 1
    return torch.minimum(share * (weights @ v.abs()), 2 * (1 + UNIT) ** 2 * v.abs().amax(2, keepdim=True))


BOUNDS: Mapping[Any, Callable[..., Tensor]] = {
    dialect.linear_bf16.default: linear,
    dialect.attention_bf16.default: attention,
}
EXACT: Mapping[Any, Callable[..., Tensor]] = {
    dialect.linear_bf16.default: lambda x, weight, bias=None: F.linear(x, weight.to(x.dtype), bias),
    dialect.attention_bf16.default: dialect.attention.default,
    dialect.attention_int8.default: dialect.attention.default,
}
"""What a backend computes that rounds nothing: the errors of its results belong together, unlike noise."""
SHARES: Mapping[Any, float] = {dialect.attention_int8.default: 2e-1}
"""How far of the largest value attention in int8 moves its result: its steps depend on the tiles of a kernel."""


def moves(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, shares: Mapping[Any, float]
) -> Tensor | None:
    """The largest difference between two ways to compute a call; None where both round alike."""
    if target in BOUNDS:
        return (2 * BOUNDS[target](*args, **kwargs)).nan_to_num(0.0, 0.0, 0.0)
    if target not in shares:
        return None
    return result.new_full((), shares[target] * float(result.abs().nan_to_num(0.0, 0.0, 0.0).max()))

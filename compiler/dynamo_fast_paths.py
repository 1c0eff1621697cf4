"""Ops that modules of PyTorch call as one where nothing is trained, written out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KEYS, BOTH = 1, 2
"""Kinds of a mask: [batch, keys], [batch, heads, queries, keys]; else it is [queries, keys]."""


def encoder_layer(
    x: Tensor, width: int, heads: int, qkv: Tensor, qkv_bias: Tensor, out: Tensor, out_bias: Tensor, gelu: bool,
    norm_first: bool, eps: float, scale: Tensor, shift: Tensor, scale2: Tensor, shift2: Tensor, up: Tensor,
    up_bias: Tensor, down: Tensor, down_bias: Tensor, mask: Tensor | None = None, kind: int | None = None,
) -> Tensor:  # fmt: skip
    """torch.nn.TransformerEncoderLayer of x [batch, tokens, width]."""

    def attend(h: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in F.linear(h, qkv, qkv_bias).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, _allowed(mask, kind))
        return F.linear(mixed.transpose(1, 2).flatten(2), out, out_bias)

    def feed(h: Tensor) -> Tensor:
        inner = F.linear(h, up, up_bias)
        return F.linear(F.gelu(inner) if gelu else F.relu(inner), down, down_bias)

    def first(h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,), scale, shift, eps)

    def second(h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,), scale2, shift2, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + feed(second(x))
    x = first(x + attend(x))
    return second(x + feed(x))


def _allowed(mask: Tensor | None, kind: int | None) -> Tensor | None:
    """What attention takes: True where a key is seen, or numbers to add."""
    if mask is None:
        return None
    seen = ~mask if mask.dtype == torch.bool else mask
    return seen[:, None, None, :] if kind == KEYS else seen


WRITTEN_OUT: dict[Any, Callable[..., Any]] = {torch._transformer_encoder_layer_fwd: encoder_layer}

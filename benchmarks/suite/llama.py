"""A Llama forward over a Hugging Face model's parameters, with the attention given by the caller.

The form that PyTorch and OpenVINO run best: static or functional KV caches, logits of the last position only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each [batch, heads, tokens, head width], gives values in the shape of q."""


class Llama(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = model.config
        self.body, self.head = model.model, model.lm_head
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.layers, self.width = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32) / self.width
        self.frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def last_logits(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[batch, 1, vocabulary] for ids and positions [batch, tokens]."""
        return self.head(self.hidden(ids, positions, attend)[:, -1:])

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.body.embed_tokens(ids)
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for index, layer in enumerate(self.body.layers):
            x = x + self.attention(index, layer, self.normed(x, layer.input_layernorm), cos, sin, attend)
            h, mlp = self.normed(x, layer.post_attention_layernorm), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return self.normed(x, self.body.norm)

    def attention(self, index: int, layer: nn.Module, h: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        own = layer.self_attn
        q, k, v = self.split(own.q_proj(h)), self.split(own.k_proj(h)), self.split(own.v_proj(h))
        mixed = attend(index, rotated(q, cos, sin), rotated(k, cos, sin), v)
        return own.o_proj(mixed.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)

    def normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return norm.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Cached(Llama):
    """Static KV caches of `capacity` tokens, batch 1."""

    def allocate(self, capacity: int, dtype: torch.dtype) -> None:
        shape = (1, self.shared, capacity, self.width)
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(self.layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(self.layers)]

    def prefill(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[index][:, :, :length] = k
            self.values[index][:, :, :length] = v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.shared)

        return self.last_logits(ids, torch.arange(length)[None], attend)

    def decode(self, ids: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """One token at `position` [1]; the additive mask [1, 1, 1, capacity] hides the slots that are not in use."""

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[index], self.values[index]
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            grouped = self.heads != self.shared
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)

        return self.last_logits(ids, position[None], attend)

    def decode_sliced(self, ids: Tensor, position: int) -> Tensor:
        """As `decode`, reading the used slots only: what eager mode does best."""

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[index], self.values[index]
            keys[:, :, position : position + 1] = k
            values[:, :, position : position + 1] = v
            keys, values = keys[:, :, : position + 1], values[:, :, : position + 1]
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=self.heads != self.shared)

        return self.last_logits(ids, torch.tensor([[position]]), attend)

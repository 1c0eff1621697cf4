"""Outliers put into a Llama without changing what it computes: rows times c, the columns that read them over c."""

from __future__ import annotations

import torch
from torch import nn

FACTOR = 30.0
CHANNELS = 3


def inject(model: nn.Module, factor: float = FACTOR, channels: int = CHANNELS, seed: int = 0) -> None:
    """In every layer some FFN channels and some values of each KV head grow by `factor`, in place.

    `model` is a Hugging Face Llama: up_proj and v_proj feed down_proj and o_proj linearly, so the function stays.
    """
    random = torch.Generator().manual_seed(seed)
    width = model.config.head_dim
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            rows = torch.randperm(layer.mlp.up_proj.out_features, generator=random)[:channels]
            layer.mlp.up_proj.weight[rows] *= factor
            layer.mlp.down_proj.weight[:, rows] /= factor
            for head in range(model.config.num_key_value_heads):
                place = torch.randperm(width, generator=random)[:1]
                layer.self_attn.v_proj.weight[head * width + place] *= factor
                readers = [query * width + place for query in range(head * group, (head + 1) * group)]
                layer.self_attn.o_proj.weight[:, torch.cat(readers)] /= factor

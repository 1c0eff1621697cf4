"""Modules that stand in transformers models for quantised layers and tables, and for parts that are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface_quantized import EMBEDDING, LINEARS, WIDENED, Format

SHAPES = "an nn.Linear, an nn.Embedding or a Conv1D"


class Packed(nn.Module):
    """Holds the tensors of a rounded weight."""

    weight_packed: Tensor

    def __init__(self, form: Format, rows: int, depth: int, device: torch.device) -> None:
        super().__init__()
        self.form = form
        for name, tensor in form.empty(rows, depth, device).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """For code that asks where a weight lives, or that fills weights without values: this one has some."""
        shown = self.weight_packed.detach()
        shown._is_hf_initialized = True  # type: ignore[attr-defined]
        return shown


class QuantisedLinear(Packed):
    """x W^T + bias by the dialect op of the format: the reference of every kernel."""

    def __init__(self, form: Format, rows: int, depth: int, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__(form, rows, depth, device)
        self.in_features, self.out_features = depth, rows
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """[..., k] -> [..., n]."""
        linear = LINEARS[self.form.bits]
        if not self.form.whole:
            return linear(input, self.weight_packed, self.bias)
        step = getattr(self, "input_step", None)
        return linear(input, self.weight_packed, self.weight_scale, self.bias, self.form.activations, step)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form}"


class QuantisedEmbedding(Packed):
    """Rows of a packed table, widened as they are looked up."""

    def __init__(self, form: Format, rows: int, depth: int, padding_idx: int | None, device: torch.device) -> None:
        super().__init__(form, rows, depth, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, depth, padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [...] -> [..., k]."""
        widen = WIDENED[self.form.bits]
        stored = [p for p in (self.weight_packed, getattr(self, "weight_scale", None)) if p is not None]
        if torch.compiler.is_exporting():
            return nn.functional.embedding(input, widen(*stored), self.padding_idx)
        found: Tensor = widen(*(p[input.flatten()] for p in stored)).unflatten(0, input.shape)
        return found

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form}"


class Absent(nn.Module):
    """A part that adds nothing to the stream. Its cache holds zeros, one a token: lengths are counted from caches."""

    def __init__(self, returns: int, layer: int | None) -> None:
        super().__init__()
        self.returns, self.layer = returns, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the stream [batch, tokens, features], alone or first of a tuple."""
        x = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if cache is not None and self.layer is not None:
            self._advance(cache, self.layer, x)
        return (torch.zeros_like(x), *[None] * (self.returns - 1)) if self.returns else torch.zeros_like(x)

    @staticmethod
    def _advance(cache: Any, layer: int, x: Tensor) -> None:
        """As many tokens in the cache of the layer as in the others, of the shape that it has, else of one value."""
        held = cache.layers[layer] if layer < len(cache.layers) else None
        shape = held.keys.shape if held is not None and held.is_initialized else (0, 1, 0, 1)
        nothing = x.new_zeros((x.shape[0], shape[1], x.shape[1], shape[3]))
        cache.update(nothing, nothing, layer)


def quantised(name: str, module: nn.Module, form: Format) -> nn.Module:
    """What stands for a module of a model without values yet."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or (form.op == EMBEDDING) != isinstance(module, nn.Embedding):
        raise CompileError(f"{name!r} is a {type(module).__name__}, the config has a {form.op} there: {SHAPES}")
    if isinstance(module, nn.Embedding):
        return QuantisedEmbedding(form, len(weight), weight.shape[1], module.padding_idx, weight.device)
    # Conv1D of GPT-2 stores its weight transposed.
    rows, depth = weight.shape if isinstance(module, nn.Linear) else weight.t().shape
    return QuantisedLinear(form, rows, depth, getattr(module, "bias", None), weight.device)

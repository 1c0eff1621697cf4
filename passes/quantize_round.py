"""One weight after another -> the tensors that replace it, by the method, or as an earlier run has left them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.clipping import clipped
from sylvester.compiler.errors import CompileError
from sylvester.compiler.finished import Finished
from sylvester.compiler.gptq import Prepared, round_gptq
from sylvester.compiler.program import Program
from sylvester.compiler.quantization import Scaling, round_bf16, round_weight, widest
from sylvester.compiler.quantized_ops import row_slices
from sylvester.passes.quantize_plan import Layer

SCALINGS: dict[str, Scaling] = {"rtn": widest, "mse": clipped, "gptq": clipped}
OPS = {
    16: (dialect.linear_bf16, dialect.widen_bf16),
    8: (dialect.linear_w8, dialect.dequantize_w8),
    4: (dialect.linear_w4, dialect.dequantize_w4),
    3: (dialect.linear_w3, dialect.dequantize_w3),
}
"""Bits of a weight -> the layer that reads it, and the float weight it stands for."""


class Rounder:
    """`about` is what decides the results besides the weights, the method and the widths; read only to keep them."""

    def __init__(self, program: Program, method: str, about: Iterable[str] = ()) -> None:
        self.program, self.method = program, method
        self.finished = Finished(chain((method,), about))

    def tensors(self, layer: Layer, inputs: Callable[[], Prepared] | None = None) -> tuple[Tensor, ...]:
        """bfloat16 numbers, or whole numbers and scales; `inputs` are asked for only where they are needed."""
        weight = self.program.weights[layer.key]
        _require_finite(layer.key, weight)
        if self.method == "rtn":
            return self._rounded(layer, weight, None)
        self.finished.advance(repr(layer.width), str(inputs is None), weight=weight)
        if not layer.width.whole:
            return self._rounded(layer, weight, None)
        found = self.finished.find()
        if found is None:
            found = self._rounded(layer, weight, inputs)
            self.finished.keep(found)
        return found

    def _rounded(self, layer: Layer, weight: Tensor, inputs: Callable[[], Prepared] | None) -> tuple[Tensor, ...]:
        width, scaling = layer.width, SCALINGS[self.method]
        if not width.whole:
            return (round_bf16(weight),)
        if inputs is None or self.method != "gptq":
            return round_weight(weight, width.weights, width.group, scaling)
        try:
            return round_gptq(weight, inputs(), width.weights, width.group, scaling)
        except CompileError as error:
            error.add_note(f"at weight {layer.key!r}")
            raise

    def replace(self, layer: Layer, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors under keys of their own and forget the weight."""
        weights = self.program.weights
        layer.stored = [weights.fresh(f"{layer.key}.{end}") for end in (layer.width.name, "scales")[: len(tensors)]]
        for name, tensor in zip(layer.stored, tensors, strict=True):
            weights[name] = tensor
        del weights[layer.key]


def _require_finite(key: str, weight: Tensor) -> None:
    if not all(bool(torch.isfinite(rows).all()) for (rows,) in row_slices(weight)):
        bad = "NaN" if bool(weight.isnan().any()) else "infinities"
        hint = f"repair the model, or leave the weight in float: Quantize(skip=({key!r},))"
        raise CompileError(f"the weight {key!r} holds {bad}, expected finite numbers", hint=hint)

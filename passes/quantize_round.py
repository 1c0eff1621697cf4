"""One weight after another -> the tensors that replace it, by the method, or as an earlier run has left them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.clipping import clipped
from sylvester.compiler.errors import CompileError
from sylvester.compiler.finished import Finished
from sylvester.compiler.gptq import Prepared, round_gptq
from sylvester.compiler.ops import Op
from sylvester.compiler.program import Program
from sylvester.compiler.quantization import Scaling, round_bf16, round_fp8, round_fp16, round_weight, widest
from sylvester.compiler.quantized_ops import row_slices
from sylvester.compiler.quantized_rows import float8_rows
from sylvester.passes.quantize_plan import FP8, FP16, Layer

SCALINGS: dict[str, Scaling] = {"rtn": widest, "mse": clipped, "gptq": clipped}
OPS: Mapping[int | str, tuple[Op, Op]] = {
    16: (dialect.linear_bf16, dialect.widen_bf16),
    FP16: (dialect.linear_fp16, dialect.widen_fp16),
    FP8: (dialect.linear_fp8, dialect.dequantize_fp8),
    8: (dialect.linear_w8, dialect.dequantize_w8),
    4: (dialect.linear_w4, dialect.dequantize_w4),
    3: (dialect.linear_w3, dialect.dequantize_w3),
}
"""Bits of a weight, or its short float -> the layer that reads it, and the float weight it stands for."""


class Rounder:
    """`about` is what decides the results besides the weights, the method and the widths; read only to keep them."""

    def __init__(self, program: Program, method: str, about: Iterable[str] = ()) -> None:
        self.program, self.method = program, method
        self.finished = Finished(chain((method,), about))

    def tensors(self, layer: Layer, inputs: Callable[[], Prepared] | None = None) -> tuple[Tensor, ...]:
        """Short floats, float8 or whole numbers and scales; `inputs` are asked for only where they are needed."""
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
        if not isinstance(width.weights, int) or not width.whole:
            return _short(layer, weight)
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


def _short(layer: Layer, weight: Tensor) -> tuple[Tensor, ...]:
    """To nearest, whatever the method."""
    if layer.width.weights == FP8:
        return round_fp8(weight)
    if layer.width.weights != FP16:
        return (round_bf16(weight),)
    try:
        return (round_fp16(weight),)
    except ValueError as error:
        hint = f"round it to bfloat16, or leave it in float: Quantize('fp16', per_layer={{{layer.key!r}: 16}})"
        raise CompileError(f"the weight {layer.key!r} holds {error}", hint=hint) from error


def short_rows(x: Tensor, format: int | str) -> Tensor:
    """x as a layer with weights of this short float reads it."""
    if format != FP8:
        return x.to(torch.float16 if format == FP16 else torch.bfloat16).to(x.dtype)
    numbers, scale = float8_rows(x)
    return numbers.to(x.dtype) * scale


def _require_finite(key: str, weight: Tensor) -> None:
    if not all(bool(torch.isfinite(rows).all()) for (rows,) in row_slices(weight)):
        bad = "NaN" if bool(weight.isnan().any()) else "infinities"
        hint = f"repair the model, or leave the weight in float: Quantize(skip=({key!r},))"
        raise CompileError(f"the weight {key!r} holds {bad}, expected finite numbers", hint=hint)

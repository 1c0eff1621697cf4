"""Lists of passes under one name: `passes="w4a8"` expands to passes that are chosen by measuring, and printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.recipe import Expansion, Machine, Recipe
from sylvester.passes.choose_rotations import EQUALIZE, choose_rotations
from sylvester.passes.choose_widths import choose_widths
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.quantize_cache import QuantizeCache
from sylvester.passes.rotation_plan import layer_weight

SHORTEST = 4
"""Bits of activations that the last layer does not get: it reads 8."""
LINEAR = torch.ops.aten.linear.default
FITTED, LONG = (4, 3), 16
"""Weights of so many bits, or under rows of 16, are worth fitting to data, or searching scales for."""


@dataclass(frozen=True)
class LowBit(Recipe):
    """Whole numbers or float8 in linear layers, and perhaps whole numbers in caches.

    With calibration data, what is `tried` is kept where it lowers the loss, weights of few bits are fitted by GPTQ, and
    a width is used only where its kernel is measured faster on the target. Without it nothing is tried.
    """

    quantize: Quantize
    tried: tuple[str, ...] = (EQUALIZE, "residual", "values", "ffn")
    more: tuple[Pass, ...] = ()

    def expand(self, program: Program, machine: Machine | None) -> Expansion:
        few = self.quantize.weights in FITTED or (self.quantize.activations or LONG) == LONG
        method: Literal["rtn", "mse", "gptq"] = "rtn" if not few else "gptq" if program.calibration else "mse"
        per_layer = heads(program, self.quantize.weights) if self.quantize.activations == SHORTEST else {}
        quantize = dataclasses.replace(self.quantize, method=method, per_layer=per_layer)
        if program.calibration is None:
            note = "without calibration data no rotation is tried and weights are not fitted"
            return self._expansion([quantize, *self.more], [note])
        choice = choose_rotations(program, quantize, self.tried)
        notes = list(choice.notes)
        if machine is not None and isinstance(quantize.weights, int):
            widths = choose_widths(Pipeline(choice.passes, check=False)(program), quantize.weights, machine.linears)
            last = tuple(pattern.removesuffix("*") for pattern in per_layer)
            wider = {k: f"w{bits}a8" if k.startswith(last) else bits for k, bits in widths.per_layer.items()}
            quantize = dataclasses.replace(quantize, per_layer={**wider, **per_layer})
            notes += widths.notes
        return self._expansion([*choice.passes, quantize, *self.more], notes)

    def summary(self) -> str:
        listed = ", ".join(map(str, (self.quantize, *self.more)))
        return f"{listed}; tried with calibration data: {', '.join(self.tried)}"

    def _expansion(self, passes: Sequence[Pass], notes: Sequence[str]) -> Expansion:
        listed = f"recipe {self.name} is {', '.join(map(str, passes))}"
        return Expansion(tuple(passes), (listed, *(f"recipe {self.name}: {note}" for note in notes)))


def heads(program: Program, bits: int | str) -> dict[str, str]:
    """Patterns of the weights whose layers give results of the program, with 8 bits for what they read."""
    layers = [node for node in program.main.results() if node.target is LINEAR]
    return {f"{binding(layer_weight(layer)).key}*": f"w{bits}a8" for layer in layers if is_weight(layer_weight(layer))}


SHORT: tuple[Pass, ...] = (QuantizeCache(), QuantizeAttention())
ACROSS = (EQUALIZE, "residual", "values", "ffn", "heads")
CACHED = (EQUALIZE, "residual", "values", "ffn", "keys")
BF16: tuple[Pass, ...] = (Quantize(weights=16), *SHORT)
FP16: tuple[Pass, ...] = (Quantize(weights="fp16"), *SHORT)
FP8 = LowBit("fp8", Quantize(weights="fp8"), more=SHORT)
W8A8 = LowBit("w8a8", Quantize(weights=8), more=SHORT)
W8A16 = LowBit("w8a16", Quantize(weights=8, activations=None, group=32), more=SHORT)
W4A8 = LowBit("w4a8", Quantize(weights=4), more=SHORT)
W4A16 = LowBit("w4a16", Quantize(weights=4, activations=None), more=SHORT)
W4A4 = LowBit("w4a4", Quantize(weights=4, activations=4), ACROSS, SHORT)
W4A8KV4 = LowBit("w4a8kv4", Quantize(weights=4, kv=4), CACHED, (QuantizeAttention(),))

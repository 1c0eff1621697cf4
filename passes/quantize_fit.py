"""Quantised layers on calibration data: each is fitted to what the rounded layers before it give, and hands on its own.

Layers that read the same input share what is known of it: the Hessian, the static step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sylvester.compiler import activations
from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Figure
from sylvester.compiler.errors import CompileError
from sylvester.compiler.finished import samples_sum, tensor_sum
from sylvester.compiler.gptq import Hessian, Prepared
from sylvester.compiler.program import Program, binding
from sylvester.compiler.progress import report
from sylvester.compiler.walk import Walk
from sylvester.passes.quantize_plan import LINEAR, Layer
from sylvester.passes.quantize_round import OPS, Rounder, short_rows

STAGE = "quantize layer"


class Fit:
    """One walk over `program.calibration.fit`; layers that the main entry does not run stay as they are."""

    def __init__(self, program: Program, layers: Sequence[Layer], static: bool, rounder: Rounder) -> None:
        self.program, self.static, self.rounder = program, static, rounder
        self.layer_of = {node: layer for layer in layers for node in _nodes(program, layer)}
        self.stops = [node for node in program.main.graph.nodes if node in self.layer_of]
        self.inputs = Counter(arguments(node)["input"] for node in self.stops if node.target is LINEAR)
        self.walk = Walk(program, _samples(program), self.stops)
        self.prepared: dict[fx.Node, Prepared] = {}
        self.steps: dict[tuple[fx.Node, int], str] = {}
        self.changes = Changes()

    def run(self) -> Changes:
        """Round every layer on the way; the changes hold figures and notes."""
        for number, stop in enumerate(self.stops):
            self.walk.reach(stop)
            layer = self.layer_of[stop]
            report(STAGE, number, len(self.stops))
            with torch.no_grad():
                self._linear(stop, layer) if stop.target is LINEAR else self._embedding(stop, layer)
        report(STAGE, len(self.stops), len(self.stops))
        return self.changes

    def _embedding(self, stop: fx.Node, layer: Layer) -> None:
        if not layer.stored:
            self.rounder.replace(layer, self.rounder.tensors(layer))
            if self.rounder.method == "gptq" and layer.uses.linears:
                self.changes.note(f"{layer.key} is an embedding too: its scales are searched, not fitted by gptq")
            if self.static and layer.width.stepped and layer.uses.linears:
                self.changes.note(f"{layer.key} is an embedding too: a scale per row instead of a static one")
        widen, stored = OPS[layer.width.weights][1], self._stored(layer)
        for i, ids in enumerate(self.walk.values(arguments(stop)["indices"])):
            rows = widen(*(tensor[ids.flatten()] for tensor in stored))
            self.walk.put(stop, i, rows.reshape(*ids.shape, rows.shape[-1]))

    def _linear(self, stop: fx.Node, layer: Layer) -> None:
        source = arguments(stop)["input"]
        xs = self.walk.values(source)
        if not layer.stored:
            _require_finite(layer, xs)
            layer.step = self._step(layer, source, xs)
            tensors = self.rounder.tensors(layer, lambda: self._prepared(source, xs))
            self._figures(layer, xs, OPS[layer.width.weights][1](*tensors))
            self.rounder.replace(layer, tensors)
            if self.rounder.method == "gptq" and self._shared(layer):
                self.changes.note(f"{layer.key} is read more than once: fitted to the inputs of its first layer")
        if self.walk.wanted(stop):
            self._hand_on(stop, layer, xs)
        self.inputs[source] -= 1
        if not self.inputs[source]:
            self.prepared.pop(source, None)

    def _hand_on(self, stop: fx.Node, layer: Layer, xs: Sequence[Tensor]) -> None:
        wide = OPS[layer.width.weights][1](*self._stored(layer))
        bias = arguments(stop)["bias"]
        for i, x in enumerate(xs):
            offset = None if bias is None else self.walk.values(bias)[i]
            self.walk.put(stop, i, F.linear(self._rounded(layer, x), wide, offset))

    def _prepared(self, source: fx.Node, xs: Sequence[Tensor]) -> Prepared:
        if source not in self.prepared:
            hessian = Hessian(xs[0].shape[-1])
            for x in xs:
                hessian.add(x)
            self.prepared[source] = hessian.prepared()
        return self.prepared[source]

    def _step(self, layer: Layer, source: fx.Node, xs: Sequence[Tensor]) -> str | None:
        """The key of the static step, for layers that are run once and round their rows to 8 or 4 bits."""
        bits = layer.width.activations
        if not self.static or not layer.width.stepped:
            return None
        if self._shared(layer):
            self.changes.note(f"{layer.key} is read more than once: a scale per row instead of a static one")
            return None
        if (source, bits) not in self.steps:
            key = self.program.weights.fresh(f"{layer.key}.step")
            self.program.weights[key] = activations.static_step(xs, bits, clip=self.rounder.method != "rtn")
            self.steps[source, bits] = key
        return self.steps[source, bits]

    def _shared(self, layer: Layer) -> bool:
        return sum(other is layer for other in self.layer_of.values()) > 1

    def _figures(self, layer: Layer, xs: Sequence[Tensor], wide: Tensor) -> None:
        rows = activations.leading_rows(xs)
        rounded = [self._rounded(layer, x) for x in rows]
        sqnr = activations.output_sqnr(rows, rounded, self.program.weights[layer.key], wide)
        self.changes.figures.append(Figure(layer.key, "sqnr dB", sqnr))
        self.changes.figures.append(Figure(layer.key, "max/rms", activations.peak_to_rms(xs)))

    def _rounded(self, layer: Layer, x: Tensor) -> Tensor:
        if not layer.width.whole:
            return short_rows(x, layer.width.weights)
        step = self.program.weights[layer.step] if layer.step else None
        return activations.rounded_rows(x, layer.width.activations, step)

    def _stored(self, layer: Layer) -> list[Tensor]:
        return [self.program.weights[key] for key in layer.stored]


def decisive(program: Program, layers: Sequence[Layer], static: bool) -> Iterator[str]:
    """All that decides what reaches a layer but rounded weights: main entry, data, other weights, widths, steps."""
    yield str(program.main.graph)
    yield f"static={static}"
    yield str([(node.name, node.meta["bind"]) for node in program.main.placeholders()])
    yield samples_sum(_samples(program))
    rounded = {layer.key for layer in layers}
    yield str([(layer.key, layer.width) for layer in layers])
    for node in program.main.placeholders("weight"):
        if binding(node).key not in rounded:
            yield tensor_sum(program.weights[binding(node).key])


def _nodes(program: Program, layer: Layer) -> list[fx.Node]:
    return [node for entry, node in (*layer.uses.linears, *layer.uses.embeddings) if entry is program.main]


def _samples(program: Program) -> Sequence[dict[str, Tensor]]:
    return program.calibration.fit if program.calibration else ()


def _require_finite(layer: Layer, xs: Sequence[Tensor]) -> None:
    for number, x in enumerate(xs):
        if not bool(x.isfinite().all()):
            raise CompileError(
                f"calibration sample {number} gives the layer of {layer.key!r} inputs that are not finite",
                hint="look for NaN in the data and for infinities in the weights before it",
            )

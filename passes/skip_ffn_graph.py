"""The masks of `SkipFFN` in a graph: which tokens still run feed-forward parts, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sylvester.compiler import skip_ops
from sylvester.compiler.calibration import Sample
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer
from sylvester.compiler.next_token import empty_state
from sylvester.compiler.program import Entry, Output, Program, binding
from sylvester.compiler.region import sum_of
from sylvester.compiler.stages import DECODE

MADE_BY = "skip-ffn"
MASK = "skip-ffn mask"


@dataclass(frozen=True)
class Gate:
    """The feed-forward part of a layer: `total` = `other` + `part`; the stream goes from `start` to `end` around it."""

    layer: Layer
    start: fx.Node
    end: fx.Node
    part: fx.Node
    total: fx.Node
    other: fx.Node


def usable(region: Sequence[Layer], changes: Changes) -> list[Gate]:
    """The layers whose feed-forward part is added to the stream by a plain sum in `decode`."""
    found = []
    for layer in region:
        gate = _gate(layer)
        if isinstance(gate, Gate):
            found.append(gate)
        else:
            changes.refuse("ffn", gate, layer.path)
    return found


def _gate(layer: Layer) -> Gate | Refusal:
    parts = layer.sites[DECODE].of_kind("ffn") if DECODE in layer.sites else []
    if len(parts) != 1:
        return Refusal(f"it has {len(parts)} feed-forward parts in 'decode', expected one")
    part, segment = parts[0]
    try:
        total, other = sum_of(segment.end, part.writer)
    except CompileError as error:
        return Refusal(error.message, part.writer)
    if total.target is not torch.ops.aten.add.Tensor:
        return Refusal("it is subtracted from the stream", total)
    return Gate(layer, segment.start, segment.end, part.writer, total, other)


class Masks:
    """The masks of the layers after the first, [batch, tokens] each, in a graph that can be run with any threshold."""

    def __init__(self, entry: Entry, gates: Sequence[Gate], masks: Sequence[fx.Node]) -> None:
        self.entry, self.gates, self.masks = entry, list(gates), list(masks)

    def set_threshold(self, threshold: float) -> None:
        for mask in self.masks:
            mask.args = (*mask.args[:3], threshold)

    def shares(self, program: Program, samples: Sequence[Sample]) -> list[float]:
        """The share of the tokens of the samples that skip the feed-forward part of each gate."""
        probe = self.entry.clone()
        names = {node.name: node for node in probe.graph.nodes}
        probe.graph.output_node().args = ((*(names[mask.name] for mask in self.masks),),)
        probe.outputs = [Output("output", f"{MASK} {n}") for n in range(len(self.masks))]
        skipped, tokens = torch.zeros(len(self.masks), dtype=torch.float64), 0
        for sample in samples:
            found = _run(program, probe, sample)
            skipped += torch.stack([(mask <= 0).double().sum() for mask in found])
            tokens += found[0].numel()
        return [0.0, *(float(n) / max(tokens, 1) for n in skipped)]


def insert_masks(entry: Entry, gates: Sequence[Gate], threshold: float) -> Masks:
    """Each sum but the first goes on for the tokens that no layer before it found saturated."""
    masks: list[fx.Node] = []
    for number, gate in enumerate(gates):
        end = gate.end
        if masks:
            total = entry.emit(
                skip_ops.add_where.target, gate.other, gate.part, masks[-1], before=gate.total, made_by=MADE_BY
            )
            entry.replace(gate.total, total)
            end = total if gate.end is gate.total else gate.end
        if number + 1 < len(gates):
            before = masks[-1] if masks else None
            start = gate.start
            masks.append(
                entry.emit(
                    skip_ops.unsaturated.target, start, end, before, threshold, before=end.next, made_by=MADE_BY
                )
            )
    entry.sweep()
    return Masks(entry, gates, masks)


def _run(program: Program, probe: Entry, sample: Sample) -> list[Tensor]:
    """The masks of a sample, its tokens read one after another through empty caches."""
    given = {"past": torch.tensor(0)} | dict(sample)
    sources = {"input": given, "weight": program.weights, "state": empty_state(program, probe, sample)}
    arguments = [sources[binding(n).kind][binding(n).key] for n in probe.placeholders()]
    with torch.no_grad():
        return list(fx.GraphModule(torch.nn.Module(), probe.graph)(*arguments))

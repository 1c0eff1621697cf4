"""The counts of `SkipFFN` in a graph: for how many layers each token skips feed-forward parts."""

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


class Counts:
    """The counts of the layers after the first, [batch, tokens] each, in a graph that can be run with any threshold."""

    def __init__(self, entry: Entry, gates: Sequence[Gate], counts: Sequence[fx.Node]) -> None:
        self.entry, self.gates, self.counts = entry, list(gates), list(counts)

    def set_threshold(self, threshold: float) -> None:
        for count in self.counts:
            count.args = (*count.args[:3], threshold, count.args[4])

    def shares(self, program: Program, samples: Sequence[Sample]) -> list[float]:
        """The share of the tokens of the samples that skip the feed-forward part of each gate."""
        probe = self.entry.clone()
        names = {node.name: node for node in probe.graph.nodes}
        probe.graph.output_node().args = ((*(names[count.name] for count in self.counts),),)
        probe.outputs = [Output("output", f"left {n}") for n in range(len(self.counts))]
        skipped, tokens = torch.zeros(len(self.counts), dtype=torch.float64), 0
        for sample in samples:
            found = _run(program, probe, sample)
            skipped += torch.stack([(left > 0).double().sum() for left in found])
            tokens += found[0].numel()
        return [0.0, *(float(n) / max(tokens, 1) for n in skipped)]


def insert_counts(entry: Entry, gates: Sequence[Gate], threshold: float, run: int) -> Counts:
    """Each sum but the first is left out for tokens that a layer before it found saturated, `run` layers long."""
    counts: list[fx.Node] = []
    for number, gate in enumerate(gates):
        end, left = gate.end, counts[-1] if counts else None
        if left is not None:
            operands = (gate.other, gate.part, left)
            total = entry.emit(skip_ops.add_unless.target, *operands, before=gate.total, made_by=MADE_BY)
            entry.replace(gate.total, total)
            end = total if gate.end is gate.total else gate.end
        if number + 1 < len(gates):
            given = (gate.start, end, left, threshold, float(run))
            counts.append(entry.emit(skip_ops.layers_to_skip.target, *given, before=end.next, made_by=MADE_BY))
    entry.sweep()
    return Counts(entry, gates, counts)


def _run(program: Program, probe: Entry, sample: Sample) -> list[Tensor]:
    """The counts of a sample, its tokens read one after another through empty caches."""
    given = {"past": torch.tensor(0)} | dict(sample)
    sources = {"input": given, "weight": program.weights, "state": empty_state(program, probe, sample)}
    arguments = [sources[binding(n).kind][binding(n).key] for n in probe.placeholders()]
    with torch.no_grad():
        return list(fx.GraphModule(torch.nn.Module(), probe.graph)(*arguments))

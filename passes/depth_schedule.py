"""decode -> decode, decode1, decode2, ...: fewer layers the later the position, the same for every row of a batch.

SkipDecode (Del Corro et al., 2023): the depth falls linearly with the position; the lowest layers (`warmup`) and the
top ones run, those between are left out. Depth never grows, so what a step reads from caches was always written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer, find_layers
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program
from sylvester.compiler.region import bypass
from sylvester.compiler.stages import DECODE, KEY, Stage, remember
from sylvester.passes.depth import Phase, edited, require_phase
from sylvester.passes.options import require_count
from sylvester.passes.skip_rules import depths


@dataclass(frozen=True)
class DepthSchedule(Pass):
    """From `max_layers` (0: all) at the first position to `min_layers` after `length` positions (0: the longest).

    The prompt is read by `max_layers`. At most `variants` depths are compiled, in one artefact over one set of weights;
    the runtime chooses by the position, which all rows of a batch share.
    """

    name: ClassVar[str] = "depth-schedule"
    contract: ClassVar[Contract] = "lossy"
    min_layers: int = 2
    max_layers: int = 0
    warmup: int = 1
    length: int = 0
    variants: int = 4

    def __post_init__(self) -> None:
        for option, least in (("min_layers", 1), ("max_layers", 0), ("warmup", 0), ("length", 0), ("variants", 1)):
            require_count(option, getattr(self, option), least)
        if self.max_layers and self.min_layers > self.max_layers:
            raise ValueError(f"min_layers is {self.min_layers}, above max_layers, which is {self.max_layers}")
        if self.warmup >= self.min_layers:
            raise ValueError(f"warmup is {self.warmup}, expected less than min_layers, which is {self.min_layers}")

    def requires(self, program: Program) -> None:
        require_phase(program, "decode")
        if KEY in program.info:
            raise CompileError("decoding has stages already", hint="run depth-schedule before skip-ffn, and only once")
        count = len(find_layers(program))
        for option in ("min_layers", "max_layers"):
            if getattr(self, option) > count:
                raise CompileError(f"{option} is {getattr(self, option)}, the program has {count} layers")

    def run(self, program: Program) -> Changes:
        changes = self._shallower(program, self.max_layers or len(find_layers(program)), "all")
        layers = find_layers(program)
        steps = depths(len(layers), self.min_layers, self.length or int(program.info["max_length"]), self.variants)
        changes.extend(self._shallower(program, steps[0][1], "decode"))
        stages = [Stage(DECODE)]
        for number, (position, depth) in enumerate(steps[1:], 1):
            stages.append(Stage(f"{DECODE}{number}", position))
            self._add_variant(program, stages[-1].entry, len(layers) - depth)
        if len(stages) > 1:
            remember(program.info, stages)
        changes.note("depth by position: " + ", ".join(f"{depth} layers from {at}" for at, depth in steps))
        for position, depth in steps:
            changes.figure(str(position), "layers from position", depth)
        return changes

    def _left_out(self, layers: Sequence[Layer], depth: int) -> list[Layer]:
        """The layers between the lowest and the top ones."""
        return list(layers[self.warmup : len(layers) - (depth - self.warmup)])

    def _shallower(self, program: Program, depth: int, phase: Phase) -> Changes:
        layers = find_layers(program)
        left_out = self._left_out(layers, depth)
        if not left_out:
            return Changes()
        return edited(program, layers, phase, lambda depth: depth.drop_layers(left_out))

    def _add_variant(self, program: Program, name: str, left_out: int) -> None:
        """A clone of `decode` that leaves out more layers and does not touch their caches."""
        entry = program.entries[DECODE].clone()
        program.entries[name] = entry
        layers = find_layers(program)
        gone = [layer for layer in layers[self.warmup : self.warmup + left_out] if name in layer.sites]
        slots = {key for layer in gone for key in layer.sites[name].slots}
        for layer in reversed(gone):
            bypass(entry, layer.sites[name].start, layer.sites[name].end)
        _forget(entry, slots)


def _forget(entry: Entry, slots: set[str]) -> None:
    """Leave state slots as they are."""
    pairs = list(zip(entry.outputs, entry.results(), strict=True))
    kept = [(o, n) for o, n in pairs if not (o.kind == "state" and o.name in slots)]
    entry.outputs = [o for o, _ in kept]
    entry.graph.output_node().args = (tuple(n for _, n in kept),)

"""x + f(x) -> x for the attention or FFN parts of chosen layers; caches of attention that is gone go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from sylvester.compiler.changes import Changes
from sylvester.compiler.layers import chosen, find_layers
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.passes.depth import Depth, Phase, edited, require_phase
from sylvester.passes.options import require_choice, require_numbers


@dataclass(frozen=True)
class DropSublayers(Pass):
    """Drop the attention of the layers numbered in `attention` and the feed-forward part of those in `ffn`.

    Layers are numbered from 0 in the order they run. `phase` "all" drops the parts for good, with weights and caches;
    "decode" keeps them for the reading of prompts. A layer without such a part is refused with a reason.
    """

    name: ClassVar[str] = "drop-sublayers"
    contract: ClassVar[Contract] = "lossy"
    attention: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    phase: Phase = "all"

    def __post_init__(self) -> None:
        require_numbers("attention", self.attention)
        require_numbers("ffn", self.ffn)
        require_choice("phase", self.phase, get_args(Phase))
        if not self.attention and not self.ffn:
            raise ValueError("attention and ffn are empty, expected layer numbers in one of them")

    def requires(self, program: Program) -> None:
        require_phase(program, self.phase)
        layers = find_layers(program)
        for option, numbers in (("attention", self.attention), ("ffn", self.ffn)):
            chosen(layers, numbers, option)

    def run(self, program: Program) -> Changes:
        layers = find_layers(program)

        def drop(depth: Depth) -> None:
            for kind, numbers in (("attention", self.attention), ("ffn", self.ffn)):
                for layer in chosen(layers, numbers, kind):
                    depth.drop_part(layer, kind)

        return edited(program, layers, self.phase, drop)

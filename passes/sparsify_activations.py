"""act(x G^T) * (x U^T) -> a * (x U^T) with a = act(x G^T) where |a_i| > t_i, else 0: what meets a zero is not computed.

CHESS (He et al., 2024): the error of dropping channel i is about a_i^2 m_i with m_i = E[(x U^T)_i^2], so that all
channels of a layer drop the same part T of it with t_i = sqrt(T / m_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Program
from sylvester.compiler.weight_places import record, weight_places
from sylvester.passes.options import require_choice, require_fraction
from sylvester.passes.sparse_edges import Edge, edges
from sylvester.passes.sparse_fit import fitted, measured
from sylvester.passes.split_linears import SplitLinears

Phase = Literal["decode", "all"]
Thresholds = Literal["channel", "layer"]
DECODE = "decode"


@dataclass(frozen=True)
class SparsifyActivations(Pass):
    """Zero the part `sparsity` of the gates of every gated feed-forward part that matters least.

    `thresholds` are one per channel, or with "layer" one for all (CATS, Lee et al., 2024). `attention` also zeroes
    small inputs of the query and output layers, by one threshold each; keys and values stay as they are. `phase`
    "decode" leaves the reading of prompts alone, "all" is for every entry. Needs calibration data.
    """

    name: ClassVar[str] = "sparsify-activations"
    contract: ClassVar[Contract] = "lossy"
    sparsity: float = 0.5
    attention: bool = False
    phase: Phase = "decode"
    thresholds: Thresholds = "channel"

    def __post_init__(self) -> None:
        require_fraction("sparsity", self.sparsity)
        require_choice("phase", self.phase, get_args(Phase))
        require_choice("thresholds", self.thresholds, get_args(Thresholds))
        if not isinstance(self.attention, bool):
            raise TypeError(f"attention is {self.attention!r}, expected True or False")

    def requires(self, program: Program) -> None:
        if self.phase == DECODE and DECODE not in program.entries:
            raise CompileError(
                f"phase='decode' needs an entry that decodes token by token, found {list(program.entries)}",
                hint="SparsifyActivations(phase='all') is for programs without one",
            )
        if not (program.calibration and program.calibration.fit):
            raise CompileError("thresholds need calibration data", hint="compile(..., calibration=texts)")

    def run(self, program: Program) -> Changes:
        changes = SplitLinears().run(program)
        program.sweep()
        names = list(program.entries) if self.phase == "all" else [DECODE]
        found = edges(program, names, self.attention, changes)
        places = weight_places(program) if found else {}
        fitted(program, found, self.sparsity, self.thresholds == "channel")
        measured(program, found, changes)
        for edge in found:
            self._rewrite(program, edge, names)
            changes.apply(edge.kind, edge.weights[-1])
        record(changes, places, [(edge.weights[-1], f"{self.sparsity:.0%} zeros") for edge in found])
        return changes

    def _rewrite(self, program: Program, edge: Edge, names: Sequence[str]) -> None:
        key = program.weights.fresh(edge.key)
        program.weights[key] = edge.levels
        for entry in map(program.entry, names):
            for site in edge.within(entry):
                site.rewrite(entry, entry.bind("weight", key, edge.levels), self.name)

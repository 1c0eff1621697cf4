"""y = f(y; W_i), y = f(y; W_j) -> y = f(y; W_i), y = f(y; W_i): neighbouring blocks with one set of matrices (FoldGPT).

Blocks are ranked by importance and the least important ones removed; the others are grouped, and the matrices of each
group are those of its first block. Norms stay private (Liu et al., FoldGPT, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.layers import Layer, chosen, find_layers
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.printing import fact
from sylvester.compiler.program import Program
from sylvester.passes.block_gates import GATE_STEPS, gates
from sylvester.passes.block_groups import Groups, even_groups, require_groups, require_neighbours, share, unlike
from sylvester.passes.depth import Depth
from sylvester.passes.greedy_depth import LOSS, least_missed
from sylvester.passes.options import require_choice, require_count
from sylvester.passes.similarity import similarity

Rank = Literal["loss", "similarity", "gates"]
ENDS = "keep_first= and keep_last= say how many blocks at the ends are left alone"


@dataclass(frozen=True)
class ShareBlocks(Pass):
    """Removes the least important blocks, then lets neighbours share their matrices.

    `groups` is how many sets of matrices are left, 0 for all, or the groups themselves, such as ((4, 5), (6, 7)).
    `remove` is the part of the blocks that goes. `rank` "loss": one block after the other, each time the one that is
    missed least in what is left; "similarity": a block matters as 1 - cosine of the stream before and after it;
    "gates": as the gate g of x + g f(x) that `steps` steps of training on calibration data leave it. Neighbours with
    the most similar streams share. The first `keep_first` and last `keep_last` blocks are left as they are, where
    groups are chosen and blocks removed.
    """

    name: ClassVar[str] = "share-blocks"
    contract: ClassVar[Contract] = "lossy"
    groups: int | Groups = 0
    remove: float = 0.0
    rank: Rank = "loss"
    keep_first: int = 1
    keep_last: int = 1
    steps: int = GATE_STEPS
    seed: int = 0

    def __post_init__(self) -> None:
        require_groups(self.groups)
        if isinstance(self.remove, bool) or not isinstance(self.remove, (int, float)) or not 0 <= self.remove < 1:
            raise ValueError(f"remove is {self.remove!r}, expected a part of the blocks from 0 up to 1")
        if self.remove and not isinstance(self.groups, int):
            raise ValueError("explicit groups number the blocks as they are: remove blocks in a pass before")
        require_choice("rank", self.rank, get_args(Rank))
        for name, least in (("keep_first", 0), ("keep_last", 0), ("steps", 1), ("seed", 0)):
            require_count(name, getattr(self, name), least)
        if not self.groups and not self.remove:
            raise ValueError("nothing to do: give groups=, how many sets of matrices are left, or remove=")

    def requires(self, program: Program) -> None:
        layers = find_layers(program)
        if not isinstance(self.groups, int):
            for group in self.groups:
                require_neighbours(chosen(layers, group, "groups"))
            return
        if program.calibration is None:
            raise CompileError(
                "blocks are ranked and grouped on calibration data, there is none",
                hint="give calibration=, or the groups themselves: groups=((4, 5), (6, 7))",
            )
        self._require_counts(len(layers))

    def _require_counts(self, blocks: int) -> None:
        left = blocks - self._removed(blocks)
        free = blocks - self.keep_first - self.keep_last
        least = min(blocks, self.keep_first + self.keep_last + 1)
        if self._removed(blocks) > max(0, free):
            raise CompileError(f"{self._removed(blocks)} of {blocks} blocks would go, {max(0, free)} may", hint=ENDS)
        if isinstance(self.groups, int) and self.groups and not least <= self.groups <= left:
            found = f"groups is {self.groups}, expected {least} to {left} for {left} blocks"
            raise CompileError(found, hint=ENDS)

    def _removed(self, blocks: int) -> int:
        return math.floor(self.remove * blocks)

    def run(self, program: Program) -> Changes:
        changes = Changes()
        if not isinstance(self.groups, int):
            share(program, find_layers(program), self.groups, changes)
            return changes
        self._remove(program, find_layers(program), changes)
        if self.groups:
            layers = find_layers(program)
            share(program, layers, self._grouped(program, layers), changes)
        return changes

    def _remove(self, program: Program, layers: Sequence[Layer], changes: Changes) -> None:
        count = self._removed(len(layers))
        if not count:
            return
        may = layers[self.keep_first : len(layers) - self.keep_last]
        free = [layer for layer in may if fact(layer.main.start) == fact(layer.main.end)]
        if len(free) < count:
            raise CompileError(f"{count} blocks would go, of those that may {len(free)} keep the shape of the stream")
        depth = Depth(program, layers, "all", changes)
        depth.drop_layers(self._least(program, layers, free, count, changes))
        depth.settle()
        program.sweep()

    def _least(
        self, program: Program, layers: Sequence[Layer], free: Sequence[Layer], count: int, changes: Changes
    ) -> list[Layer]:
        """The `count` layers of `free` that matter least."""
        if self.rank == "loss":
            order = list(least_missed(program, free, count))
            for layer, loss in order:
                changes.figure(layer.path, LOSS, loss)
            return [layer for layer, _ in order]
        inner = [layer for layer in layers if fact(layer.main.start) == fact(layer.main.end)]
        found = gates(program, inner, self.steps, self.seed) if self.rank == "gates" else turns(program, inner)
        matters = {layer.index: value for layer, value in zip(inner, found, strict=True)}
        for layer in inner:
            changes.figure(layer.path, f"importance by {self.rank}", matters[layer.index])
        return sorted(free, key=lambda layer: matters[layer.index])[:count]

    def _grouped(self, program: Program, layers: Sequence[Layer]) -> Groups:
        first, end = self.keep_first, len(layers) - self.keep_last
        may = [n for n in range(first + 1, end) if unlike(layers[n - 1], layers[n]) is None]
        joins = dict(zip(may, similarity(program, [layers[n] for n in may]), strict=True))
        return even_groups(len(layers), int(self.groups), joins)  # type: ignore[arg-type]


def turns(program: Program, layers: Sequence[Layer]) -> list[float]:
    """1 - cosine of the streams before and after each layer."""
    return [1 - similar for similar in similarity(program, layers)]

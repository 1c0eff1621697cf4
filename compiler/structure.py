"""Repeated residual blocks and their attention and FFN parts, found from dataflow and execution, never from names."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from sylvester.compiler.cost import shape
from sylvester.compiler.dataflow import Dataflow, Segment
from sylvester.compiler.errors import module_path
from sylvester.compiler.parts import Part, addends, find_parts
from sylvester.compiler.printing import fact
from sylvester.compiler.program import Program, binding, value
from sylvester.compiler.repeats import Run, runs


@dataclass(frozen=True)
class Block:
    """One copy of what repeats: it takes the stream from `start` to `end`."""

    segments: tuple[Segment, ...]
    parts: tuple[Part, ...]

    @property
    def start(self) -> fx.Node:
        return self.segments[0].start

    @property
    def end(self) -> fx.Node:
        return self.segments[-1].end

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(n for segment in self.segments for n in segment.nodes)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Weight keys in an order that corresponds between blocks."""
        return tuple(binding(n).key for segment in self.segments for n in segment.parameters)

    @property
    def sides(self) -> tuple[fx.Node, ...]:
        """Values from outside the stream (masks, rotary tables, another stream), in corresponding order."""
        return tuple(n for segment in self.segments for n in segment.sides)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(part.kind for part in self.parts)

    @property
    def path(self) -> str:
        """Module path of the block's end, for messages only."""
        return module_path(self.end)


@dataclass(frozen=True)
class Stack:
    """A run of equal blocks along one residual stream. `spine` has all values of the stream, from source to result."""

    blocks: tuple[Block, ...]
    spine: tuple[fx.Node, ...]

    @property
    def stream(self) -> tuple[fx.Node, ...]:
        """The values of the stream from the first block's input to the last block's output."""
        first, last = self.spine.index(self.blocks[0].start), self.spine.index(self.blocks[-1].end)
        return self.spine[first : last + 1]

    @property
    def width(self) -> int:
        """Size of the stream's last axis."""
        return shape(value(self.blocks[0].start))[-1]

    def __str__(self) -> str:
        first, last = self.blocks[0], self.blocks[-1]
        head = f"{len(self.blocks)} blocks of ({', '.join(first.kinds)})"
        lines = [f"{head} from %{first.start.name}: {fact(first.start)} to %{last.end.name}"]
        lines += [f"  {part}" for part in first.parts]
        return "\n".join(lines)


@dataclass(frozen=True)
class Structure:
    """The stacks of an entry, in order; empty when nothing repeats."""

    stacks: tuple[Stack, ...] = field(default=())

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(block for stack in self.stacks for block in stack.blocks)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for block in self.blocks for part in block.parts)

    def __str__(self) -> str:
        return "\n".join(map(str, self.stacks)) if self.stacks else "no repeated blocks"


def discover(program: Program, entry: str = "forward") -> Structure:
    """The structure of one entry of a canonical program."""
    flow = Dataflow(program.entry(entry))
    stacks: list[Stack] = []
    taken: set[fx.Node] = set()
    kinds: dict[str, tuple[str, ...]] = {}
    for source in flow.sources():
        segments = flow.segments(source)
        spine = (source, *(segment.end for segment in segments))
        for run in _residual_runs(segments):
            copies = [tuple(segments[i] for i in copy) for copy in run.copies()]
            if taken.isdisjoint(copy[-1].end for copy in copies):
                taken |= {segment.end for copy in copies for segment in copy}
                parts = [[p for segment in copy for p in find_parts(program, flow, segment, kinds)] for copy in copies]
                blocks = tuple(Block(copy, tuple(found)) for copy, found in zip(copies, parts, strict=True))
                stacks.append(Stack(blocks, spine))
    return Structure(tuple(sorted(stacks, key=lambda s: flow.order[s.blocks[0].start])))


def _residual_runs(segments: list[Segment]) -> list[Run]:
    return runs([s.digest for s in segments], [bool(addends(s)) for s in segments])

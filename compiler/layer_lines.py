"""The layers along one residual stream: its parts in order, grouped, with the segments that belong to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import fx

from sylvester.compiler.dataflow import Dataflow, Segment
from sylvester.compiler.parts import Part, find_parts
from sylvester.compiler.program import Program, binding
from sylvester.compiler.structure import Stack

ORDER = ("attention", "cross_attention", "mixer", "conv", "ffn")
"""Kinds of parts that change a layer, in the order they have within one."""


@dataclass(frozen=True)
class Site:
    """A layer in one entry: it takes the stream from `start` to `end` through `parts`, each with its segment."""

    start: fx.Node
    end: fx.Node
    parts: tuple[tuple[Part, Segment], ...]

    def of_kind(self, kind: str) -> list[tuple[Part, Segment]]:
        return [pair for pair in self.parts if pair[0].kind == kind]

    @property
    def slots(self) -> tuple[str, ...]:
        """The state slots that its parts read."""
        return tuple(dict.fromkeys(key for part, _ in self.parts for key in slots_of(part)))


@dataclass
class Group:
    """Parts that belong together, and the segments after the last of them that still do."""

    parts: list[tuple[Part, Segment]] = field(default_factory=list)
    tail: int = 0


@dataclass
class Line:
    """The segments along one spine, and the layers on it."""

    segments: list[Segment]
    groups: list[Group]

    @staticmethod
    def of(program: Program, flow: Dataflow, source: fx.Node, stacks: Sequence[Stack], *, whole: bool) -> Line:
        segments = flow.segments(source)
        ends = {segment.end for segment in segments}
        own = [stack for stack in stacks if stack.blocks[-1].end in ends and stack.spine[0] is source]
        if not own:
            return Line(segments, [])
        kinds: dict[str, tuple[str, ...]] = {}
        found = [(find_parts(program, flow, segment, kinds), segment) for segment in segments]
        others = {s.end for stack in stacks if stack not in own for block in stack.blocks for s in block.segments}
        working = [(parts, s) for parts, s in found if s.end not in others and any(p.kind in ORDER for p in parts)]
        macaron = next((stack for stack in own if whole and _is_macaron(stack, [s for _, s in working])), None)
        line = Line(segments, _by_block(working, macaron) if macaron else _by_kind(working))
        line.measure_tails()
        return line

    def measure_tails(self) -> None:
        """What follows the last part of a layer up to the next layer is its own; of the last layer what is alike."""
        for group, after in pairwise(self.groups):
            group.tail = self._at(after.parts[0][1]) - self._at(group.parts[-1][1]) - 1
        if len(self.groups) < 2:
            return
        last, before = self.groups[-1], self.groups[-2]
        models = self.segments[self._at(before.parts[-1][1]) + 1 :][: before.tail]
        tail = self.segments[self._at(last.parts[-1][1]) + 1 :][: before.tail]
        if [s.digest for s in models] == [s.digest for s in tail]:
            last.tail = before.tail

    def site(self, number: int) -> Site:
        group = self.groups[number]
        end = self.segments[self._at(group.parts[-1][1]) + group.tail].end
        return Site(group.parts[0][1].start, end, tuple(group.parts))

    def _at(self, segment: Segment) -> int:
        return next(i for i, s in enumerate(self.segments) if s.end is segment.end)


def _is_macaron(stack: Stack, working: Sequence[Segment]) -> bool:
    """Whether all parts are in equal blocks that have a kind twice without being several equal layers."""
    kinds = stack.blocks[0].kinds
    ends = {s.end for block in stack.blocks for s in block.segments}
    if not kinds or any(segment.end not in ends for segment in working):
        return False
    period = next(n for n in range(1, len(kinds) + 1) if tuple(kinds[:n]) * (len(kinds) // n) == tuple(kinds))
    return len(set(kinds[:period])) < period


def _by_kind(working: Sequence[tuple[list[Part], Segment]]) -> list[Group]:
    """A new layer begins where a kind does not come after the one before."""
    groups: list[Group] = []
    rank = len(ORDER)
    for parts, segment in working:
        ranks = [ORDER.index(p.kind) for p in parts if p.kind in ORDER]
        if min(ranks) <= rank:
            groups.append(Group())
        groups[-1].parts += [(p, segment) for p in parts]
        rank = max(ranks)
        rank = rank if rank < len(ORDER) - 1 else len(ORDER)
    return groups


def _by_block(working: Sequence[tuple[list[Part], Segment]], stack: Stack) -> list[Group]:
    ends = {s.end: n for n, block in enumerate(stack.blocks) for s in block.segments}
    groups: dict[int, Group] = {}
    for parts, segment in working:
        if segment.end in ends:
            groups.setdefault(ends[segment.end], Group()).parts += [(p, segment) for p in parts]
    return list(groups.values())


def slots_of(part: Part) -> tuple[str, ...]:
    """The state slots that a part reads."""
    operands = (u for node in part.nodes for u in node.all_input_nodes if u.op == "placeholder")
    return tuple(dict.fromkeys(binding(u).key for u in operands if binding(u).kind == "state"))

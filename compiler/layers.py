"""The layers of a program: its residual parts in order, grouped, and where each stands in every entry.

Layers need not be equal: one whose attention or FFN is gone is still a layer. Entries are matched by the weights that
their parts read, so an entry may lack layers that another has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import fx

from sylvester.compiler.dataflow import Dataflow, Segment
from sylvester.compiler.errors import CompileError, module_path
from sylvester.compiler.parts import Part, find_parts, plain_parts
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.structure import Stack, discover

ORDER = ("attention", "cross_attention", "mixer", "conv", "ffn")
"""Kinds of parts that change a layer, in the order they have within one."""
START = "start"
NUMBERS = "layers"
"""Key of `Program.info`: the original numbers of the layers that are left, once one is gone."""
"""The entry that is derived from `prefill`."""


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


@dataclass(frozen=True)
class Layer:
    """Number `index` of the layers that are left, `original` of those the model had; `place` of `count` in its stack.

    `sites` has an entry for each graph that runs the layer, but `start`, which is derived from `prefill`.
    """

    index: int
    original: int
    place: int
    count: int
    sites: Mapping[str, Site]
    main: Site

    @property
    def path(self) -> str:
        """Module path, for messages and reports only."""
        return module_path(self.main.end) or str(self.index)


@dataclass
class _Group:
    """Parts that belong together, and the segments after the last of them that still do."""

    parts: list[tuple[Part, Segment]] = field(default_factory=list)
    tail: int = 0


def find_layers(program: Program) -> tuple[Layer, ...]:
    """All layers, stack after stack; `CompileError` when the program has no repeated blocks."""
    main = next(name for name, entry in program.entries.items() if entry is program.main)
    structure = discover(program, main)
    if not structure.stacks:
        raise CompileError("the model has no repeated residual blocks", hint="this works on stacks of equal layers")
    flow = Dataflow(program.main)
    lines = _lines(program, flow, structure.stacks)
    groups = [(line, n) for line in lines if line.groups for n in range(len(line.groups))]
    mine = [line.site(n) for line, n in groups]
    others = {
        name: _matched(_keyed(mine), list(_plain_lines(program, name)))
        for name in program.entries
        if name not in (main, START)
    }
    numbers = program.info.get(NUMBERS) or range(len(groups))
    return tuple(
        Layer(
            index,
            int(numbers[index]),
            n,
            len(line.groups),
            {main: mine[index]} | {name: found[index] for name, found in others.items() if index in found},
            mine[index],
        )
        for index, (line, n) in enumerate(groups)
    )


def _lines(program: Program, flow: Dataflow, stacks: Sequence[Stack]) -> list[_Line]:
    """Layers along every spine: one begins where a kind of part does not come after the one before.

    Where equal blocks have a kind twice the blocks are the layers, unless parts were dropped and the count tells.
    """
    known = program.info.get(NUMBERS)
    lines = [_Line.of(program, flow, source, stacks, whole=known is None) for source in flow.sources()]
    if known is None or sum(len(line.groups) for line in lines) == len(known):
        return lines
    return [_Line.of(program, flow, source, stacks, whole=True) for source in flow.sources()]


@dataclass
class _Line:
    """The segments along one spine, and the layers on it."""

    segments: list[Segment]
    groups: list[_Group]

    @staticmethod
    def of(program: Program, flow: Dataflow, source: fx.Node, stacks: Sequence[Stack], *, whole: bool) -> _Line:
        segments = flow.segments(source)
        ends = {segment.end for segment in segments}
        own = [stack for stack in stacks if stack.blocks[-1].end in ends and stack.spine[0] is source]
        if not own:
            return _Line(segments, [])
        kinds: dict[str, tuple[str, ...]] = {}
        found = [(find_parts(program, flow, segment, kinds), segment) for segment in segments]
        others = {s.end for stack in stacks if stack not in own for block in stack.blocks for s in block.segments}
        working = [(parts, s) for parts, s in found if s.end not in others and any(p.kind in ORDER for p in parts)]
        macaron = next((stack for stack in own if whole and _is_macaron(stack, [s for _, s in working])), None)
        line = _Line(segments, _by_block(working, macaron) if macaron else _by_kind(working))
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


def _by_kind(working: Sequence[tuple[list[Part], Segment]]) -> list[_Group]:
    """A new layer begins where a kind does not come after the one before."""
    groups: list[_Group] = []
    rank = len(ORDER)
    for parts, segment in working:
        ranks = [ORDER.index(p.kind) for p in parts if p.kind in ORDER]
        if min(ranks) <= rank:
            groups.append(_Group())
        groups[-1].parts += [(p, segment) for p in parts]
        rank = max(ranks)
        rank = rank if rank < len(ORDER) - 1 else len(ORDER)
    return groups


def _by_block(working: Sequence[tuple[list[Part], Segment]], stack: Stack) -> list[_Group]:
    ends = {s.end: n for n, block in enumerate(stack.blocks) for s in block.segments}
    groups: dict[int, _Group] = {}
    for parts, segment in working:
        if segment.end in ends:
            groups.setdefault(ends[segment.end], _Group()).parts += [(p, segment) for p in parts]
    return list(groups.values())


Parts = tuple[list[Segment], list[tuple[Part, Segment]]]


def _plain_lines(program: Program, name: str) -> Iterator[Parts]:
    """The segments along each spine of an entry with their parts; caches begin spines that join others later."""
    flow = Dataflow(program.entries[name])
    for source in flow.sources():
        segments = flow.segments(source)
        yield segments, [(part, s) for s in segments for part in plain_parts(flow, s)]


Keys = tuple[str, ...]


def _keys(part: Part) -> Keys:
    """The weights that a part reads, in order."""
    return tuple(dict.fromkeys(binding(u).key for n in part.nodes for u in n.all_input_nodes if is_weight(u)))


def _keyed(sites: Sequence[Site]) -> list[tuple[int, Part, Keys]]:
    return [(n, part, _keys(part)) for n, site in enumerate(sites) for part, _ in site.parts]


def _matched(wanted: Sequence[tuple[int, Part, Keys]], lines: Sequence[Parts]) -> dict[int, Site]:
    """The layers that an entry has, by number; of spines that share parts the one with most of them counts."""
    found: dict[int, Site] = {}
    grouped = [_grouped(wanted, line) for line in lines]
    for segments, groups in sorted(grouped, key=lambda g: -sum(len(group.parts) for group in g[1].values())):
        line = _Line(segments, list(groups.values()))
        line.measure_tails()
        found = {number: line.site(n) for n, number in enumerate(groups)} | found
    return found


def _grouped(wanted: Sequence[tuple[int, Part, Keys]], line: Parts) -> tuple[list[Segment], dict[int, _Group]]:
    """Parts by the number of their layer: those of an entry are a subsequence of those of the main entry."""
    at, groups = 0, dict[int, _Group]()
    mine = {key for _, _, keys in wanted for key in keys}
    for part, segment in line[1]:
        keys = tuple(key for key in _keys(part) if key in mine)
        place = next((i for i in range(at, len(wanted)) if wanted[i][2] == keys), None)
        if place is not None:
            number, known, _ = wanted[place]
            groups.setdefault(number, _Group()).parts.append((replace(part, kind=known.kind), segment))
            at = place + 1
    return line[0], groups


def slots_of(part: Part) -> tuple[str, ...]:
    """The state slots that a part reads."""
    operands = (u for node in part.nodes for u in node.all_input_nodes if u.op == "placeholder")
    return tuple(dict.fromkeys(binding(u).key for u in operands if binding(u).kind == "state"))


def chosen(layers: Sequence[Layer], numbers: Sequence[int], option: str) -> list[Layer]:
    """The layers with these numbers; an unknown one is an error."""
    if unknown := sorted(set(numbers) - set(range(len(layers)))):
        raise CompileError(
            f"{option} names layer {unknown[0]}, the program has layers 0 to {len(layers) - 1}",
            hint="layers are numbered from 0 in the order they run; `sylvester show` lists them",
        )
    return [layers[n] for n in numbers]

"""The layers of a program: its residual parts in order, grouped, and where each stands in every entry.

Layers need not be equal: one whose attention or FFN is gone is still a layer. Entries are matched by the weights that
their parts read, so an entry may lack layers that another has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sylvester.compiler.dataflow import Dataflow, Segment
from sylvester.compiler.errors import CompileError, module_path
from sylvester.compiler.layer_lines import Group, Line, Site
from sylvester.compiler.parts import Part, plain_parts
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.structure import Stack, discover

START = "start"
"""The entry that is derived from `prefill`."""
NUMBERS = "layers"
"""Key of `Program.info`: the original numbers of the layers that are left, once one is gone."""


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
    known = program.info.get(NUMBERS, ())
    numbers = known if len(known) == len(groups) else range(len(groups))
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


def _lines(program: Program, flow: Dataflow, stacks: Sequence[Stack]) -> list[Line]:
    """Layers along every spine: one begins where a kind of part does not come after the one before.

    Where equal blocks have a kind twice the blocks are the layers, unless parts were dropped and the count tells.
    """
    known = program.info.get(NUMBERS)
    lines = [Line.of(program, flow, source, stacks, whole=known is None) for source in flow.sources()]
    if known is None or sum(len(line.groups) for line in lines) == len(known):
        return lines
    return [Line.of(program, flow, source, stacks, whole=True) for source in flow.sources()]


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
        line = Line(segments, list(groups.values()))
        line.measure_tails()
        found = {number: line.site(n) for n, number in enumerate(groups)} | found
    return found


def _grouped(wanted: Sequence[tuple[int, Part, Keys]], line: Parts) -> tuple[list[Segment], dict[int, Group]]:
    """Parts by the number of their layer: those of an entry are a subsequence of those of the main entry."""
    at, groups = 0, dict[int, Group]()
    mine = {key for _, _, keys in wanted for key in keys}
    for part, segment in line[1]:
        keys = tuple(key for key in _keys(part) if key in mine)
        place = next((i for i in range(at, len(wanted)) if wanted[i][2] == keys), None)
        if place is not None:
            number, known, _ = wanted[place]
            groups.setdefault(number, Group()).parts.append((replace(part, kind=known.kind), segment))
            at = place + 1
    return line[0], groups


def chosen(layers: Sequence[Layer], numbers: Sequence[int], option: str) -> list[Layer]:
    """The layers with these numbers; an unknown one is an error."""
    if unknown := sorted(set(numbers) - set(range(len(layers)))):
        raise CompileError(
            f"{option} names layer {unknown[0]}, the program has layers 0 to {len(layers) - 1}",
            hint="layers are numbered from 0 in the order they run; `sylvester show` lists them",
        )
    return [layers[n] for n in numbers]

"""A program run as any of its genomes without rewriting it: dropped parts add nothing, weights are rounded as read.

The stream before the first block that differs from an anchor is kept, so that changing one block costs half a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import map_arg

from sylvester.compiler.activations import rounded_rows
from sylvester.compiler.calibration import Sample
from sylvester.compiler.calls import arguments
from sylvester.compiler.divergence import ROOM, Reference, Score
from sylvester.compiler.errors import CompileError
from sylvester.compiler.genome import EMBEDDING, FLOAT, LINEAR, Genome, Sites
from sylvester.compiler.next_token import following, language_model
from sylvester.compiler.program import Program, binding, is_weight
from sylvester.compiler.walk import empty_cache, needed_by

Values = dict[fx.Node, Any]
Weights = Callable[[str, int], Tensor | None]
"""Key and bits -> the float weight that the rounded one stands for; None where it stays as it is."""
ROW_BITS = 8
"""Bits of the rows of x that whole numbers meet."""


class Supernet:
    """One program with its samples; results depend on nothing else but the genome."""

    def __init__(self, program: Program, sites: Sites, weights: Weights, samples: Sequence[Sample]) -> None:
        model = language_model(program)
        if model is None:
            raise CompileError("the program scores no next token: it is no causal language model")
        self.program, self.sites, self.weights, self.model, self.samples = program, sites, weights, model, samples
        self.result = program.main.result(model.scores)
        needed = needed_by([self.result])
        self.stages = _Stages(program, sites, needed)
        self.given = [self._inputs(needed, sample) for sample in samples]
        self.references: list[Reference] = []
        self._anchor = sites.genome()
        self._kept: dict[tuple[int, int], Values] = {}
        self._room = ROOM

    def refer(self, references: Sequence[Reference] | None = None) -> Sequence[Reference]:
        """What candidates are compared with: as given, else this program as it is."""
        if references is not None:
            self.references = list(references)
        elif not self.references:
            size = 4 * self.model.vocabulary * sum(sample[self.model.tokens].numel() for sample in self.samples)
            for i in range(len(self.samples)):
                self.references.append(Reference.of(*self._predicted(i, self._anchor), every=size <= ROOM))
        return self.references

    def anchor(self, genome: Genome) -> None:
        """Keep the stream of this genome at every block, as far as there is room, for runs of others like it."""
        stages = self.stages.common(self._anchor, genome)
        self._kept = {(i, stage): values for (i, stage), values in self._kept.items() if stage <= stages}
        self._room = ROOM - sum(map(_nbytes, self._kept.values()))
        self._anchor = genome

    def score(self, genome: Genome, samples: Sequence[int] | None = None) -> Score:
        """The sums over some of the samples, or all."""
        total = Score()
        for i in range(len(self.samples)) if samples is None else samples:
            total += self.references[i].score(self._predicted(i, genome)[0])
        return total

    def _predicted(self, number: int, genome: Genome) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return following(self.model, self._run(number, genome), self.samples[number])

    def _run(self, number: int, genome: Genome) -> Tensor:
        """Scores of one sample."""
        common = self.stages.common(self._anchor, genome)
        start = max((s for s in range(common + 1) if (number, s) in self._kept), default=0)
        values = dict(self._kept[number, start]) if start else dict(self.given[number])
        for stage in range(start, len(self.stages)):
            _Run(self, genome, values).stage(stage)
            values = {n: values[n] for n in self.stages.live[stage + 1] if n in values}
            if stage < common and (number, stage + 1) not in self._kept:
                self._keep(number, stage + 1, values)
        found: Tensor = values[self.result]
        return found

    def _keep(self, number: int, stage: int, values: Values) -> None:
        size = _nbytes(values)
        if size <= self._room:
            self._room -= size
            self._kept[number, stage] = dict(values)

    def _inputs(self, needed: set[fx.Node], sample: Sample) -> Values:
        found: Values = {}
        for node in self.program.main.placeholders():
            bound = binding(node)
            if node in needed and bound.kind != "weight":
                found[node] = (
                    sample[bound.key] if bound.kind == "input" else empty_cache(self.program, bound.key, sample)
                )
        return found


class _Stages:
    """Nodes in the order they run: what comes before the blocks, every block, what comes after."""

    def __init__(self, program: Program, sites: Sites, needed: set[fx.Node]) -> None:
        self.sites, self.count = sites, len(sites.blocks) + 2
        self.place = _placed(program, sites, needed)
        self.nodes: list[list[fx.Node]] = [[] for _ in range(self.count)]
        for node in program.main.graph.nodes:
            if node in self.place and node.op == "call_function":
                self.nodes[self.place[node]].append(node)
        self.keys = [_keys(nodes) for nodes in self.nodes]
        self.live = self._live(program)
        self.shared = [self._corresponding(i) for i in range(len(sites.blocks))]
        self._plans: dict[tuple[int, tuple[str, ...]], list[fx.Node]] = {}

    def __len__(self) -> int:
        return self.count

    def dropped(self, stage: int, genome: Genome) -> tuple[str, ...]:
        """Kinds of parts that the block of a stage has lost."""
        if not 0 < stage < self.count - 1:
            return ()
        sites, bits = self.sites.inner[stage - 1], genome.parts[stage - 1]
        return tuple(site.kind for site, b in zip(sites, bits, strict=True) if not b)

    def common(self, one: Genome, other: Genome) -> int:
        """How many stages from the first compute the same."""
        if one == other:
            return self.count
        bits = self.sites.bits(one), self.sites.bits(other)
        for stage in range(self.count):
            genes = [self._gene(stage, genome, b) for genome, b in zip((one, other), bits, strict=True)]
            if genes[0] != genes[1]:
                return stage
        return self.count

    def _gene(self, stage: int, genome: Genome, bits: dict[str, int]) -> object:
        inside = 0 < stage < self.count - 1
        share = genome.shares[stage - 1] if inside else 0
        keys = self.keys[stage - share] if inside else self.keys[stage]
        return share, self.dropped(stage, genome), tuple(bits.get(key, FLOAT) for key in keys)

    def plan(self, stage: int, dropped: tuple[str, ...]) -> list[fx.Node]:
        """The nodes to run of a stage whose block has lost parts, their last nodes included."""
        if (stage, dropped) not in self._plans:
            inside, ends = set(self.nodes[stage]), self.writers(stage, dropped)
            wanted: set[fx.Node] = set()
            pending = [n for n in self.nodes[stage] if n in self.live[stage + 1]]
            while pending:
                node = pending.pop()
                if node in inside and node not in wanted:
                    wanted.add(node)
                    pending += [] if node in ends else node.all_input_nodes
            self._plans[stage, dropped] = [n for n in self.nodes[stage] if n in wanted]
        return self._plans[stage, dropped]

    def writers(self, stage: int, dropped: tuple[str, ...]) -> dict[fx.Node, fx.Node]:
        """The last node of every lost part, with the stream it would be added to."""
        parts = self.sites.blocks[stage - 1].parts if dropped else ()
        return {part.writer: part.stream for part in parts if part.kind in dropped}

    def _live(self, program: Program) -> list[set[fx.Node]]:
        """Per stage what earlier ones have computed and it or a later one reads."""
        live: list[set[fx.Node]] = [set() for _ in range(self.count + 1)]
        for node, stage in self.place.items():
            readers = [self.place[user] for user in node.users if user in self.place]
            last = self.count if node in program.main.results() else max(readers, default=stage)
            for s in range(stage + 1, last + 1):
                live[s].add(node)
        return live

    def _corresponding(self, block: int) -> list[dict[str, str]]:
        """Per distance from 1 the key that stands for each key of linear layers."""
        found: list[dict[str, str]] = [{}]
        own = self.sites.blocks[block].parameters
        linear = {key for node in self.nodes[block + 1] if node.target is LINEAR for key in _read(node)}
        for distance in range(1, block + 1):
            if not self.sites.shareable(block, distance):
                break
            other = self.sites.blocks[block - distance].parameters
            found.append({key: to for key, to in zip(own, other, strict=True) if key in linear})
        return found


class _Run:
    """One stage of one genome on one sample."""

    def __init__(self, net: Supernet, genome: Genome, values: Values) -> None:
        self.net, self.genome, self.values = net, genome, values
        self.bits = net.sites.bits(genome)
        self.rounded: dict[tuple[fx.Node, bool], Tensor] = {}

    def stage(self, stage: int) -> None:
        stages = self.net.stages
        dropped = stages.dropped(stage, self.genome)
        writers = stages.writers(stage, dropped)
        distance = self.genome.shares[stage - 1] if 0 < stage < len(stages) - 1 else 0
        self.names = stages.shared[stage - 1][distance] if distance else {}
        for node in stages.plan(stage, dropped):
            if node in writers:
                self.values[node] = torch.zeros_like(self.values[writers[node]])
            elif node.target is LINEAR:
                self.values[node] = self._linear(node)
            elif node.target is EMBEDDING:
                self.values[node] = self._embedding(node)
            else:
                args, kwargs = map_arg((node.args, dict(node.kwargs)), self._value)
                self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _linear(self, node: fx.Node) -> Tensor:
        given = arguments(node)
        bias = None if given["bias"] is None else self._value(given["bias"])
        weight, bits = self._weight(given["weight"])
        if bits == FLOAT:
            return F.linear(self._value(given["input"]), weight, bias)
        return F.linear(self._rows(given["input"], whole=bits <= ROW_BITS), weight, bias)

    def _embedding(self, node: fx.Node) -> Tensor:
        given = arguments(node)
        return F.embedding(self._value(given["indices"]), self._weight(given["weight"])[0])

    def _weight(self, node: fx.Node) -> tuple[Tensor, int]:
        """What is read for a weight, and its bits."""
        bits = self.bits.get(self._key(node), FLOAT) if is_weight(node) else FLOAT
        rounded = self.net.weights(self._key(node), bits) if bits != FLOAT else None
        return (self._value(node), FLOAT) if rounded is None else (rounded, bits)

    def _rows(self, node: fx.Node, whole: bool) -> Tensor:
        if (node, whole) not in self.rounded:
            x = self._value(node)
            self.rounded[node, whole] = rounded_rows(x, ROW_BITS) if whole else x.bfloat16().to(x.dtype)
        return self.rounded[node, whole]

    def _key(self, node: fx.Node) -> str:
        key = binding(node).key
        return self.names.get(key, key)

    def _value(self, node: fx.Node) -> Any:
        return self.net.program.weights[self._key(node)] if is_weight(node) else self.values[node]


def _placed(program: Program, sites: Sites, needed: set[fx.Node]) -> dict[fx.Node, int]:
    """Stage of every needed node: its block, else that of the last thing it reads."""
    inside = {node: i + 1 for i, block in enumerate(sites.blocks) for node in block.nodes}
    last = sites.blocks[-1].end
    place: dict[fx.Node, int] = {}
    for node in program.main.graph.nodes:
        if node not in needed or is_weight(node):
            continue
        before = [place[n] for n in node.all_input_nodes if n in place]
        behind = any(place[n] > len(sites.blocks) or n is last for n in node.all_input_nodes if n in place)
        place[node] = inside.get(node, len(sites.blocks) + 1 if behind else max(before, default=0))
    return place


def _keys(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for node in nodes if node.target in (LINEAR, EMBEDDING) for key in _read(node)))


def _read(node: fx.Node) -> Iterator[str]:
    yield from (binding(n).key for n in node.all_input_nodes if is_weight(n))


def _nbytes(values: Values) -> int:
    return sum(v.numel() * v.element_size() for v in values.values() if isinstance(v, Tensor))

"""f(x W1^T) W2^T + b -> all_reduce(f(x W1r^T) W2r^T) + b: each rank has some heads and hidden features of a part.

Layers that read the stream are split by outputs, those that write to it by inputs (Megatron-LM, Shoeybi et al., 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.check import Results, evaluate, random_state, require_same
from sylvester.compiler.errors import CompileError
from sylvester.compiler.parallel_ops import RANKS, all_reduce
from sylvester.compiler.parts import ATTENTIONS, Part
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, binding, fake_empty, fake_like, is_weight, value
from sylvester.compiler.ranks import run_ranks
from sylvester.passes.options import require_count
from sylvester.passes.shard_rules import LINEAR, Flow, follow
from sylvester.passes.shared_layers import PART_OF, require_blocks, sources, split_fused, stacks

aten = torch.ops.aten
ROWS, COLUMNS, HEADS = 0, 1, 1
"""Axes of a weight (outputs, inputs) and of a cache."""


@dataclass(frozen=True)
class TensorParallel(Pass):
    """The program of rank `rank` of `world` that run a model together, by torch.distributed.

    Parts that cannot be split stay whole on every rank, with the reason. One rank alone does not compute what the
    model does, so that the pass itself runs all ranks in this process and compares.
    """

    name: ClassVar[str] = "tensor-parallel"
    contract: ClassVar[Contract] = "exact"
    rank: int = 0
    world: int = 0

    def __post_init__(self) -> None:
        require_count("world", self.world, 2)
        require_count("rank", self.rank, 0)
        if self.rank >= self.world:
            raise ValueError(f"rank is {self.rank}, expected a whole number below the world of {self.world}")

    def requires(self, program: Program) -> None:
        require_blocks(program, self.name)
        if RANKS in program.info:
            raise CompileError(f"the program is split already: {program.info[RANKS]}", hint="split the whole program")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        before = evaluate(program)
        split_fused(program, changes)
        whole, axes = program.clone(), dict[str, int]()
        for part in [part for stack in stacks(program) for block in stack.blocks for part in block.parts]:
            self._part(program, part, axes, changes)
        if not axes:
            reasons = "; ".join(dict.fromkeys(refused.reason for refused in changes.refused))
            raise CompileError(f"{self.name} can split no part between {self.world} ranks: {reasons}")
        program.info[RANKS] = {"rank": self.rank, "world": self.world}
        program.sweep()
        changes.checked = require_same(before, together(whole, program, axes, self.world))
        return changes

    def _part(self, program: Program, part: Part, axes: dict[str, int], changes: Changes) -> None:
        plan = self._plan(program, part) if part.kind in PART_OF else Refusal("neither attention nor feed-forward")
        if isinstance(plan, Refusal):
            changes.refuse(f"split {part.kind}", plan, part.writer)
            return
        for key, axis in plan.axes.items():
            axes[key] = axis
            program.weights[key] = self._mine(program.weights[key], axis).contiguous()
        for entry, writer, flow in plan.sites:
            self._apply(program, entry, writer, flow, plan)
        changes.apply(f"split {part.kind}", part.writer)

    def _mine(self, x: Tensor, axis: int) -> Tensor:
        return x.chunk(self.world, axis)[self.rank]

    def _plan(self, program: Program, part: Part) -> Plan | Refusal:
        """What is to be split for a part, in every entry; nothing is edited yet."""
        behind = sources(part)
        if isinstance(behind, Refusal):
            return behind
        if uneven := _uneven(part, self.world):
            return uneven
        readers = [n for nodes in behind.values() for n in nodes]
        if len(part.writers) != 1 or not readers:
            return Refusal(f"{len(part.writers)} layers write to the stream, expected 1", part.writer)
        plan = Plan()
        for node, axis in [*((n, ROWS) for n in readers), (part.writers[0], COLUMNS)]:
            if refusal := plan.add(program, node, axis, self.world):
                return refusal
        return plan.trace(program, self.world) or plan

    def _apply(self, program: Program, entry: Entry, writer: fx.Node, flow: Flow, plan: Plan) -> None:
        """Make the calls of a part again, over what this rank has of the weights and caches."""
        for node in entry.placeholders("weight"):
            if binding(node).key in plan.axes:
                node.meta["val"] = fake_like(entry.fake_mode, program.weights[binding(node).key])
        for node in flow.slots:
            slot = program.state[binding(node).key]
            if slot.shape[HEADS] == value(node).shape[HEADS]:
                shape = (*slot.shape[:HEADS], slot.shape[HEADS] // self.world, *slot.shape[HEADS + 1 :])
                slot = program.state[binding(node).key] = replace(slot, shape=shape)
            own = [*value(node).shape]
            own[HEADS] = slot.shape[HEADS]
            node.meta["val"] = fake_empty(entry.fake_mode, own, slot.dtype)
        for node in flow.ends:
            target = cast("Callable[..., Any]", node.target)
            made = entry.emit(target, *flow.args(node), before=node, made_by=self.name, **node.kwargs)
            entry.replace(node, made)
        entry.replace(writer, self._summed(entry, writer))

    def _summed(self, entry: Entry, writer: fx.Node) -> fx.Node:
        given = arguments(writer)
        y = entry.emit(LINEAR, given["input"], given["weight"], before=writer, made_by=self.name)
        y = entry.emit(all_reduce.target, y, before=writer, made_by=self.name)
        if given["bias"] is None:
            return y
        return entry.emit(aten.add.Tensor, y, given["bias"], before=writer, made_by=self.name)


@dataclass
class Plan:
    """Weights of a part with the axis that is split, and per entry the layer that writes and the calls before it."""

    axes: dict[str, int] = field(default_factory=dict)
    nodes: dict[fx.Node, int] = field(default_factory=dict)
    sites: list[tuple[Entry, fx.Node, Flow]] = field(default_factory=list)

    def add(self, program: Program, node: fx.Node, axis: int, world: int) -> Refusal | None:
        """Split the weight of a layer in all entries, and its bias where the outputs are split."""
        if node.target is not LINEAR:
            return Refusal("a convolution or a layer of low bits, expected a linear layer", node)
        given = arguments(node)
        stored = [given["weight"], *([given["bias"]] if axis == ROWS and given["bias"] is not None else [])]
        if not all(map(is_weight, stored)):
            return Refusal("a weight is computed, expected a stored one", node)
        if value(stored[0]).shape[axis] % world:
            return Refusal(f"found {value(stored[0]).shape[axis]} features, which {world} ranks do not divide", node)
        uses = program.users(binding(stored[0]).key)
        if any(not _is_weight_of(n, stored[0]) for n in uses) or len({n.graph for n in uses}) < len(uses):
            return Refusal(f"{binding(stored[0]).key} is read elsewhere too", node)
        for tensor in stored:
            if any(n not in uses for n in program.users(binding(tensor).key)):
                return Refusal(f"{binding(tensor).key} is read elsewhere too", node)
            self.axes[binding(tensor).key] = axis
        self.nodes |= dict.fromkeys(uses, axis)
        return None

    def trace(self, program: Program, world: int) -> Refusal | None:
        """Follow the split in every entry."""
        for entry in program.entries.values():
            mine = {n: axis for n, axis in self.nodes.items() if n.graph is entry.graph}
            writers = [n for n, axis in mine.items() if axis == COLUMNS]
            if not mine:
                continue
            if len(writers) != 1:
                return Refusal(f"an entry has {len(writers)} of the layer that writes to the stream, expected 1")
            flow = follow(entry, {n for n, axis in mine.items() if axis == ROWS}, writers[0], world)
            if isinstance(flow, Refusal):
                return flow
            self.sites.append((entry, writers[0], flow))
        return None


def _is_weight_of(node: fx.Node, weight: fx.Node) -> bool:
    if node.target is not LINEAR or not is_weight(given := arguments(node)["weight"]):
        return False
    return binding(given).key == binding(weight).key and not is_weight(node.args[0])


def _uneven(part: Part, world: int) -> Refusal | None:
    """Why the heads of an attention part cannot be dealt out."""
    for node in (n for n in part.nodes if n.target in ATTENTIONS and value(n).dim() == 4):
        counts = [value(cast(fx.Node, x)).shape[HEADS] for x in node.args[:2]]
        if any(count % world for count in counts):
            found = f"{counts[0]} query heads and {counts[1]} key/value heads"
            return Refusal(f"found {found}, which {world} ranks do not divide", node)
    return None


def together(whole: Program, program: Program, axes: Mapping[str, int], world: int) -> Results:
    """What the ranks of `program` give together: outputs of the last one, the parts of caches side by side."""
    split = {key: whole.weights[key].chunk(world, axis) for key, axis in axes.items()}
    weights = [{**program.weights, **{key: parts[rank] for key, parts in split.items()}} for rank in range(world)]
    halved = {name for name, slot in program.state.items() if slot.shape[HEADS] != whole.state[name].shape[HEADS]}
    results: Results = {}
    for name, entry in program.entries.items():
        if not entry.examples:
            continue
        state = random_state(whole, whole.entries[name])
        dealt = {key: x.chunk(world, HEADS) if key in halved else [x] * world for key, x in state.items()}
        states = [{key: parts[rank] for key, parts in dealt.items()} for rank in range(world)]
        found = run_ranks(entry, entry.examples, weights, states)
        results[name] = found[-1] | {
            o.name: torch.cat([f[o.name] for f in found], HEADS) for o in entry.outputs if o.name in halved
        }
    return results

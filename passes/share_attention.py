"""x W_l^T -> x (sum_s c_ls D_s)^T + (x Q_l^T) P_l^T: attention layers of a group of blocks share matrix atoms D_s."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes, Refusal
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program
from sylvester.compiler.shared_ops import combine
from sylvester.passes.atom_plan import Groups, Plan, Planner
from sylvester.passes.atoms import Refined, Shared
from sylvester.passes.block_drift import check_groups
from sylvester.passes.shared_layers import ATTENTION, find_series, require_blocks, require_kinds

aten = torch.ops.aten
SIZES = (2, 4, 8)
SIZE, ATOMS = 4, 2
"""Blocks of a group, and its atoms, when nothing is asked for."""


@dataclass(frozen=True)
class ShareAttention(Pass):
    """MASA ("Share Your Attention", 2025) without training: atoms by principal components, low rank for what they miss.

    Each group of blocks and each of `kinds` has `atoms` matrices of its own. `refine_rank` is the rank per layer on
    average: directions go where they lower the error of the outputs most. `remove` says instead which part of the
    parameters of `kinds` must go; atoms, groups and rank are then chosen by measuring.
    `groups` lists blocks by number; else neighbours that drift little are grouped, `group_size` on average.
    `mode` "load" stores little and makes the matrices when an artefact is loaded; "run" makes them at every call, so
    that memory holds one copy of the atoms.
    """

    name: ClassVar[str] = "share-attention"
    contract: ClassVar[Contract] = "lossy"
    atoms: int | None = None
    refine_rank: int = 0
    remove: float | None = None
    groups: Groups = ()
    group_size: int = 0
    kinds: tuple[str, ...] = ATTENTION
    mode: Literal["load", "run"] = "load"

    def __post_init__(self) -> None:
        counts = {"refine_rank": (self.refine_rank, 0), "group_size": (self.group_size, 0), "atoms": (self.atoms, 1)}
        for option, (found, least) in counts.items():
            if found is not None and (isinstance(found, bool) or not isinstance(found, int)):
                raise TypeError(f"{option} is {found!r}, expected a whole number")
            if found is not None and found < least:
                raise ValueError(f"{option} is {found}, expected at least {least}")
        if self.mode not in ("load", "run"):
            raise ValueError(f"mode is {self.mode!r}, expected 'load' or 'run'")
        object.__setattr__(self, "kinds", require_kinds("kinds", self.kinds, ATTENTION))
        object.__setattr__(self, "groups", _parsed(self.groups))
        self._require_sense()

    def _require_sense(self) -> None:
        if self.remove is not None:
            if isinstance(self.remove, bool) or not isinstance(self.remove, (int, float)):
                raise TypeError(f"remove is {self.remove!r}, expected a number")
            if not 0 < self.remove < 1:
                raise ValueError(f"remove is {self.remove}, expected a part between 0 and 1")
            if self.refine_rank:
                raise ValueError("remove and refine_rank exclude each other: the rank follows from what is to go")
        if self.groups and self.group_size:
            raise ValueError("groups and group_size exclude each other")
        smallest = min(map(len, self.groups), default=self.group_size)
        if self.atoms is not None and smallest and self.atoms > smallest:
            raise ValueError(f"atoms is {self.atoms}, more than the {smallest} blocks of a group")

    def requires(self, program: Program) -> None:
        lengths = require_blocks(program, self.name)
        largest = max(lengths)
        if self.atoms is not None and self.atoms > largest:
            raise CompileError(f"atoms is {self.atoms}, the program has {largest} equal blocks at most")
        check_groups(self.groups, lengths)

    def run(self, program: Program) -> Changes:
        changes = Changes()
        series = find_series(program, self.kinds, changes)
        if not series:
            changes.refuse("attention", Refusal("no attention layer of repeated blocks can share its weight"), "blocks")
            return changes
        planner = Planner(program, series, changes)
        plan, shared = planner.best(self._plans(planner))
        for group in shared:
            self._rewrite(program, group, changes)
        self._tell(planner, plan, shared, changes)
        return changes

    def _plans(self, planner: Planner) -> list[Plan]:
        if self.remove is None:
            groups = self.groups or planner.groups(self.group_size or max(SIZE, self.atoms or 0))
            return [planner.with_rank(groups, self.atoms or ATOMS, self.refine_rank)]
        longest = max(len(stack.blocks) for stack in planner.stacks)
        sizes = [self.group_size] if self.group_size else sorted({*(n for n in SIZES if n < longest), longest})
        wide = [size for size in sizes if size >= (self.atoms or 1)]
        groupings = [self.groups] if self.groups else [planner.groups(size) for size in wide]
        return planner.plans(groupings, self.atoms, self.remove)

    def _rewrite(self, program: Program, group: Shared, changes: Changes) -> None:
        """Every layer of a cluster reads the atoms, in every entry."""
        if not group.layers:
            return
        weights = program.weights
        atoms = _stored(program, f"{group.cluster.members[0].layer.key}.atoms", group.atoms)
        for refined in group.layers:
            layer = refined.member.layer
            ends = ("coefficients", "left", "right")
            parts = [refined.coefficients, *(refined.factors or ())]
            keys = [atoms, *(_stored(program, f"{layer.key}.{e}", t) for e, t in zip(ends, parts, strict=False))]
            for entry, node in layer.uses:
                self._replace(entry, node, [entry.bind("weight", key, weights[key]) for key in keys])
            changes.apply(f"share {layer.kind}", layer.key)

    def _replace(self, entry: Entry, node: fx.Node, parts: Sequence[fx.Node]) -> None:
        given = arguments(node)
        x, bias = given["input"], given["bias"]

        def emit(target: Any, *args: Any) -> fx.Node:
            return entry.emit(target, *args, before=node, made_by=self.name)

        if self.mode == "load":
            factors = parts[2:] or (None, None)
            made = emit(combine.target, *parts[:2], *factors, True)
            entry.replace(node, emit(aten.linear.default, x, made, bias))
            return
        y = emit(aten.linear.default, x, emit(combine.target, *parts[:2]), bias)
        if len(parts) > 2:
            thin = emit(aten.linear.default, emit(aten.linear.default, x, parts[3]), parts[2])
            y = emit(aten.add.Tensor, y, thin)
        entry.replace(node, y)

    def _tell(self, planner: Planner, plan: Plan, shared: Sequence[Shared], changes: Changes) -> None:
        grouped = sum(n * k * len(g.layers) for g in shared for n, k in [g.cluster.shape])
        kept = planner.total - grouped + sum(group.parameters for group in shared)
        blocks = ", ".join(_span(group) for group in plan.groups)
        changes.note(f"{plan}; blocks {blocks}")
        changes.note(f"parameters {planner.total} -> {kept}, {1 - kept / planner.total:.1%} removed")
        ranks: dict[str, list[int]] = defaultdict(list)
        became: dict[tuple[str, str], list[str]] = defaultdict(list)
        for group in shared:
            for refined in group.layers:
                layer, rank = refined.member.layer, _rank(refined)
                ranks[layer.kind].append(rank)
                became[layer.path, layer.part].append(f"{layer.kind}+{rank}" if rank else layer.kind)
        if plan.spare:
            means = ", ".join(f"{kind} {sum(found) / len(found):.1f}" for kind, found in ranks.items())
            changes.note(f"mean rank beside the atoms: {means}")
        for (path, part), kinds in became.items():
            changes.became(path, part, f"shares {plan.atoms} atoms: {', '.join(kinds)}")


def _stored(program: Program, name: str, tensor: Tensor) -> str:
    key = program.weights.fresh(name)
    program.weights[key] = tensor.contiguous()
    return key


def _rank(refined: Refined) -> int:
    return refined.factors[0].shape[1] if refined.factors else 0


def _span(group: Sequence[int]) -> str:
    consecutive = list(group) == list(range(group[0], group[-1] + 1)) and len(group) > 1
    return f"{group[0]}-{group[-1]}" if consecutive else "+".join(map(str, group))


def _parsed(groups: object) -> Groups:
    """Groups of numbers of blocks, no block in two; raises TypeError or ValueError."""
    if not isinstance(groups, (tuple, list)) or not all(isinstance(g, (tuple, list)) for g in groups):
        raise TypeError(f"groups is {groups!r}, expected tuples of numbers of blocks, such as ((0, 1), (2, 3))")
    numbers = [n for group in groups for n in group]
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"groups is {groups!r}, expected tuples of numbers of blocks, such as ((0, 1), (2, 3))")
    if any(n < 0 for n in numbers) or len(set(numbers)) < len(numbers) or any(len(g) < 2 for g in groups):
        raise ValueError(f"groups is {groups!r}, expected at least 2 blocks in each, and no block twice")
    return tuple(tuple(group) for group in groups)

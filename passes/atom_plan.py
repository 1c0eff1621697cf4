"""How many atoms, for which groups of blocks, and how much rank beside them: one plan, or the best of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from sylvester.compiler import quality
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.gram import Whitening, input_grams
from sylvester.compiler.next_token import language_model
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.sensitivity import sensitivities
from sylvester.compiler.structure import Stack
from sylvester.passes.atoms import Cluster, Member, Shared, fit
from sylvester.passes.block_drift import consecutive_groups, drift
from sylvester.passes.shared_layers import Layer, Series, stacks, total_parameters

Groups = tuple[tuple[int, ...], ...]
SAMPLES = 4
"""Calibration samples that plans are compared on."""
STAGE = "share attention"


@dataclass(frozen=True)
class Plan:
    """Blocks of each group, atoms per group, and numbers left for low rank."""

    groups: Groups
    atoms: int
    spare: int

    def __str__(self) -> str:
        sizes = sorted({len(group) for group in self.groups})
        blocks = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        atoms = f"{self.atoms} atom{'' if self.atoms == 1 else 's'}"
        beside = f", {self.spare} numbers of low rank" if self.spare else ""
        return f"{atoms} for groups of {blocks} blocks{beside}"


class Planner:
    """What calibration data says of the layers, measured once, and plans over it."""

    def __init__(self, program: Program, series: Sequence[Series], changes: Changes) -> None:
        self.program, self.series, self.changes = program, series, changes
        self.total = total_parameters(series)
        nodes = [layer.node for s in series for layer in s.layers]
        self.calibrated = bool(program.calibration and program.calibration.fit)
        grams = input_grams(program, nodes, f"{STAGE}: inputs") if self.calibrated else {}
        by_gram = {id(gram): Whitening(gram) for gram in grams.values()}
        self.whitenings = {node: by_gram[id(gram)] for node, gram in grams.items()}
        self.weights = sensitivities(program, nodes)
        self.stacks: tuple[Stack, ...] = stacks(program)
        if not self.calibrated:
            changes.note("no calibration data: groups are of equal size, low rank is not whitened")

    @cached_property
    def drifts(self) -> list[list[float]]:
        """Between neighbouring blocks of each stack; all alike without data."""
        if not self.calibrated:
            return [[1.0] * (len(stack.blocks) - 1) for stack in self.stacks]
        return [drift(self.program, stack) for stack in self.stacks]

    def groups(self, size: int) -> Groups:
        """Groups of neighbours that drift little, of `size` blocks on average, by numbers over all stacks."""
        found: list[tuple[int, ...]] = []
        first = 0
        for number, stack in enumerate(self.stacks):
            blocks = len(stack.blocks)
            runs = [range(blocks)] if size >= blocks else consecutive_groups(self.drifts[number], size)
            found += [tuple(first + n for n in run) for run in runs]
            first += blocks
        return tuple(found)

    def clusters(self, groups: Groups) -> list[Cluster]:
        """The layers of each series by group; blocks in no group are left out."""
        found = []
        for series in self.series:
            for group in groups:
                members = [self._member(layer) for layer in series.layers if layer.block in group]
                found += [Cluster(tuple(members))] if members else []
        return found

    def _member(self, layer: Layer) -> Member:
        return Member(layer, self.whitenings.get(layer.node, Whitening(None)), self.weights[layer.node])

    def with_rank(self, groups: Groups, atoms: int, rank: int) -> Plan:
        """Low rank of `rank` per layer on average."""
        clusters = self.clusters(groups)
        return Plan(groups, atoms, rank * sum(sum(c.shape) * len(c.members) for c in clusters if len(c.members) > 1))

    def within(self, groups: Groups, atoms: int, remove: float) -> Plan | None:
        """As much rank as is left when `remove` of the parameters are to go; None when atoms alone take more."""
        spare = round((1 - remove) * self.total) - self._taken(groups, atoms)
        return Plan(groups, atoms, spare) if spare >= 0 else None

    def _taken(self, groups: Groups, atoms: int) -> int:
        clusters = self.clusters(groups)
        grouped = sum(n * k * len(c.members) for c in clusters for n, k in [c.shape])
        return self.total - grouped + sum(c.parameters(atoms) for c in clusters)

    def plans(self, groupings: Sequence[Groups], atoms: int | None, remove: float) -> list[Plan]:
        """Every plan that fits; `CompileError` when none does."""
        counts = [_counts(groups, atoms) for groups in groupings]
        pairs = [(groups, count) for groups, found in zip(groupings, counts, strict=True) for count in found]
        plans = [plan for groups, count in pairs if (plan := self.within(groups, count, remove))]
        if plans:
            return list(dict.fromkeys(plans))
        most = max(1 - self._taken(groups, count) / self.total for groups, count in pairs)
        raise CompileError(
            f"remove is {remove}, atoms alone leave at most {max(most, 0.0):.3f} to be removed",
            hint="remove less, or share among more blocks with group_size=",
        )

    def fit(self, plan: Plan) -> list[Shared]:
        return fit(
            self.program,
            self.clusters(plan.groups),
            plan.atoms,
            plan.spare,
            lambda done, of: report(f"{STAGE}: {plan}", done, of),
        )

    def best(self, plans: Sequence[Plan]) -> tuple[Plan, list[Shared]]:
        """The plan that costs least on calibration data; without data the one with the least error of weights."""
        best: tuple[float, Plan, list[Shared]] | None = None
        for plan in plans:
            shared = self.fit(plan)
            if len(plans) == 1:
                return plan, shared
            loss = self._loss(shared)
            self.changes.note(f"tried {plan}: {self._measure} {loss:.3g}")
            if best is None or loss < best[0]:
                best = loss, plan, shared
        assert best is not None, "there is at least one plan"
        return best[1], best[2]

    @property
    def _measure(self) -> str:
        if not self.calibrated:
            return "squared error"
        return "KL" if language_model(self.program) else "error"

    def _loss(self, shared: Sequence[Shared]) -> float:
        if not self.calibrated or self.program.calibration is None:
            return sum(_squared_error(self.program, group) for group in shared)
        trial = self.program.clone()
        for group in shared:
            for refined in group.layers:
                trial.weights[refined.member.layer.key] = refined.weight(group.atoms).float()
        samples = tuple(islice(self.program.calibration.fit, SAMPLES))
        if self._measure == "KL":
            return quality.compare(self.program, trial, samples).kl
        return max((d.error for d in quality.drift(self.program, trial, samples)), default=0.0)


def _counts(groups: Groups, atoms: int | None) -> list[int]:
    """Numbers of atoms worth a trial: one, and from a quarter to a half of the largest group."""
    if atoms is not None:
        return [atoms]
    largest = max(len(group) for group in groups)
    return sorted({max(1, part) for part in (1, largest // 4, 3 * largest // 8, largest // 2)})


def _squared_error(program: Program, shared: Shared) -> float:
    errors = [program.weights[r.member.layer.key] - r.weight(shared.atoms) for r in shared.layers]
    return sum(float(e.square().sum()) for e in errors)

"""table, budget, judge -> genome: solved by the table, corrected by the KL of whole models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from sylvester.compiler.budget import Budget
from sylvester.compiler.genome import Genome
from sylvester.compiler.progress import report
from sylvester.passes.search_descend import descend
from sylvester.passes.search_evolve import Mutation, Samples, Settings, evolve
from sylvester.passes.search_judge import Judge
from sylvester.passes.search_milp import RISE, SCORE, minimise
from sylvester.passes.search_solve import (
    KL,
    PERPLEXITY,
    RESOURCES,
    infeasible,
    limits_of,
    missed,
    weighed,
    within,
)
from sylvester.passes.search_table import Table, used

UNIFORM = (32, 16, 8, 4, 3)
STEPS = 6
"""Halvings of the interval in which the loss by the table is looked for that whole models bear."""
SHRINK, ROUNDS = 0.96, 3
"""Costs are lowered by so much, so often, where only the loss is bounded."""
RESTARTS = 2
MARGIN, LEAST = 0.98, 0.3
"""What was over its bound is aimed at with some room, down to this part of it."""


@dataclass
class Goal:
    """`tighter` has factors on the bounds, for what turned out to be over them when it was built."""

    table: Table
    judge: Judge
    budget: Budget
    settings: Settings
    seed: int
    widths: tuple[int, ...]
    tighter: dict[str, float] = field(default_factory=dict)

    def reach(self) -> Genome:
        """The best genome found; `CompileError` when none keeps the budget."""
        if any(name in self.budget.bounds for name in RESOURCES):
            return self._least_loss()
        return self._least_cost()

    def tighten(self, over: Mapping[str, float]) -> bool:
        """Aim lower by what was measured as a share of its bound; False where nothing is left to try."""
        for name, share in over.items():
            self.tighter[name] = self.tighter.get(name, 1.0) * MARGIN / share
        return all(factor > LEAST for factor in self.tighter.values())

    def keeps(self, genome: Genome) -> bool:
        """Whether the loss of the whole model is within the bounds."""
        loss, limits = self.judge.loss(genome), self.limits
        return loss.score <= limits.get(SCORE, math.inf) and loss.rise <= limits.get(RISE, math.inf)

    @property
    def limits(self) -> dict[str, float]:
        """The budget as limits on quantities of the table, tightened."""
        names = {KL: SCORE, PERPLEXITY: RISE}
        factors = {names.get(name, name): factor for name, factor in self.tighter.items()}
        return {name: limit * factors.get(name, 1.0) for name, limit in limits_of(self.table, self.budget).items()}

    def _least_loss(self) -> Genome:
        resources = {name: limit for name, limit in self.limits.items() if name in RESOURCES}
        first = within(self.table, resources)
        if first is None:
            raise infeasible(self.table, self.budget)
        best = self._evolved(first, resources)
        if not self.keeps(best):
            loss = self.judge.loss(best)
            raise missed(self.table, self.budget, best, loss.score, math.expm1(loss.rise))
        return best

    def _least_cost(self) -> Genome:
        """The cheapest genome whose whole loss is within the bounds, which the table only estimates."""
        best = self._estimated()
        for _ in range(ROUNDS):
            limits = self._cheaper(best)
            start = within(self.table, limits)
            if start is None:
                break
            found = self._evolved(start, limits)
            if not self.keeps(found):
                break
            best = found
        return best

    def _estimated(self) -> Genome:
        """By halving: the most loss by the table at which the whole model keeps the bounds."""
        low, high, best = 0.0, 4.0, self.judge.worlds[0].sites.genome()
        factor = 1.0
        for step in range(STEPS):
            report("estimate", step, STEPS)
            genome = within(self.table, {name: limit * factor for name, limit in self.limits.items()})
            if genome is not None and self.keeps(genome):
                best = genome if weighed(self.table, genome) <= weighed(self.table, best) else best
                low, factor = factor, (factor + high) / 2
            else:
                high, factor = factor, (low + factor) / 2
        return best

    def _cheaper(self, genome: Genome) -> dict[str, float]:
        name = "latency" if self.table.timed else "size"
        return {name: used(self.table.costs(genome))[name] * SHRINK}

    def _evolved(self, first: Genome, limits: Mapping[str, float]) -> Genome:
        random = Random(self.seed)
        mutations = [Mutation(self.table, n, dict(limits), random) for n in range(len(self.table.worlds))]
        self.judge.anchor(first)
        first = descend(first, self.table, self._fitness, limits, self.settings.rounds, self.judge.anchor)
        starts = [first, *self._others(first, limits), *self._uniform(mutations)]
        starts += [g for _ in range(RESTARTS) if (g := mutations[first.world].restart()) is not None]
        count, changes = len(self.judge.samples), mutations.__getitem__
        found = evolve(starts, self._fitness, changes, count, random, self.settings, self.judge.anchor)
        return found.best

    def _others(self, first: Genome, limits: Mapping[str, float]) -> list[Genome]:
        """What the other worlds have to offer."""
        found = [
            minimise(world, n, {SCORE: 1.0}, limits) for n, world in enumerate(self.table.worlds) if n != first.world
        ]
        return [genome for genome in found if genome is not None]

    def _uniform(self, mutations: list[Mutation]) -> list[Genome]:
        made = [world.uniform(bits, n) for n, world in enumerate(self.table.worlds) for bits in UNIFORM]
        return [genome for genome in made if genome is not None and mutations[genome.world].fits(genome)]

    def _fitness(self, genome: Genome, samples: Samples | None) -> float:
        return self.judge.score(genome, samples).mean

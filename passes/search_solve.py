"""table, budget -> genome: the least loss within size, latency and memory, or the least time within a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sylvester.compiler.budget import Budget, shown
from sylvester.compiler.errors import CompileError
from sylvester.compiler.genome import Genome
from sylvester.passes.search_milp import RISE, SCORE, minimise, nearest
from sylvester.passes.search_table import Place, Table, used

RESOURCES = ("size", "latency", "memory")
KL, PERPLEXITY = "max_kl", "max_perplexity_increase"
TIE = 1e-3
"""Of two aims the second decides only where the first is as good as equal."""
Limits = Mapping[str, float]


def solve(table: Table, budget: Budget) -> Genome:
    """The best genome by the table alone: losses of single changes are added up.

    `CompileError` when no genome keeps the budget, with the nearest one that there is.
    """
    found = within(table, limits_of(table, budget))
    if found is None:
        raise infeasible(table, budget)
    return found


def limits_of(table: Table, budget: Budget) -> dict[str, float]:
    """The budget as limits on the quantities of a table."""
    bounds = budget.bounds
    if "latency" in bounds and not table.timed:
        raise CompileError(
            f"{budget} bounds the time of a decode step, which cannot be measured here",
            hint="compile a causal language model for the cpu of this machine, or bound its size",
        )
    limits = {name: bounds[name] for name in RESOURCES if name in bounds}
    if KL in bounds:
        limits[SCORE] = bounds[KL]
    if PERPLEXITY in bounds:
        limits[RISE] = math.log1p(bounds[PERPLEXITY])
    return limits


def within(table: Table, limits: Limits) -> Genome | None:
    """Of all worlds: the least loss, or where only the loss is limited the least time, then size."""
    bounded = any(name in limits for name in RESOURCES)
    goal = {SCORE: 1.0} if bounded else aim(table)
    found = [minimise(world, n, goal, limits) for n, world in enumerate(table.worlds)]
    genomes = [genome for genome in found if genome is not None]

    def rank(genome: Genome) -> float:
        return table.loss(genome).score if bounded else weighed(table, genome)

    return min(genomes, key=rank, default=None)


def aim(table: Table) -> dict[str, float]:
    """What is made small where only the loss is limited: seconds and bytes as parts of what float takes."""
    world = table.worlds[0]
    most = [max(place.options, key=lambda option: option.bits) for place in places(table)]
    size = world.size + sum(option.size for option in most)
    seconds = world.seconds + sum(option.seconds for option in most)
    return {"latency": 1 / seconds, "size": TIE / size} if table.timed else {"size": 1 / size}


def places(table: Table) -> list[Place]:
    """All sites of the first world."""
    world = table.worlds[0]
    return [*world.outer, *(place for layer in world.layers for place in layer.places)]


def weighed(table: Table, genome: Genome) -> float:
    """How large `aim` is."""
    costs = used(table.costs(genome))
    return sum(weight * costs[name] for name, weight in aim(table).items())


def infeasible(table: Table, budget: Budget) -> CompileError:
    """What cannot be kept, and how near one can get."""
    limits = limits_of(table, budget)
    found = [nearest(world, n, limits) for n, world in enumerate(table.worlds)]
    genome = min(found, key=lambda pair: pair[1])[0]
    return missed(table, budget, genome, table.loss(genome).score, math.expm1(table.loss(genome).rise))


def missed(table: Table, budget: Budget, genome: Genome, kl: float, increase: float) -> CompileError:
    """An error that says which bounds a genome breaks and by how much; it is the nearest one known."""
    values = dict(used(table.costs(genome))) | {KL: kl, PERPLEXITY: increase}
    if not table.timed:
        del values["latency"]
    return broken(budget, values)


def broken(budget: Budget, values: Mapping[str, float]) -> CompileError:
    """The error for the nearest point there is, with `values` by field."""
    bounds = budget.bounds
    over = {name: values[name] for name, bound in bounds.items() if values.get(name, 0.0) > bound * (1 + 1e-9)}
    told = [f"{name} is bounded by {shown(name, bounds[name])}, needs {shown(name, v)}" for name, v in over.items()]
    point = ", ".join(f"{name} {shown(name, values[name])}" for name in (*RESOURCES, KL) if name in values)
    wider = ", ".join(f"{name}={shown(name, value)}" for name, value in over.items())
    return CompileError(
        f"no choice for the parts of the model keeps {budget}: {'; '.join(told)}; the nearest point has {point}",
        hint=f"give at least {wider}",
    )

"""The chosen model really rewritten, beside what was predicted; the Pareto front; facts for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sylvester.compiler import quality
from sylvester.compiler.genome import DROPPED, FLOAT, Genome
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import report
from sylvester.compiler.recipe import Machine
from sylvester.passes.search_costs import DECODE, alone, reference
from sylvester.passes.search_goal import UNIFORM, Goal
from sylvester.passes.search_milp import minimise
from sylvester.passes.search_solve import KL, PERPLEXITY
from sylvester.passes.search_table import used

POINTS = 8
"""Budgets of the front."""
CHEAPEST = 0.6
"""The least budget of the front, as a share of what the narrowest weights cost."""
NAMES = {FLOAT: "float", 16: "bf16", 8: "int8", 4: "int4", 3: "int3", DROPPED: "dropped"}
NOISE = 0.02
CLOSE = 0.1
"""Share by which a measured time may miss what was predicted."""


@dataclass
class Result:
    """`predicted` by the table and by the whole model unrewritten, `found` of what was built, by field of a budget.

    `over` has the bounds that are broken, as measured / bound. `drift`: how much longer the machine takes for the same
    step than when the table was made.
    """

    genome: Genome
    passes: tuple[Pass, ...]
    predicted: dict[str, float]
    found: dict[str, float]
    over: dict[str, float] = field(default_factory=dict)
    drift: float = 1.0
    seconds: float = 0.0

    @staticmethod
    def measured(
        goal: Goal, genome: Genome, passes: tuple[Pass, ...], program: Program, machine: Machine | None
    ) -> Result:
        report("rewrite and measure", 0, 1)
        loss = goal.judge.loss(genome)
        predicted = dict(used(goal.table.costs(genome))) | {KL: loss.score, PERPLEXITY: math.expm1(loss.rise)}
        made = Pipeline(passes, check=False)(program)
        compared = quality.compare(program, made, goal.judge.samples)
        drift = 1.0
        found = {KL: compared.kl, PERPLEXITY: compared.perplexity / compared.perplexity_before - 1}
        if machine is None or not goal.table.timed:
            found |= {"size": float(made.weights.nbytes)}
        else:
            footprint = machine.footprint(made)
            found |= {"size": float(footprint.size), "memory": float(footprint.running)}
            known = reference(goal.judge.worlds[0], program, goal.widths)
            steps = machine.steps([alone(made), known], DECODE, goal.table.context)
            found["latency"], drift = steps[0].seconds, steps[1].seconds / goal.table.reference
        over = _over(goal, found | ({"latency": found["latency"] / max(drift, 1.0)} if "latency" in found else {}))
        report("rewrite and measure", 1, 1)
        return Result(genome, passes, predicted, found, over, drift)


def _over(goal: Goal, found: Mapping[str, float]) -> dict[str, float]:
    """Measured as a share of its bound, for what is more; times may be off by `NOISE`."""
    shares = {name: found.get(name, 0.0) / bound for name, bound in goal.budget.bounds.items() if bound}
    return {name: share for name, share in shares.items() if share > 1 + (NOISE if name == "latency" else 0)}


def notes(goal: Goal, result: Result) -> tuple[str, ...]:
    """For the ledger."""
    chosen = ", ".join(map(str, result.passes))
    found, predicted = result.found, result.predicted
    told = [
        f"search: {goal.budget} is kept by {chosen}",
        f"search: KL {goal.table.loss(result.genome).score:.3g} by single changes, {predicted[KL]:.3g} of the whole "
        f"model, {found[KL]:.3g} after rewriting; perplexity {found[PERPLEXITY]:+.2%}",
        f"search: {predicted['size'] / 1e6:.3f} MB predicted, {found['size'] / 1e6:.3f} MB stored",
    ]
    told += [_timing(found["latency"], predicted["latency"], result.drift)] if "latency" in found else []
    told += [f"search: {name} is over its bound by {share - 1:.1%}" for name, share in result.over.items()]
    reused = f", {goal.judge.notebook.reused} known before" if goal.judge.notebook.reused else ""
    told.append(f"search: {goal.judge.evaluations} models scored{reused}, in {result.seconds:.0f} s")
    return tuple(told)


def _timing(found: float, predicted: float, drift: float) -> str:
    ratio = found / (predicted * drift) - 1
    off = f"{abs(ratio):.0%} {'more' if ratio > 0 else 'less'} than predicted"
    told = f"search: a step takes {found * 1e3:.4g} ms, predicted {predicted * 1e3:.4g} ms"
    told += f" when the machine took {1 / drift:.2f} of the time it takes now" if abs(drift - 1) > CLOSE / 2 else ""
    return f"{told}: {'as predicted' if abs(ratio) <= CLOSE else off}"


def facts(goal: Goal, result: Result) -> dict[str, object]:
    """The part of report.json about the search."""
    chosen = {
        "genome": str(result.genome),
        "predicted": result.predicted,
        "measured": result.found,
        "drift": result.drift,
        "by single changes": goal.table.loss(result.genome).score,
    }
    return {
        "budget": goal.budget.bounds,
        "front": front(goal, result),
        "chosen": chosen,
        "layers": layers(goal, result.genome),
        "seconds": result.seconds,
        "evaluations": goal.judge.evaluations,
        "table": goal.table.to_dict(),
    }


def layers(goal: Goal, genome: Genome) -> list[dict[str, str]]:
    """What each block became, by kind of part."""
    sites = goal.judge.worlds[genome.world].sites
    told = []
    for i, (group, bits, distance) in enumerate(zip(sites.inner, genome.parts, genome.shares, strict=True)):
        of = f" of {i - distance}" if distance else ""
        named = {site.kind: f"{NAMES[b]}{of}" for site, b in zip(group, bits, strict=True)}
        told.append({"layer": str(i), **named})
    return told


def front(goal: Goal, result: Result) -> list[dict[str, object]]:
    """The best genome of several budgets by the table, with the KL of the whole model; and the chosen one."""
    table = goal.table
    name = "latency" if table.timed and "size" not in goal.budget.bounds else "size"
    points = [_point(goal, result.genome, True)]
    made = [genome for bits in UNIFORM if (genome := table.worlds[0].uniform(bits, 0)) is not None]
    most, least = used(table.costs(made[0]))[name], used(table.costs(made[-1]))[name] * CHEAPEST
    for n in range(POINTS):
        report("front", n, POINTS)
        limit = least * (most / least) ** (n / (POINTS - 1))
        found = [minimise(world, w, {"score": 1.0}, {name: limit}) for w, world in enumerate(table.worlds)]
        genomes = [genome for genome in found if genome is not None]
        if genomes:
            points.append(_point(goal, min(genomes, key=lambda genome: table.loss(genome).score), False))
    return points


def _point(goal: Goal, genome: Genome, chosen: bool) -> dict[str, object]:
    costs = goal.table.costs(genome)
    return {
        "size": costs.size,
        "latency": costs.latency if goal.table.timed else None,
        "kl": goal.judge.loss(genome).score,
        "predicted": goal.table.loss(genome).score,
        "chosen": chosen,
    }

"""Losses of single changes, measured costs -> the table to be solved; kept on disk, found again for new budgets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError
from sylvester.compiler.genome import DROPPED, FLOAT, Site
from sylvester.compiler.notebook import KIND, digest
from sylvester.compiler.program import Program
from sylvester.compiler.recipe import Machine
from sylvester.compiler.store import store
from sylvester.passes.search_costs import DECODE, SiteCosts, measure
from sylvester.passes.search_judge import Judge, Losses, about, replace_one
from sylvester.passes.search_table import Layer, Loss, Option, Place, Table, WorldTable
from sylvester.passes.search_world import World

FILE = "table.json"
WORST = 1e3
"""The KL of a change that leaves no finite one."""


def make_table(
    judge: Judge, original: Program, machine: Machine | None, widths: Sequence[int], distance: int, context: int
) -> Table:
    """Measured now, or by an earlier run on the same machine with the same model and data."""
    timed_on = machine.identity() if machine is not None and DECODE in original.entries else ""
    key = digest([*about(judge.worlds, judge.samples), timed_on, repr((widths, distance, context))])
    kept = store(KIND)
    folder = kept.find(key) if kept.limit and knobs.REUSE.get() != "0" else None
    if folder is not None:
        with suppress(CompileError):
            return Table.load(folder / FILE)
        kept.drop(key)
    worlds: list[WorldTable] = []
    costs: list[SiteCosts] = []
    losses: Losses | None = None
    for number, world in enumerate(judge.worlds):
        losses = replace_one(judge, number, widths, distance, losses)
        costs.append(measure(world, original, machine, widths, context))
        worlds.append(_world(world, losses, costs[-1], widths, distance))
    seconds = float(costs[0].reference)
    table = Table(timed_on, bool(timed_on), judge.original().perplexity, context, seconds, tuple(worlds))
    if kept.limit and knobs.REUSE.get() != "0":
        with suppress(OSError):
            made = kept.workplace()
            table.save(made / FILE)
            kept.keep(key, made)
    return table


def _world(world: World, losses: Losses, costs: SiteCosts, widths: Sequence[int], distance: int) -> WorldTable:
    def place(block: int, number: int, site: Site) -> Place:
        at = (block, number)
        bits = [FLOAT, *(b for b in widths if world.weights.rounded(b) & set(site.keys))]
        options = [
            Option(
                b,
                *_loss(losses.get((*at, b)) if b != FLOAT else Loss(0.0, 0.0)),
                costs.size[at, b],
                float(costs.seconds.get((at, b), 0.0)),
                float(costs.state.get(at, 0.0)),
            )
            for b in bits
        ]
        if site.droppable:
            options.append(Option(DROPPED, *_loss(losses.get((*at, DROPPED))), 0.0, 0.0, 0.0))
        return Place(str(site), float(costs.private.get(at, 0.0)), tuple(options))

    outer = tuple(place(-1, n, site) for n, site in enumerate(world.sites.outer))
    layers = tuple(
        Layer(tuple(place(i, n, site) for n, site in enumerate(sites)), _shared(losses, i, distance))
        for i, sites in enumerate(world.sites.inner)
    )
    return WorldTable(
        world.name, float(costs.fixed_size), float(costs.fixed_seconds), float(costs.fixed_state), outer, layers
    )


def _shared(losses: Losses, block: int, distance: int) -> tuple[Loss, ...]:
    """What each further distance adds to what the blocks between lose by sharing with the same one."""
    found: list[Loss] = []
    for d in range(1, distance + 1):
        whole = losses.get((block, 0, -d))
        if whole is None:
            break
        before = losses.get((block - 1, 0, 1 - d)) if d > 1 else None
        score, rise = (0.0, 0.0) if before is None else (before.score, before.rise)
        found.append(Loss(*_loss(Loss(max(whole.score - score, 0.0), whole.rise - rise))))
    return tuple(found)


def _loss(found: Loss | None) -> tuple[float, float]:
    if found is None:
        return WORST, WORST
    return min(float(found.score), WORST), min(float(found.rise), WORST)

"""min sum_i KL(g with change i) - KL(g) over a few changes at once: the table again, measured around a genome g.

Single changes of the original say little of what they do to a model that has lost much already; those of the model at
hand do. A step takes as many changes as lower the loss of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sylvester.compiler.genome import FLOAT, Genome
from sylvester.compiler.progress import report
from sylvester.passes.search_evolve import with_bits
from sylvester.passes.search_milp import minimise
from sylvester.passes.search_table import Layer, Loss, Option, Place, Table, WorldTable

FEW = (0, 1)
"""Samples that changes are measured on; whole steps on all."""
MOST = 8
"""Changes of a step at most."""
Fitness = Callable[[Genome, tuple[int, ...] | None], float]


def descend(
    start: Genome,
    table: Table,
    fitness: Fitness,
    limits: Mapping[str, float],
    rounds: int,
    anchor: Callable[[Genome], object] = str,
) -> Genome:
    """A genome that is better than `start` and keeps the limits, or `start`; `anchor` hears what is changed."""
    best, loss, most = start, fitness(start, None), MOST
    for number in range(rounds if loss > 0 else 0):
        anchor(best)
        world = _Around(best, table, fitness, number, rounds).table()
        while most:
            found = minimise(world, best.world, {"score": 1.0}, limits, near=(best, most))
            if found is None or found == best:
                return best
            after = fitness(found, None)
            if after < loss:
                best, loss = found, after
                break
            most //= 2
    return best


class _Around:
    """The table of a world with the loss of single changes of one genome."""

    def __init__(self, genome: Genome, table: Table, fitness: Fitness, number: int, rounds: int) -> None:
        self.genome, self.world, self.fitness = genome, table.world(genome), fitness
        self.stage = f"change the best model, round {number + 1} of {rounds}"
        self.base = fitness(genome, FEW)
        shared = [i for i, distance in enumerate(genome.shares) if distance]
        self.fixed = {i - d for i in shared for d in range(genome.shares[i] + 1)}
        """Blocks that share, and those in between: they stay as they are."""

    def table(self) -> WorldTable:
        world = self.world
        outer = tuple(self._place(-1, n, place) for n, place in enumerate(world.outer))
        layers = []
        for i, layer in enumerate(world.layers):
            report(self.stage, i, len(world.layers))
            places = tuple(self._place(i, n, place) for n, place in enumerate(layer.places))
            layers.append(Layer(places, (Loss(0.0, 0.0),) * self.genome.shares[i]))
        return WorldTable(world.name, world.size, world.seconds, world.state, outer, tuple(layers))

    def _place(self, block: int, number: int, place: Place) -> Place:
        now = self.genome.outer[number] if block < 0 else self.genome.parts[block][number]
        return Place(place.name, place.private, tuple(self._options(block, number, place.options, now)))

    def _options(self, block: int, number: int, options: Sequence[Option], now: int) -> list[Option]:
        found = []
        for option in options:
            if option.bits == now:
                found.append(self._scored(option, 0.0))
            elif block not in self.fixed and option.bits != FLOAT:
                changed = with_bits(self.genome, block, number, option.bits)
                found.append(self._scored(option, self.fitness(changed, FEW) - self.base))
        return found

    def _scored(self, option: Option, score: float) -> Option:
        return Option(option.bits, score, 0.0, option.size, option.seconds, option.state)

"""(1 + lambda): level switches that keep the budget, best offspring chosen on more and more tokens (EvoPress).

Sieberling et al. 2024. The parent takes part in the last stage only, on tokens that stay the same, so that the best
never gets worse; what sums of single changes miss is seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

from sylvester.compiler.genome import DROPPED, Genome
from sylvester.compiler.progress import report
from sylvester.passes.search_table import Place, Table, used

Samples = tuple[int, ...]
Fitness = Callable[[Genome, Samples | None], float]
"""Loss on some of the samples, or on all that the last stage uses."""
MOST_SWITCHES, MOST_CHANGES, TRIES = 3, 10, 400
UNTOUCHED = 3
"""Leading blocks that restarts and switches never drop from; nor from the last (28 published configurations)."""
NEXT = 0.7
"""How often a level moves by one step rather than anywhere."""
STAGES = ((1, 4), (3, 1))
"""Samples of a stage, and how many genomes go on."""


@dataclass(frozen=True)
class Site:
    """Where a genome has bits: outside (block -1) or in a block."""

    block: int
    number: int
    place: Place


@dataclass
class Mutation:
    """Random changes of genomes of one world that stay within the limits."""

    table: Table
    world: int
    limits: dict[str, float]
    random: Random
    sites: list[Site] = field(init=False)

    def __post_init__(self) -> None:
        made = self.table.worlds[self.world]
        self.sites = [Site(-1, n, place) for n, place in enumerate(made.outer)]
        for i, layer in enumerate(made.layers):
            self.sites += [Site(i, n, place) for n, place in enumerate(layer.places)]

    def fits(self, genome: Genome) -> bool:
        costs = used(self.table.costs(genome))
        return all(costs[name] <= limit for name, limit in self.limits.items())

    def offspring(self, parent: Genome) -> Genome | None:
        """The parent with one to three levels raised or shares switched, and others lowered until it fits."""
        switches = min(self.random.randint(1, MOST_SWITCHES), self.random.randint(1, MOST_SWITCHES))
        genome = parent
        for _ in range(switches):
            genome = self._share(genome) if self.random.random() < 0.1 else self._moved(genome, up=True)
        return self._fitting(genome)

    def restart(self) -> Genome | None:
        """A random genome that fits."""
        made = self.table.worlds[self.world]
        outer = tuple(self.random.choice(place.options).bits for place in made.outer)
        parts = tuple(
            tuple(self.random.choice(self._levels(Site(i, n, place))) for n, place in enumerate(layer.places))
            for i, layer in enumerate(made.layers)
        )
        return self._fitting(Genome(outer, parts, (0,) * len(parts), self.world), most=TRIES)

    def _fitting(self, genome: Genome, most: int = MOST_CHANGES) -> Genome | None:
        for _ in range(most):
            if self.fits(genome):
                return genome
            genome = self._moved(genome, up=False)
        return genome if self.fits(genome) else None

    def _moved(self, genome: Genome, up: bool) -> Genome:
        """One level of one site up or down, to the next or to any."""
        site = self.random.choice(self.sites)
        if site.block >= 0 and genome.shares[site.block]:
            return genome
        now = bits_of(genome, site)
        levels = [b for b in self._levels(site) if (b > now if up else b < now)]
        if not levels:
            return genome
        near = self.random.random() < NEXT
        wanted = (min(levels) if up else max(levels)) if near else self.random.choice(levels)
        if wanted == DROPPED and self._read(genome, site.block):
            return genome
        return with_bits(genome, site.block, site.number, wanted)

    def _levels(self, site: Site) -> list[int]:
        """Bits that a site may have, in order."""
        last = len(self.table.worlds[self.world].layers) - 1
        kept = site.block < UNTOUCHED or site.block == last
        return sorted(o.bits for o in site.place.options if not (kept and o.bits == DROPPED))

    def _share(self, genome: Genome) -> Genome:
        """A block begins to read the matrices before it, or has its own again."""
        block = self.random.randrange(len(genome.shares))
        if genome.shares[block]:
            return self._alone(genome, block)
        distance = genome.shares[block - 1] + 1
        layer = self.table.worlds[self.world].layers[block]
        if distance > len(layer.shared) or DROPPED in genome.parts[block - 1] or self._read(genome, block):
            return genome
        shares = (*genome.shares[:block], distance, *genome.shares[block + 1 :])
        return Genome(genome.outer, genome.parts, shares, genome.world).normal()

    def _alone(self, genome: Genome, block: int) -> Genome:
        shares = (*genome.shares[:block], 0, *genome.shares[block + 1 :])
        return genome if self._read(genome, block) else Genome(genome.outer, genome.parts, shares, genome.world)

    def _read(self, genome: Genome, block: int) -> bool:
        """Whether the next block reads the matrices of this one, or of the one that it reads."""
        after = genome.shares[block + 1 : block + 2]
        return block >= 0 and bool(after and after[0])


def bits_of(genome: Genome, site: Site) -> int:
    return genome.outer[site.number] if site.block < 0 else genome.parts[site.block][site.number]


def with_bits(genome: Genome, block: int, number: int, bits: int) -> Genome:
    """Other bits at a site, and in the blocks that share it."""

    def changed(found: Sequence[int]) -> tuple[int, ...]:
        return (*found[:number], bits, *found[number + 1 :])

    if block < 0:
        return Genome(changed(genome.outer), genome.parts, genome.shares, genome.world)
    parts = (*genome.parts[:block], changed(genome.parts[block]), *genome.parts[block + 1 :])
    return Genome(genome.outer, parts, genome.shares, genome.world).normal()


@dataclass(frozen=True)
class Settings:
    """`seconds` None: until the generations are done. `rounds` of `search_descend` come first."""

    generations: int = 20
    offspring: int = 16
    seconds: float | None = None
    rounds: int = 2


@dataclass
class Evolution:
    """The best genome so far with its loss on the last stage, and the history of these losses."""

    best: Genome
    loss: float
    history: list[float] = field(default_factory=list)


def evolve(
    starts: Sequence[Genome],
    fitness: Fitness,
    mutation: Callable[[int], Mutation],
    samples: int,
    random: Random,
    settings: Settings,
    anchor: Callable[[Genome], object] = str,
) -> Evolution:
    """From the best of some genomes on; `mutation` gives the changes of a world, `anchor` hears what they change."""
    began = perf_counter()
    losses = {genome: fitness(genome, None) for genome in dict.fromkeys(starts)}
    best = min(losses, key=lambda genome: (losses[genome], str(genome)))
    found = Evolution(best, losses[best], [losses[best]])
    seen = {str(genome) for genome in losses}
    for generation in range(settings.generations):
        if found.loss <= 0 or (settings.seconds is not None and perf_counter() - began > settings.seconds):
            break
        anchor(found.best)
        report(f"evolve, best KL {found.loss:.4g}", generation, settings.generations)
        children = _children(found.best, mutation(found.best.world), seen, settings.offspring)
        for count, kept in STAGES:
            subset = tuple(sorted(random.sample(range(samples), min(count, samples))))
            children = sorted(children, key=lambda child: (fitness(child, subset), str(child)))[:kept]
        for child in children:
            loss = fitness(child, None)
            if loss < found.loss:
                found.best, found.loss = child, loss
        found.history.append(found.loss)
    return found


def _children(parent: Genome, mutation: Mutation, seen: set[str], wanted: int) -> list[Genome]:
    """New genomes only; fewer where there are no more."""
    children: list[Genome] = []
    for _ in range(TRIES):
        if len(children) == wanted:
            break
        child = mutation.offspring(parent)
        if child is not None and str(child) not in seen:
            seen.add(str(child))
            children.append(child)
    return children

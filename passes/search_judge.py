"""genome -> KL of the whole model on calibration data, each measured once: kept on disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from sylvester.compiler.calibration import Sample
from sylvester.compiler.compile_cache import own_code
from sylvester.compiler.divergence import Score
from sylvester.compiler.finished import samples_sum, tensor_sum
from sylvester.compiler.genome import Genome
from sylvester.compiler.notebook import Notebook
from sylvester.compiler.program import Program, binding
from sylvester.compiler.progress import report
from sylvester.compiler.supernet import Supernet
from sylvester.passes.search_evolve import with_bits
from sylvester.passes.search_table import Loss
from sylvester.passes.search_world import World

WIDEST = 16
"""Weights of so many bits lose so little that one run of all of them says what each loses."""


class Judge:
    """Scores genomes of several worlds against the first one as it is."""

    def __init__(self, worlds: Sequence[World], samples: Sequence[Sample]) -> None:
        self.worlds, self.samples = worlds, samples
        self.notebook = Notebook(about(worlds, samples))
        self.evaluations = 0
        self._nets: dict[int, Supernet] = {}

    def score(self, genome: Genome, samples: Sequence[int] | None = None) -> Score:
        """On all samples or some of them."""
        name = str(genome) if samples is None else f"{genome} @{','.join(map(str, samples))}"
        found = self.notebook.get(name)
        if found is None:
            score = self._net(genome.world).score(genome, samples)
            self.evaluations += 1
            found = self.notebook.put(name, score.kl, score.surprise, score.positions)
        return Score(found[0], found[1], int(found[2]))

    def anchor(self, genome: Genome) -> None:
        """Genomes that begin like this one are to come."""
        if genome.world in self._nets:
            self._nets[genome.world].anchor(genome)

    def original(self) -> Score:
        """The model as it is."""
        return self.score(self.worlds[0].sites.genome())

    def loss(self, genome: Genome) -> Loss:
        """KL, and the rise of the mean -log p."""
        score, original = self.score(genome), self.original()
        return Loss(score.mean, (score.surprise - original.surprise) / max(score.positions, 1))

    def _net(self, number: int) -> Supernet:
        if number not in self._nets:
            world = self.worlds[number]
            net = Supernet(world.program, world.sites, world.weights, self.samples)
            net.refer(self._net(0).references if number else None)
            self._nets[number] = net
        return self._nets[number]


def about(worlds: Sequence[World], samples: Sequence[Sample]) -> Iterable[str]:
    """All that decides a score besides the genome."""
    yield from (own_code(), torch.__version__, samples_sum(samples))
    for world in worlds:
        yield from (world.name, str(world.passes), str(world.program.main.graph), _fitted(world.program))
        yield str([(node.name, node.meta["bind"]) for node in world.program.main.placeholders()])
        keys = dict.fromkeys(binding(node).key for node in world.program.main.placeholders("weight"))
        yield from (tensor_sum(world.program.weights[key]) for key in keys)


def _fitted(program: Program) -> str:
    return samples_sum(program.calibration.fit) if program.calibration else ""


Losses = dict[tuple[int, int, int], Loss]
"""Block (-1: outside), number of the site, bits (negative: distance of the block whose matrices are read) -> loss."""


def replace_one(judge: Judge, number: int, widths: Sequence[int], distance: int, same: Losses | None) -> Losses:
    """The loss of every single change in a world, block after block; `same` has those of dropped parts already."""
    world = judge.worlds[number]
    base = world.sites.genome(world=number)
    wanted = [(at, genome) for at, genome in _changes(world, base, widths, distance) if not (same and at[2] == 0)]
    found: Losses = {at: loss for at, loss in (same or {}).items() if at[2] == 0}
    judge.anchor(base)
    least = float("inf")
    for done, (at, genome) in enumerate(wanted):
        best = f", least KL {least:.2g}" if done else ""
        report(f"score layers of the {world.name} model{best}", done, len(wanted))
        found[at] = judge.loss(genome)
        least = min(least, found[at].score)
    return found | _widest(judge, base, widths)


def _changes(
    world: World, base: Genome, widths: Sequence[int], distance: int
) -> Iterable[tuple[tuple[int, int, int], Genome]]:
    narrow = [bits for bits in widths if bits < WIDEST]
    for n, site in enumerate(world.sites.outer):
        for bits in narrow:
            if world.weights.rounded(bits) & set(site.keys):
                yield (-1, n, bits), with_bits(base, -1, n, bits)
    for i, sites in enumerate(world.sites.inner):
        for n, site in enumerate(sites):
            levels = [bits for bits in narrow if world.weights.rounded(bits) & set(site.keys)]
            for bits in [*levels, *([0] if site.droppable else [])]:
                yield (i, n, bits), with_bits(base, i, n, bits)
        for d in range(1, distance + 1):
            if world.sites.shareable(i, d):
                shares = tuple(d if j == i else j - i + d if i - d < j < i else 0 for j in range(len(base.shares)))
                yield (i, 0, -d), Genome(base.outer, base.parts, shares, base.world)


def _widest(judge: Judge, base: Genome, widths: Sequence[int]) -> Losses:
    """The loss of all sites at `WIDEST` bits, shared out evenly."""
    if WIDEST not in widths:
        return {}
    sites = judge.worlds[base.world].sites
    everywhere = sites.genome(WIDEST, base.world)
    whole, count = judge.loss(everywhere), len(list(sites))
    each = Loss(max(whole.score, 0.0) / count, whole.rise / count)
    places = [(site.block, n) for group in (sites.outer, *sites.inner) for n, site in enumerate(group)]
    return {(block, n, WIDEST): each for block, n in places}

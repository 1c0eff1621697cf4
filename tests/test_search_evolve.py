"""The evolutionary search: mutations keep the budget, the best never gets worse, and simple optima are found."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from sylvester.compiler.budget import Budget
from sylvester.compiler.genome import DROPPED
from sylvester.passes.search_descend import descend
from sylvester.passes.search_evolve import UNTOUCHED, Mutation, Settings, evolve
from sylvester.passes.search_solve import solve
from sylvester.passes.search_table import used
from tests.searching import every_genome, toy

BITS = (32, 8, 4, 0)


def mutation(table, limits, seed=0):
    return Mutation(table, 0, limits, Random(seed))


def test_ten_thousand_mutations_keep_the_budget_and_the_rules():
    table = toy(8, 1, bits=BITS)
    limits = {"size": 700.0, "latency": 6.0}
    legal = set()
    step = mutation(table, limits)
    genome = solve(table, Budget(**limits))
    for _ in range(10_000):
        child = step.offspring(genome)
        if child is None:
            continue
        costs = used(table.costs(child))
        assert all(costs[name] <= limit for name, limit in limits.items())
        for i, d in enumerate(child.shares):
            assert not d or (child.parts[i] == child.parts[i - 1] and DROPPED not in child.parts[i])
        legal.add(str(child))
        genome = child
    assert len(legal) > 1000


def test_first_and_last_blocks_are_not_dropped_by_chance():
    step = mutation(toy(6, 0, bits=BITS), {"size": 500.0})
    found = [genome for _ in range(50) if (genome := step.restart()) is not None]
    assert found
    assert all(DROPPED not in genome.parts[i] for genome in found for i in (*range(UNTOUCHED), 5))
    assert any(DROPPED in genome.parts[i] for genome in found for i in (3, 4))


def search(table, fitness, limits, generations=60, seed=0):
    random = Random(seed)
    step = Mutation(table, 0, limits, random)
    starts = [genome for _ in range(8) if (genome := step.restart()) is not None]
    return evolve(starts, fitness, lambda _: step, 8, random, Settings(generations, 24))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_of_a_separable_loss_is_found(seed):
    table = toy(3, 4, bits=(32, 8, 4), share=False)
    limits = {"size": 500.0}
    legal = [g for g in every_genome(table) if table.costs(g).size <= 500]
    found = search(table, lambda genome, _: table.loss(genome).score, limits, seed=seed)
    assert found.loss == pytest.approx(min(table.loss(g).score for g in legal))


def noisy(table):
    """A loss whose early stages mislead."""
    return lambda genome, samples: table.loss(genome).score + (0 if samples is None else Random(str(genome)).random())


def test_the_best_never_gets_worse_and_a_seed_repeats_it():
    table = toy(6, 2, bits=BITS)
    runs = [search(table, noisy(table), {"latency": 5.0}, generations=15) for _ in range(2)]
    assert runs[0].history == runs[1].history
    assert runs[0].best == runs[1].best
    assert runs[0].history == sorted(runs[0].history, reverse=True)
    assert runs[0].history[-1] < runs[0].history[0]


def test_no_genome_is_scored_twice_on_the_same_samples():
    table, seen = toy(5, 2, bits=BITS), []

    def fitness(genome, samples):
        seen.append((str(genome), samples))
        return table.loss(genome).score

    search(table, fitness, {"size": 600.0}, generations=10)
    assert len(seen) == len(set(seen))


def coupled(table):
    """Neighbouring dropped parts lose more than the sum of both, which single changes do not show."""

    def fitness(genome, _):
        gone = [DROPPED in parts for parts in genome.parts]
        pairs = sum(a and b for a, b in pairwise(gone))
        return table.loss(genome).score + 2.0 * pairs

    return fitness


def test_changes_to_the_model_at_hand_lower_a_loss_that_is_no_sum():
    table = toy(8, 6, bits=BITS, share=False)
    limits = {"latency": 3.4}
    start, fitness = solve(table, Budget(**limits)), coupled(table)
    found = descend(start, table, fitness, limits, 4)
    assert fitness(found, None) < fitness(start, None)
    assert table.costs(found).latency <= 3.4
    assert descend(start, table, fitness, limits, 0) == start
    # Where losses do add up there is nothing to gain.
    assert descend(start, table, lambda g, _: table.loss(g).score, limits, 2) == start


def test_blocks_that_share_stay_as_they_are():
    table = toy(5, 3, bits=(32, 8))
    start = solve(table, Budget(size=620))
    assert any(start.shares)
    found = descend(start, table, lambda g, _: table.loss(g).score, {"size": 620.0}, 2)
    assert found.shares == start.shares


def test_time_ends_it():
    table = toy(5, 2, bits=BITS)
    random = Random(0)
    step = Mutation(table, 0, {"size": 600.0}, random)
    start = step.restart()
    found = evolve([start], lambda g, _: table.loss(g).score, lambda _: step, 8, random, Settings(50, 8, seconds=0.0))
    assert found.best == start
    assert len(found.history) == 1

"""The table of a search: the programme finds what enumeration finds, and says what it cannot keep."""

from __future__ import annotations

import json
import sys
import time

import pytest

import sylvester as sv
from sylvester.compiler.budget import Budget
from sylvester.compiler.genome import Genome
from sylvester.passes.search_solve import solve
from sylvester.passes.search_table import Table, used
from tests.searching import every_genome, toy


def values(table, genome):
    loss = table.loss(genome)
    return {**used(table.costs(genome)), "max_kl": loss.score}


def kept(table, bounds):
    found = ((genome, values(table, genome)) for genome in every_genome(table))
    return [(g, v) for g, v in found if all(v[name] <= bound * (1 + 1e-9) for name, bound in bounds.items())]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "bounds",
    [{"size": 450}, {"latency": 3.5}, {"memory": 500}, {"size": 500, "latency": 3.6}, {"size": 700, "max_kl": 4.0}],
)
def test_the_least_loss_is_that_of_enumeration(bounds, seed):
    table = toy(3, seed)
    expected = min(v["max_kl"] for _, v in kept(table, bounds))
    found = solve(table, Budget(**bounds))
    assert table.loss(found).score == pytest.approx(expected, rel=1e-5)
    assert found in {genome for genome, _ in kept(table, bounds)}


def test_six_layers_of_four_variants():
    table = toy(6, 3, bits=(32, 8, 4, 0), share=False)
    thin = Table("", True, 10.0, 128, 1.0, (_one_site(table.worlds[0]),))
    for size in (150, 250, 400):
        found = solve(thin, Budget(size=size))
        assert table_score(thin, found) == pytest.approx(
            min(v["max_kl"] for _, v in kept(thin, {"size": size})), rel=1e-5
        )


def _one_site(world):
    layers = tuple(type(layer)(layer.places[:1], ()) for layer in world.layers)
    return type(world)(world.name, world.size, world.seconds, world.state, (), layers)


def table_score(table, genome):
    return table.loss(genome).score


@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_where_only_the_loss_is_bounded_time_is_least(bound):
    table = toy(3, 1)
    expected = min(v["latency"] for _, v in kept(table, {"max_kl": bound}))
    assert values(table, solve(table, Budget(max_kl=bound)))["latency"] == pytest.approx(expected)


def test_perplexity_bounds_the_sum_of_rises():
    table = toy(3, 1)
    found = solve(table, Budget(max_perplexity_increase="100%", size=10_000))
    assert table.loss(found).rise == 0
    found = solve(table, Budget(max_perplexity_increase="100%"))
    assert 0 < table.loss(found).rise <= 0.6932


def test_more_budget_is_never_worse():
    table = toy(4, 5)
    losses = [table_score(table, solve(table, Budget(size=size))) for size in range(300, 900, 60)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_sharing_is_chosen_when_it_loses_least():
    table = toy(3, 0, bits=(32,))
    found = solve(table, Budget(size=620))
    assert sum(found.shares) > 0
    assert all(found.parts[i] == found.parts[i - d] for i, d in enumerate(found.shares))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"size": 60}, ["size is bounded by 60 B, needs 84 B", "the nearest point has size 84 B", "size=84 B"]),
        ({"latency": "1ms"}, ["latency is bounded by 1 ms, needs 2250 ms"]),
        ({"size": 150, "max_kl": 1.0}, ["max_kl", "nearest point"]),
    ],
)
def test_an_impossible_budget_names_the_bound_and_the_nearest_point(bounds, words):
    with pytest.raises(sv.CompileError) as caught:
        solve(toy(3, 0), Budget(**bounds))
    said = "\n".join([str(caught.value), *caught.value.__notes__])
    assert all(word in said for word in words), said


def test_a_latency_cannot_be_kept_without_times():
    table = toy(2)
    untimed = Table("", False, 10.0, 128, 1.0, table.worlds)
    with pytest.raises(sv.CompileError, match="cannot be measured here"):
        solve(untimed, Budget(latency=1.0))
    assert solve(untimed, Budget(max_kl=0.5)).parts


def test_a_table_is_saved_and_solved_again_at_once(tmp_path):
    table = toy(8, 2, bits=(32, 16, 8, 4, 3, 0))
    table.save(tmp_path / "table.json")
    (tmp_path / "report.json").write_text(json.dumps({"search": {"table": table.to_dict()}}))
    start = time.perf_counter()
    loaded = Table.load(tmp_path / "table.json")
    found = solve(loaded, Budget(size=700))
    assert time.perf_counter() - start < 5
    assert loaded == table == Table.load(tmp_path / "report.json")
    assert table.costs(found).size <= 700


@pytest.mark.parametrize(("text", "word"), [("[", "JSON"), ('{"ledger": 1}', "ledger"), ('{"search": {}}', "table")])
def test_what_is_no_table_is_an_error(tmp_path, text, word):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(sv.CompileError, match="cannot read the table") as caught:
        Table.load(tmp_path / "a.json")
    assert word in str(caught.value)
    with pytest.raises(sv.CompileError, match="No such file"):
        Table.load(tmp_path / "b.json")


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(sv.CompileError, match="scipy") as caught:
        solve(toy(2), Budget(size=500))
    assert caught.value.hint == "pip install 'sylvester[search]'"


def test_a_genome_is_its_text():
    genome = Genome((8,), ((32, 4), (32, 4), (0, 3)), (0, 1, 0))
    assert str(genome) == "0|8|32.4 <1 0.3"
    assert Genome.parse(str(genome)) == genome
    assert Genome.parse("1||8.8") == Genome((), ((8, 8),), (0,), 1)

"""Budgets end to end: what is chosen keeps them, what was measured is used again, what cannot be kept is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

import sylvester as sv
from sylvester.backends.cpu import Cpu
from sylvester.compiler import compile_cache, knobs
from sylvester.compiler.budget import Budget
from sylvester.compiler.genome import DROPPED, FLOAT, Genome
from sylvester.compiler.layers import find_layers
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.progress import watching
from sylvester.compiler.recipe import Footprint, Machine, Step
from sylvester.compiler.supernet import Supernet
from sylvester.compiler.target import Target
from sylvester.passes.quantize import Quantize
from sylvester.passes.search import Search
from sylvester.passes.search_costs import measure
from sylvester.passes.search_judge import Judge
from sylvester.passes.search_make import make_table
from sylvester.passes.search_world import SHORT, World
from tests import zoo
from tests.searching import language_model, own_text

FEW = {"tokens": 46, "generations": 2, "offspring": 4}
SECONDS = {"linear_w8": 2e-3, "linear_w4": 1e-3, "linear": 8e-3}
FIXED, PER_ROPE = 5e-3, 1e-4


class Fake(Machine):
    """Layers take what their width says, a call something more; bytes are those of the program."""

    def identity(self):
        return "fake"

    def linears(self, shapes, bits):
        raise NotImplementedError

    def steps(self, programs, entry, length):
        return [self._step(program.entries[entry]) for program in programs]

    def _step(self, entry):
        kernels = []
        for node in entry.calls():
            name = str(node.target).split(".")[-2].removeprefix("sylvester::")
            seconds = SECONDS.get(name, PER_ROPE if name == "rope" else 0.0)
            if seconds:
                kernels.append(((node.name,), seconds))
        return Step(FIXED + sum(seconds for _, seconds in kernels), tuple(kernels))

    def footprint(self, program):
        stored = {(key,): tensor.nbytes for key, tensor in program.weights.items()}
        state = 1000 * len(program.state)
        return Footprint(stored, sum(stored.values()) + state + 7, state)


def names(program):
    return [str(site) for site in World.of(program, "plain", ()).sites]


@pytest.fixture(scope="module")
def program():
    return language_model()


def expand(program, machine=None, widths=(8,), **options):
    budget = Budget(**options)
    return Search(budget=budget, widths=widths, **FEW).expand(program, machine)


def test_a_size_is_kept_and_the_report_says_how(program):
    bytes_of_float = program.weights.nbytes
    case = zoo.case("llama-tied")
    search = Search(budget=Budget(size=bytes_of_float / 4.5), widths=(8, 4), **FEW)
    data = list(own_text("llama-tied", 4, 24))
    with sv.compile(case.model, case.inputs, target="reference", passes=[search], calibration=data) as compiled:
        report = compiled.report
    found = report["search"]
    assert found["chosen"]["measured"]["size"] == found["chosen"]["predicted"]["size"] <= bytes_of_float / 4.5
    assert found["chosen"]["measured"]["max_kl"] == pytest.approx(found["chosen"]["predicted"]["max_kl"], rel=0.3)
    assert [layer["layer"] for layer in found["layers"]] == ["0", "1", "2", "3"]
    assert sum(point["chosen"] for point in found["front"]) == 1
    assert all(point["latency"] is None and point["kl"] >= 0 for point in found["front"])
    assert any(note.startswith("search: budget(size=") for note in report["ledger"]["notes"])
    rows = report["ledger"]["rows"]
    assert rows[-1]["after"]["parameter_bytes"] == found["chosen"]["measured"]["size"]


def test_a_budget_given_to_compile_is_searched_after_the_passes(monkeypatch):
    case, seen = zoo.case("llama-tied"), []
    monkeypatch.setattr(Search, "expand", lambda self, *_: seen.append(self.budget) or _stop())
    with pytest.raises(KeyboardInterrupt):
        sv.compile(case.model, case.inputs, budget="size=40kB", calibration=list(own_text("llama-tied", 4, 24)))
    assert seen == [Budget(size=40_000)]


def test_the_budget_decides_what_is_reused(kept):
    def key(size):
        return compile_cache.key(Path(__file__), None, None, Target(), [Search(budget=Budget(size=size))], Cpu())

    assert key(1).text != key(2).text
    assert key(1).text == key(1).text != ""


def test_what_is_rounded_already_is_left_alone(program):
    rounded = Pipeline((Quantize(8, per_layer={"*.mlp.*": "float", "*embed*": "float"}),), check=False)(program)
    found = expand(rounded, size=rounded.weights.nbytes / 2).facts["search"]
    assert found["chosen"]["measured"]["size"] <= rounded.weights.nbytes / 2
    assert {layer["attention"] for layer in found["layers"]} <= {"float", "dropped"}


def _stop():
    raise KeyboardInterrupt


def test_only_the_loss_bounded_the_cheapest_is_taken(program):
    loose, tight = (expand(program, max_kl=bound).facts["search"]["chosen"] for bound in (0.05, 0.001))
    assert loose["measured"]["max_kl"] <= 0.05
    assert tight["measured"]["max_kl"] <= 0.001
    assert loose["measured"]["size"] < tight["measured"]["size"] < program.weights.nbytes


def test_perplexity_is_bounded_on_whole_models(program):
    found = expand(program, max_perplexity_increase="1%").facts["search"]["chosen"]
    assert found["measured"]["max_perplexity_increase"] <= 0.01
    assert found["measured"]["size"] < program.weights.nbytes


def test_costs_are_those_of_the_machine(program):
    world = World.of(program, "plain", ())
    costs = measure(world, program, Fake(), (8, 4), 16)
    assert costs.fixed_seconds == pytest.approx(FIXED)
    # Four layers of attention and two ropes; three of the FFN; one head.
    for at, count, more in (((2, 0), 4, 2 * PER_ROPE), ((1, 1), 3, 0.0), ((-1, 0), 1, 0.0)):
        for bits, name in ((FLOAT, "linear"), (8, "linear_w8"), (4, "linear_w4")):
            assert costs.seconds[at, bits] == pytest.approx(count * SECONDS[name] + more)
    # Per layer a cache of keys and one of values.
    assert costs.state[0, 0] == 2000
    assert costs.state[0, 1] == 0
    assert costs.fixed_state == 7
    table = make_table(Judge([world], program.calibration.fit), program, Fake(), (8, 4), 1, 16)
    for genome in (world.sites.genome(8), Genome((FLOAT,), ((8, 0), (0, 4), (FLOAT, 8), (8, 8)), (0, 0, 0, 0))):
        made = Pipeline(world.realise(genome, "rtn"), check=False)(program)
        found, known = table.costs(genome), Fake().footprint(made)
        assert found.size == known.size
        assert found.memory == known.running
        assert found.latency == pytest.approx(Fake()._step(made.entries["decode"]).seconds)


def test_a_latency_is_kept(program):
    expansion = expand(program, Fake(), latency=0.1)
    found = expansion.facts["search"]["chosen"]
    assert found["measured"]["latency"] <= 0.1
    assert found["measured"]["latency"] == pytest.approx(found["predicted"]["latency"])
    assert any("as predicted" in note for note in expansion.notes)


def test_dropped_parts_and_nothing_else_are_missing(program):
    expansion = expand(program, Fake(), latency=0.12, widths=())
    genome = Genome.parse(expansion.facts["search"]["chosen"]["genome"])
    gone = {(i, n) for i, parts in enumerate(genome.parts) for n, bits in enumerate(parts) if bits == DROPPED}
    made = Pipeline(tuple(step for step in expansion.passes if step not in SHORT), check=False)(program)
    kinds = [kind for layer in find_layers(made) for kind in dict.fromkeys(part.kind for part, _ in layer.main.parts)]
    assert gone
    assert kinds.count("attention") == 4 - sum(n == 0 for _, n in gone)
    assert kinds.count("ffn") == 4 - sum(n == 1 for _, n in gone)
    assert len(made.state) == 2 * kinds.count("attention")


def test_dropping_loses_no_more_than_simple_rules(program):
    """As many attention and FFN parts dropped: first ones, last ones, every other, by similarity of the stream."""
    search = Search(budget=Budget(latency=0.12), widths=(), tokens=96, generations=4, offspring=8)
    found = search.expand(program, Fake()).facts["search"]
    world = World.of(program, "plain", ())
    judge = Judge([world], program.calibration.fit)
    latency = found["chosen"]["predicted"]["latency"]
    limit = Fake()._step(program.entries["decode"]).seconds - latency
    simple = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 1, 0, 3)):
        base = world.sites.genome()
        parts, saved = [list(bits) for bits in base.parts], 0.0
        for i in order:
            if saved < limit:
                parts[i] = [DROPPED, DROPPED]
                saved += 7 * SECONDS["linear"]
        simple.append(judge.score(Genome(base.outer, tuple(map(tuple, parts)), base.shares)).mean)
    assert found["chosen"]["predicted"]["max_kl"] <= min(simple)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache folder of its own, in use; and the number of models that are scored."""
    monkeypatch.setenv(knobs.REUSE.name, "1")
    monkeypatch.setenv(knobs.CACHE.name, str(tmp_path))
    scored = []
    score = Supernet.score
    monkeypatch.setattr(
        Supernet, "score", lambda self, genome, *a: scored.append(str(genome)) or score(self, genome, *a)
    )
    return scored


def test_another_budget_scores_no_single_change_again(program, kept):
    first = expand(program, size=140_000)
    singles = len(kept)
    kept.clear()
    second = expand(program, size=100_000)
    assert second.facts["search"]["table"] == first.facts["search"]["table"]
    assert len(kept) < singles / 2
    assert "known before" in second.notes[-1]


def test_interrupted_scoring_goes_on_where_it_was(program, kept):
    def interrupt(stage, done, total):
        if stage.startswith("score layers") and done == 6:
            raise KeyboardInterrupt

    with watching(interrupt), pytest.raises(KeyboardInterrupt):
        expand(program, size=140_000)
    before = set(kept)
    kept.clear()
    expand(program, size=140_000)
    assert len(before) >= 6
    assert not before & set(kept)


def test_the_same_seed_chooses_the_same(program):
    runs = [expand(program, size=140_000) for _ in range(2)]
    assert runs[0].passes == runs[1].passes
    assert runs[0].facts["search"]["front"] == runs[1].facts["search"]["front"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 1000}, ["size is bounded by 1 kB", "nearest point has size"]),
        ({"latency": "1ms"}, ["latency", "cannot be measured here"]),
        ({"size": 40_000, "max_kl": 1e-5}, ["max_kl is bounded by 1e-05", "nearest point"]),
    ],
)
def test_what_cannot_be_kept_is_explained(program, fields, words):
    with pytest.raises(sv.CompileError) as caught:
        expand(program, **fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_calibration_and_a_language_model_are_needed():
    case = zoo.case("llama-tied")
    with pytest.raises(sv.CompileError, match="there is none") as caught:
        sv.compile(case.model, case.inputs, budget=Budget(size="1MB"))
    assert caught.value.hint == "compile(..., calibration=texts)"
    with pytest.raises(sv.CompileError, match="no field 'sise'"):
        sv.compile(case.model, case.inputs, budget={"sise": 3}, calibration=[])
    bert = zoo.case("bert")
    with pytest.raises(sv.CompileError, match="the program scores none"):
        expand(sv.trace(bert.model, bert.inputs), size="1MB")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tokens": 1}, "tokens is 1"),
        ({"widths": (5,)}, "widths are"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"generations": 1.5}, "generations is 1.5"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(ValueError, match=word):
        Search(budget=Budget(size=1), **options)
    with pytest.raises(TypeError, match="expected a Budget"):
        Search(budget="size=1")

"""Drafts that choose their parts while decoding: SWIFT's search, DEL's exits; no token changes, whatever they skip."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.compiler import early_exit, swift
from sylvester.compiler.acceptance import ADVANCE, ALLOWED, Policy
from sylvester.compiler.draft_option import DraftOption
from sylvester.compiler.drafts import Drafters, ModelDrafter
from sylvester.compiler.early_exit import Agreement, ExitDrafter, Middle, exits, tokens_per_cost
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.session import Session
from sylvester.compiler.swift import Search, Surrogate, SwiftDrafter, matchness
from sylvester.passes.draft import Draft
from tests import zoo
from tests.test_drafting import WAYS, Eager, prompts

CPU = sv.Target("cpu", threads=1, isas=("avx2",))


@functools.cache
def compiled(draft: str = "exit") -> sv.Compiled:
    """The first of four layers does nearly everything."""
    model = copy.deepcopy(zoo.case("llama-gqa").model)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 1e-3
            layer.mlp.down_proj.weight *= 1e-3
    return sv.compile(model, {"input_ids": torch.tensor(prompts(2))}, draft=draft, target=CPU)


class Counted(Policy):
    """Time is counted in calls of the model: a token more takes a twentieth, searching and drafting nothing."""

    def __init__(self) -> None:
        super().__init__()
        for _ in range(4):
            self.reading.add(1, 1.0)
        self.reading.more.value = 0.05

    def allowed(self) -> bool:
        return True

    def affords(self, seconds: float) -> bool:
        return True

    def settle(self, read: int, made: int, seconds: float, drafting: float) -> None:
        return None


class Wild(ModelDrafter):
    """Drafts without other parts each time: none, all, or any."""

    def propose(self, *arguments):
        chosen = np.random.default_rng(self.calls).random(8) < self.calls % 5 / 4
        self.calls, self.given = self.calls + 1, {"skips": chosen.astype(np.float32)}
        return super().propose(*arguments)

    calls = 0


def drafting(model: sv.Compiled, drafter) -> sv.Compiled:
    model._drafters = Drafters(model.manifest.generation.draft)
    model._drafters._made = {(model._drafters.spec, greedy): drafter for greedy in (True, False)}
    return model


@pytest.mark.parametrize("batch", [1, 4])
def test_tokens_are_those_of_plain_decoding_whatever_is_skipped(batch):
    model = drafting(compiled(), Wild("draft", Eager()))
    for way in WAYS:
        given = dict(max_new_tokens=40, reuse=False, stop=(), **way)
        wanted = model.generate(prompts(batch), draft=False, **given)
        assert np.array_equal(model.generate(prompts(batch), **given), wanted), way
    assert model.drafting.drafted > 100


@pytest.mark.parametrize(("made", "tokens"), [(ExitDrafter, 6), (SwiftDrafter, 3)])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_found_drafts_well_and_changes_no_token(made, tokens, batch):
    """Layers that do next to nothing are found by both; looking at sets and exits leaves the caches alone."""
    model = compiled()
    for way in WAYS[:2]:
        drafter = made(model.manifest.generation.draft, Counted())
        drafting(model, drafter)
        given = dict(max_new_tokens=110, reuse=False, stop=(), **way)
        wanted = model.generate(prompts(batch), draft=False, **given)
        assert np.array_equal(model.generate(prompts(batch), **given), wanted), way
        if not way:
            done = model.drafting
            assert done.accepted > 0.9 * done.drafted > 0
            assert done.made / done.rounds > tokens / 2


def test_tokens_per_cost():
    """In layers, of 16: nothing is accepted, everything, half."""
    layers, whole = np.array([4.0, 8.0]), np.full(4, 16.0)
    lengths = np.arange(4)
    assert np.allclose(tokens_per_cost(np.zeros(2), layers, whole)[1], 1 / (8 * lengths + 16))
    assert np.allclose(tokens_per_cost(np.ones(2), layers, whole)[0], (lengths + 1) / (4 * lengths + 16))
    assert np.isclose(tokens_per_cost(np.full(2, 0.5), layers, whole)[0, 2], 1.75 / 24)


def found(rates: dict[int, float]) -> ExitDrafter:
    model = compiled()
    drafter = ExitDrafter(model.manifest.generation.draft, Counted())
    drafter.depth = 16
    drafter.found = {n: Agreement(1e4 * rate, 1e4) for n, rate in rates.items()}
    drafter._seconds = {n: early_exit.Mean(n / 16, 1) for n in rates}
    return drafter


@pytest.mark.parametrize(
    ("rates", "layer"),
    [({2: 0.1, 4: 0.9, 8: 0.95}, 4), ({2: 0.3, 4: 0.4, 8: 0.97}, 8), ({2: 0.01, 4: 0.05, 8: 0.2}, 0)],
)
def test_the_exit_and_length_of_most_tokens_a_second(rates, layer):
    """Beside every other choice, written out; 0 drafts where none is above plain decoding."""

    def worth(n, d):
        return sum(rates[n] ** i for i in range(d + 1)) / (d * n / 16 + 1 + 0.05 * d)

    best = max(((n, d) for n in rates for d in range(1, 16)), key=lambda at: worth(*at))
    wanted = best if worth(*best) > 1 else (0, 0)
    assert found(rates).choose(15) == wanted
    assert wanted[0] == layer


def test_exits_are_a_grid_of_eight():
    assert exits(16) == [2, 4, 5, 7, 9, 11, 12, 14]
    assert exits(4) == [1, 2, 3]
    assert exits(2) == [1]
    assert len(exits(80)) == 8


def test_older_rounds_fade():
    agreement = Agreement()
    assert agreement.rate == 0.5
    for _ in range(200):
        agreement.add(0, 4)
    for _ in range(60):
        agreement.add(3, 4)
    assert 0.68 < agreement.rate < 0.75 < agreement.hoped


def test_drafting_ends_between_what_is_accepted_and_rejected():
    middle = Middle()
    assert float(middle) == 0
    for _ in range(100):
        middle.learn([0.9, 0.9, 0.3, 0.1], 2)
    assert float(middle) == pytest.approx(0.6)


def test_nothing_skipped_matches_everything_and_caches_stay():
    model = compiled()
    ids = model.generate(prompts(2), 60, draft=False, stop=(), reuse=False)
    session = Session.begin(model._runner, ids[:, :7])
    session.feed(ids[:, :7])
    session.score(ids[:, 7:])
    held = {name: array.copy() for name, array in session.state.arrays.items()}

    assert matchness(session, "draft", np.zeros(8, bool), 60) == 1
    assert matchness(session, "draft", np.ones(8, bool), 60) < 1
    assert session.position == ids.shape[1]
    assert all(np.array_equal(held[name], array) for name, array in session.state.arrays.items())


def test_the_best_score_never_falls():
    search, random = Search(np.repeat(np.arange(10), 2)), np.random.default_rng(0)
    assert search.propose().tolist() == [n % 2 == 1 and n < 9 for n in np.repeat(np.arange(10), 2)]
    best = []
    for _ in range(80):
        chosen = search.propose()
        if search.tried:
            assert chosen.sum() == 7
            assert not chosen[[0, 1, -2, -1]].any()
        search.learn(chosen, random.random() * 0.9)
        best.append(search.score)
    assert best == sorted(best)
    assert not search.done


@pytest.mark.parametrize(("scores", "tried"), [([0.5, 0.96], 2), ([0.5] * 400, 302), (np.linspace(0, 0.9, 1100), 1001)])
def test_the_search_ends(scores, tried):
    search = Search(np.repeat(np.arange(6), 2))
    for score in scores:
        if search.done:
            break
        search.learn(search.propose(), float(score))
    assert search.tried == tried


def test_the_surrogate_finds_the_parts_that_matter_least():
    random = np.random.default_rng(0)
    costs, surrogate = random.random(20), Surrogate(20)
    for _ in range(120):
        chosen = np.isin(np.arange(20), random.choice(20, 8, replace=False))
        surrogate.add(chosen, 1 - costs[chosen].sum() / 20 + 0.01 * random.standard_normal())
    assert costs[surrogate.propose(8)].sum() < 1.1 * np.sort(costs)[:8].sum()


def test_a_search_that_finds_nothing_costs_next_to_nothing():
    policy, spent = Policy(), 0.0
    for _ in range(4000):
        policy.settle(1, 1, 1.0, 0.0)
        if policy.affords(3.0):
            policy.charge(3.0)
            spent += 3.0
    assert 0 < spent <= ALLOWED * 4000 / 2 + ADVANCE
    assert policy.lost == pytest.approx(spent)


def test_what_drafting_gains_pays_for_the_search():
    policy = Policy()
    for _ in range(20):
        policy.settle(1, 1, 1.0, 0.0)
    for _ in range(20):
        policy.settle(4, 4, 1.3, 0.7)
    assert policy.affords(10.0)


def test_a_draft_that_chooses_shares_weights_and_caches():
    program = zoo.traced("llama-gqa").clone()
    drafted, ledger = Pipeline((Draft(chooses="swift", ngram=True),)).run(program)
    assert list(drafted.weights) == list(program.weights)
    assert drafted.state == program.state
    assert ledger.rows[0].text == "draft(swift, ngram)"
    assert "shares 40 weights with the model and has 0 of its own" in str(ledger)
    assert "MB where decoding moves" in str(ledger)


def test_a_saved_artefact_goes_on_choosing(tmp_path):
    compiled().save(tmp_path / "artefact")
    with sv.load(tmp_path / "artefact") as model:
        assert model.manifest.generation.draft.layers == (0, 0, 1, 1, 2, 2, 3, 3)
        assert isinstance(model._drafters.find(None), ExitDrafter)
        wanted = compiled().generate(prompts(1), 20, draft=False, stop=())
        assert np.array_equal(model.generate(prompts(1), 20, stop=()), wanted)


def test_bad_choices():
    assert DraftOption.parse("exit, ngram") == DraftOption((), True, "exit")
    with pytest.raises(CompileError, match="swift and exit, which choose the same parts"):
        DraftOption.parse(["swift", "exit"])
    with pytest.raises(CompileError) as error:
        DraftOption.parse("swft")
    assert error.value.hint == "did you mean 'swift'?"
    with pytest.raises(ValueError, match="chooses is 'del'"):
        Draft(chooses="del")
    two = zoo.traced("llama-gqa").clone().rewrite([sv.passes.SkipLayers(layers=(1, 2))])
    with pytest.raises(Unsupported, match="swift needs 3 layers"):
        Pipeline((Draft(chooses="swift"),)).run(two)


def test_defaults_are_those_of_the_papers():
    assert (swift.RATIO, swift.WINDOW, swift.ENOUGH, swift.TOLERANCE, swift.MOST) == (0.45, 33, 0.95, 300, 1000)
    assert early_exit.FADING == 0.95

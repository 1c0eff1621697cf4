"""Tokens chosen on an emulated device against those that the host chooses from the same logits."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.backends.cuda import choice
from sylvester.backends.cuda.choice import Scores
from sylvester.backends.cuda.emulated import Emulated
from sylvester.compiler.acceptance import Policy
from sylvester.compiler.drafts import Drafting
from sylvester.compiler.errors import InputError
from sylvester.compiler.proposal import Draft
from sylvester.compiler.sampling import Sampling
from sylvester.compiler.session import Session
from sylvester.compiler.speculation import Speculation
from tests import cuda_models
from tests.graphs import decoder

SAMPLINGS = (Sampling(), Sampling(0.8), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(0.9, 40, 0.6))
NONE = np.zeros((3, 0), np.int64)


@pytest.fixture(scope="module")
def compiled():
    with cuda_models.opened(cuda_models.folder(), Emulated()) as made:
        yield made


def placed(compiled, logits):
    runner = compiled._runner
    array = runner.heap.array(logits.shape, np.float32)
    runner.device.write(array.address, np.ascontiguousarray(logits, np.float32))
    return Scores.of(array, runner._chooser)


def logits(*shape):
    return (3 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


def uniform(*shape):
    return np.random.default_rng(2).random(shape)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_all_choices_at_once_are_those_of_the_host(compiled, sampling):
    x, numbers = logits(2, 3, 60).round(1), uniform(2, 3)
    chosen = placed(compiled, x).together(sampling, numbers)
    for n in range(3):
        expected = sampling.pick(x[:, n], NONE, numbers[:, n])
        assert chosen[:, n].pick(sampling, NONE, numbers[:, n]).tolist() == expected.tolist()
    assert sampling.pick(placed(compiled, x)[:, 2], NONE, numbers[:, 2]).tolist() == expected.tolist()


def test_only_ids_come_back(compiled):
    device, scores = compiled._runner.device, placed(compiled, logits(3, 60))
    device.fetched = device.sent = 0
    Sampling().pick(scores, NONE, uniform(3))
    assert (device.sent, device.fetched) == (0, 16 + 3 * 8)
    Sampling(1.0).pick(scores, NONE, uniform(3))
    assert device.sent == 3 * 8


def test_what_the_device_leaves_open_the_host_decides(compiled):
    x = logits(3, 60)
    x[1] = 0.0
    sampling, numbers = Sampling(1.0, top_p=0.5), uniform(3)
    chosen = placed(compiled, x).together(sampling, numbers)
    assert chosen.ids[1] < 0, "the edge of a nucleus of equals"
    assert chosen.pick(sampling, NONE, numbers).tolist() == sampling.pick(x, NONE, numbers).tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=str)
def test_logits_that_are_not_finite_are_an_error(compiled, sampling):
    x = logits(3, 60)
    x[2, 7] = np.nan
    with pytest.raises(InputError, match="the best logit of row 2 is nan"):
        sampling.pick(placed(compiled, x), NONE, uniform(3))


def test_a_penalty_is_left_to_the_host_and_noted(compiled):
    x, sampling, tokens = logits(3, 60), Sampling(repetition_penalty=1.5), np.argsort(-logits(3, 60))[:, :2]
    expected = sampling.pick(x, tokens, uniform(3))
    for _ in range(2):
        assert sampling.pick(placed(compiled, x), tokens, uniform(3)).tolist() == expected.tolist()
    assert compiled.notes == (choice.PENALTY,)


def test_the_best_of_every_position(compiled):
    x = logits(2, 3, 60).round()
    x[1, 2, 4] = np.nan
    assert placed(compiled, x).argmax(-1).tolist() == x.argmax(-1).tolist()
    assert placed(compiled, x)[:, :0].argmax(-1).shape == (2, 0)


def test_many_rows_are_chosen_in_parts(compiled, monkeypatch):
    monkeypatch.setattr(choice, "MOST", 2)
    x = logits(5, 60)
    assert placed(compiled, x).argmax(-1).tolist() == x.argmax(-1).tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS[3:4], ids=str)
def test_drawn_texts_are_those_of_the_model(compiled, sampling):
    prompt = cuda_models.ids(2, 3)
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": 3}
    expected = cuda_models.reference().generate(prompt, 3, **options).tolist()
    compiled._runner.device.fetched = 0
    assert compiled.generate(prompt, 3, **options).tolist() == expected
    assert compiled._runner.device.fetched == 3 * (16 + 2 * 8)


class Always(Policy):
    """Whether it pays or not."""

    def allowed(self):
        return True


class Proposes:
    """Drafts the given tokens, one row, as a chain."""

    def __init__(self, tokens):
        self.policy, self.tokens, self.learnt = Always(), tokens, []

    def propose(self, session, last, most, sampling, uniform):
        draft = Draft()
        for token in self.tokens:
            draft.add(self.policy, np.array([token]), "given")
        return draft

    def learn(self, session, start, kept, logits):
        self.learnt.append(logits.argmax(-1).shape)


@pytest.mark.parametrize("sampling", SAMPLINGS[1:2], ids=str)
def test_drafts_are_verified_on_the_device(compiled, sampling):
    runner, prompt, numbers = compiled._runner, cuda_models.ids(1, 4), uniform(6, 1)

    def started(drafter):
        given = iter(numbers)
        session = Session.begin(runner, prompt)
        return Speculation(session, sampling, lambda: next(given), drafter, Drafting())

    alone, found = started(None), []
    found.append(alone.first(prompt))
    for _ in range(3):
        found += alone.next(found[-1], 1, np.zeros(1, bool))
    expected = [int(one[0]) for one in found]

    drafter = Proposes([*expected[1:3], (expected[3] + 1) % cuda_models.VOCAB])
    together = started(drafter)
    first = together.first(prompt)
    runner.device.fetched = 0
    chosen = together.next(first, 6, np.zeros(1, bool))
    assert [int(one[0]) for one in (first, *chosen)] == expected
    assert together.session.position == 4 + 3
    assert drafter.learnt[-1] == (1, 4)
    assert runner.device.fetched == 2 * (16 + 4 * 8), "the choices, and what n-grams learn from"


def test_an_artefact_that_does_not_generate_chooses_nothing(tmp_path):
    folder = cuda_models.saved(decoder(), tmp_path / "made")
    with cuda_models.opened(folder, Emulated()) as compiled:
        assert compiled._runner._roles == {}

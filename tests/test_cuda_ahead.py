"""Calls that begin before the host knows the token that they read."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.backends.cuda.ahead import Ahead, Step
from sylvester.backends.cuda.device import NullDevice
from sylvester.backends.cuda.emulated import Emulated
from sylvester.compiler.runner import State
from tests import cuda_models


class Calls:
    """What was begun, and how often reports were forgiven."""

    def __init__(self):
        self.begun, self.forgiven = [], 0
        self.ahead = Ahead(self._run, self._forgive)
        self.state = State({}, position=5)

    def _run(self, entry, inputs, state):
        self.begun.append((entry, state.position))
        return {"logits": len(self.begun)}

    def _forgive(self):
        self.forgiven += 1

    def chosen(self, *ids, batch=2):
        """What the ids are chosen for is begun, and then they are known."""
        self.ahead.expect(Step("decode", "input_ids", self.state, batch))
        self.ahead.begin(np.zeros((len(ids), 1), np.int64))
        self.ahead.decide(np.array(ids))

    def take(self, *ids, entry="decode", state=None):
        return self.ahead.take(entry, {"input_ids": np.array(ids)[:, None]}, state or self.state)


@pytest.fixture
def calls():
    return Calls()


def test_a_call_for_the_chosen_ids_was_begun(calls):
    calls.chosen(7, 8)
    assert calls.begun == [("decode", 5)]
    assert calls.take(7, 8) == {"logits": 1}
    assert calls.take(7, 8) is None, "once"


@pytest.mark.parametrize(
    "other",
    [
        lambda calls: calls.take(7, 9),
        lambda calls: calls.take(7, 8, entry="warm"),
        lambda calls: calls.take(7, 8, state=State({}, 5)),
        lambda calls: calls.take(7),
        lambda calls: calls.ahead.take("decode", {"x": np.array([[7], [8]])}, calls.state),
    ],
)
def test_other_calls_are_not_served(calls, other):
    calls.chosen(7, 8)
    assert other(calls) is None


def test_a_state_that_went_back_is_not_served(calls):
    calls.chosen(7, 8)
    calls.state.position = 4
    assert calls.take(7, 8) is None


def test_what_the_host_must_choose_is_forgiven(calls):
    calls.chosen(7, -9)
    assert calls.forgiven == 1
    assert calls.take(7, 8) is None


def test_parts_of_a_batch_begin_nothing(calls):
    calls.chosen(7, batch=2)
    assert not calls.begun
    calls.ahead.begin(np.zeros((2, 1), np.int64))
    assert not calls.begun, "nothing is expected any more"


def test_a_text_launches_every_step_once():
    with cuda_models.opened(cuda_models.folder(), NullDevice()) as compiled:
        runner, begun = compiled._runner, []
        plain = runner._run
        runner._ahead._run = lambda *given: begun.append(given[0]) or plain(*given)
        runner._run = lambda *given: begun.append("now") or plain(*given)
        compiled.generate(cuda_models.ids(2, 4), 6)
        assert begun == ["now", "now", *["decode"] * 4], "a prompt, a step, and the rest ahead"
        compiled.generate(cuda_models.ids(1, 4), 6, stop=0)
        assert begun[6:] == ["now"]


class Doubtful(Emulated):
    """Leaves every choice to the host."""

    def begin_read(self, address, nbytes):
        ids = np.empty(nbytes // 8, np.int64)
        self.read(address, ids)
        ids[2:] = -1 - ids[2:]
        self.write(address, ids)
        return super().begin_read(address, nbytes)


def test_steps_that_began_for_no_token_do_no_harm():
    prompt = cuda_models.ids(1, 3)
    expected = cuda_models.reference().generate(prompt, 4).tolist()
    with cuda_models.opened(cuda_models.folder(), Doubtful()) as compiled:
        assert compiled.generate(prompt, 4).tolist() == expected
        compiled(prompt)

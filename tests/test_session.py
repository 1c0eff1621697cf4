"""Session and SessionPool on a runner that notes its calls: which entry reads what, and who gets which caches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sylvester.compiler.errors import Unsupported
from sylvester.compiler.manifest import Generation
from sylvester.compiler.runner import State
from sylvester.compiler.session import Session
from sylvester.compiler.session_pool import SessionPool
from sylvester.compiler.stages import Stage
from tests import artefacts

STEP = artefacts.MANIFEST.entries["decode"]
WARM = (Stage("warm"), Stage("decode", generated=3))
DEPTHS = (Stage("decode"), Stage("warm", position=8))


class Notes:
    """A runner; logits are the last position."""

    def __init__(self, *stages):
        entries = artefacts.MANIFEST.entries | {"warm": STEP}
        generation = Generation(artefacts.CAPACITY, stages=stages)
        self.manifest = dataclasses.replace(artefacts.MANIFEST, entries=entries, generation=generation)
        self.calls = []

    def new_state(self, entry, inputs):
        return State({})

    def run(self, entry, inputs, state=None):
        tokens = inputs["input_ids"]
        self.calls.append((entry, state.position, tokens.shape[1]))
        return {"logits": np.zeros((*tokens.shape, artefacts.VOCAB), np.float32)}

    def close(self):
        return None


def ids(count, first=1):
    return np.full((1, count), first)


@pytest.mark.parametrize(
    ("stages", "chunk", "feeds", "calls"),
    [
        ((), 0, (5, 1, 3), [("prefill", 0, 5), ("decode", 5, 1), ("decode", 6, 3)]),
        ((), 4, (5, 6), [("prefill", 0, 4), ("decode", 4, 1), ("decode", 5, 4), ("decode", 9, 2)]),
        (WARM, 0, (5, 1, 4), [("prefill", 0, 5), ("warm", 5, 1), ("warm", 6, 1), ("decode", 7, 3)]),
        (WARM, 4, (5, 1, 1, 1), [("prefill", 0, 4), *[("warm", n, 1) for n in (4, 5, 6)], ("decode", 7, 1)]),
        (WARM, 0, (7,), [("prefill", 0, 5), ("warm", 5, 2)]),
        (DEPTHS, 0, (5, 6), [("prefill", 0, 5), ("decode", 5, 3), ("warm", 8, 3)]),
        (DEPTHS, 4, (5, 6), [("prefill", 0, 4), ("decode", 4, 1), ("decode", 5, 3), ("warm", 8, 3)]),
    ],
)
@pytest.mark.parametrize("kept", ["feed", "score"])
def test_each_entry_reads_its_stretch(stages, chunk, feeds, calls, kept):
    runner = Notes(*stages)
    session = Session.begin(runner, ids(5), chunk)

    shapes = [getattr(session, kept)(ids(count)).shape for count in feeds]

    assert runner.calls == calls
    assert session.position == sum(feeds)
    assert shapes == [(1, artefacts.VOCAB) if kept == "feed" else (1, n, artefacts.VOCAB) for n in feeds]


def test_after_going_back_the_stages_are_those_of_the_position():
    runner = Notes(*WARM)
    session = Session.begin(runner, ids(5))
    session.feed(ids(5))
    session.feed(ids(4))
    session.rewind(6)
    runner.calls.clear()

    session.feed(ids(2))

    assert runner.calls == [("warm", 6, 1), ("decode", 7, 1)]


def test_an_artefact_without_a_stage_cannot_generate():
    with pytest.raises(Unsupported, match="cannot generate"):
        Session.begin(Notes(Stage("shallow")), ids(5))


def used(pool, runner, tokens):
    session = pool.take(runner, tokens)
    with pool.returned(session):
        session.feed(tokens[:, session.position :])
    return session


def test_the_longest_common_beginning_is_taken_and_the_oldest_goes_first():
    pool, runner = SessionPool(kept=2), Notes()
    one, two = used(pool, runner, ids(8)), used(pool, runner, ids(8, first=2))
    mixed = np.concatenate([ids(6), ids(4, first=2)], 1)

    assert one is not two
    assert used(pool, runner, mixed) is one
    assert runner.calls[-1] == ("decode", 6, 4)
    assert pool.take(runner, ids(8, first=3)) is two
    assert two.position == 0


def test_little_in_common_is_read_anew_in_the_same_caches():
    pool, runner = SessionPool(), Notes()
    session = used(pool, runner, ids(8))

    assert pool.take(runner, np.concatenate([ids(1), ids(9, first=2)], 1)) is session
    assert session.position == 0


def test_an_error_drops_the_caches():
    pool, runner = SessionPool(), Notes()
    session = used(pool, runner, ids(8))

    with pytest.raises(ValueError, match="broken"), pool.returned(pool.take(runner, ids(8))):
        raise ValueError("broken")

    assert pool.take(runner, ids(8)) is not session

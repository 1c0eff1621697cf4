"""PadPrompt and the session that pads: what is computed of the tokens of a prompt stays what it is without padding."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sylvester.compiler import ops
from sylvester.compiler.buckets import EVEN, PADDED, PARTS, bucket, padding
from sylvester.compiler.driver import _completed
from sylvester.compiler.errors import InputError, Unsupported
from sylvester.compiler.manifest import Generation
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import binding
from sylvester.compiler.quantized_ops import attention_int8
from sylvester.compiler.runner import PADDING
from sylvester.compiler.session import Session
from sylvester.compiler.stages import Stage, remember
from sylvester.passes import LastLogits, PadPrompt, QuantizeCache
from tests.test_derive_bias import biased, by_distance
from tests.test_derive_decode import VOCAB, by_cumulative_sum, derived, gpt
from tests.test_session import Notes, ids

aten = torch.ops.aten
CAPACITY = 24


def windowed(self, q, k, v):
    return ops.attention(q, k, v, None, None, 0.4, True, 4)


def rotated(self, x):
    return ops.hadamard(x, 8)


MODELS = {
    "plain": {},
    "counted": {"positions": by_cumulative_sum, "attend": windowed, "between": rotated},
}


@functools.cache
def traced(name):
    model = biased(by_distance) if name == "biased" else gpt(**MODELS[name])
    return Pipeline((LastLogits(),), check=False)(derived(model, max_length=CAPACITY, check=False))


def started(name="plain"):
    return traced(name).clone()


def padded(program):
    """The program and what the pass did."""
    after, ledger = Pipeline((PadPrompt(),)).run(program)
    return after, ledger.rows[0].changes


def test_buckets_are_few_and_waste_little():
    found = {n: bucket(n) for n in range(1, 8193)}
    assert [*dict.fromkeys(found.values())][:13] == [1, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640]
    assert all(n <= m == bucket(m) for n, m in found.items())
    assert all(m - n < n / PARTS for n, m in found.items() if n > EVEN)
    assert [*found.values()] == sorted(found.values())
    assert len({m for n, m in found.items() if n > EVEN}) == PARTS * 4


@pytest.mark.parametrize(
    ("length", "room", "more"), [(1, 9, 0), (17, 32, 15), (17, 31, 0), (32, 32, 0), (513, 999, 63)]
)
def test_padding_fits_the_room(length, room, more):
    assert padding(length, room) == more


@pytest.mark.parametrize("name", [*MODELS, "biased"])
def test_tokens_behind_change_nothing_of_those_before(name):
    """But for rounding, which may depend on how many tokens come together."""
    program, changes = padded(started(name))
    assert [item.reason for item in changes.refused] == []
    tokens = torch.randint(VOCAB, (2, 9))
    for entry, number, few, many, held in (("start", PADDING, 0, 4, 5), ("decode", "past", 3, 3, 8)):
        key = binding(program.entries[entry].placeholders("input")[0]).key
        state = {key: torch.ones([2, *map(int, slot.shape[1:])]) for key, slot in program.state.items()}

        wanted = program.run(entry, {key: tokens[:, :5], number: torch.tensor(few)}, state)
        found = program.run(entry, {key: tokens, number: torch.tensor(many)}, state)

        for output in program.entries[entry].outputs:
            axis, count = (2, held) if output.kind == "state" else (1, wanted[output.name].shape[1])
            a, b = (made[output.name].narrow(axis, 0, count) for made in (wanted, found))
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_the_pass_chooses_a_row_once():
    before = started()
    after, changes = padded(before)
    assert changes.counts() == {"last": len(before.entries["start"].calls(aten.select.int))}
    assert [binding(n).key for n in after.entries["start"].placeholders("input")] == ["ids", PADDING]
    assert PADDED not in before.info
    assert after.info[PADDED]
    again, changes = padded(after)
    assert (changes.applied, changes.refused) == ([], [])
    assert len(again.entries["start"].calls()) == len(after.entries["start"].calls())


def test_a_program_that_starts_with_all_logits_needs_no_input():
    program = started()
    del program.entries["start"]
    after, changes = padded(program)
    assert after.info[PADDED]
    assert changes.applied == []
    assert PADDING not in after.entries["prefill"].examples


def test_rounded_caches_may_be_padded():
    program = Pipeline((QuantizeCache(bits=8),), check=False)(started())
    assert padded(program)[0].info[PADDED]


def summed():
    program = started()
    entry = program.entries["decode"]
    end = entry.graph.output_node()
    logits, *rest = entry.results()
    end.args = ((entry.emit(aten.flip.default, logits, [1], before=end), *rest),)
    return program


def staged():
    program = started()
    remember(program.info, [Stage("decode"), Stage("prefill", position=8)])
    return program


def two_way():
    program = started()
    node = program.entries["decode"].calls(ops.attention.target)[0]
    node.args = (*node.args[:6], False, *node.args[7:])
    return program


def of_int8():
    program = started()
    program.entries["start"].calls(ops.attention.target)[0].target = attention_int8.target
    return program


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (summed, "it is not known whether aten.flip.default mixes tokens"),
        (staged, "['decode', 'prefill'] take turns in reading"),
        (two_way, "an attention is not causal"),
        (of_int8, "products of int8 round by means over tokens that a token does not see"),
    ],
    ids=["mixes", "stages", "causal", "int8"],
)
def test_what_may_depend_on_later_tokens_is_not_padded_and_noted(program, reason):
    after = _completed(program(), SimpleNamespace(pads=True))
    assert PADDED not in after.info
    assert PADDING not in after.entries["start"].examples
    assert after.info["notes"][-1].startswith(f"prompts are read at their own lengths: {reason}")


def test_a_backend_that_wants_no_padding_gets_none():
    assert PADDED not in _completed(started(), SimpleNamespace()).info


def test_an_entry_to_start_from_is_required():
    program = started()
    del program.entries["prefill"]
    with pytest.raises(Unsupported, match="no entry 'prefill' with caches"):
        padded(program)


class Padded(Notes):
    """Logits are the tokens read."""

    def __init__(self, limit):
        super().__init__()
        self.manifest = dataclasses.replace(self.manifest, generation=Generation(limit, padded=True))

    def run(self, entry, inputs, state=None):
        tokens = inputs["input_ids"]
        self.calls.append((entry, state.position, tokens.shape[1], state.padding))
        if (tokens < 0).any():
            raise InputError("no token")
        return {"logits": tokens[:, :, None].astype(np.float32)}


def test_the_session_pads_and_takes_the_last_token():
    runner = Padded(limit=64)
    session = Session.begin(runner, ids(17))
    text = np.arange(60)[None]
    read = [session.feed(text[:, a:b]).tolist() for a, b in ((0, 17), (17, 18), (18, 40), (40, 60))]
    assert read == [[[16.0]], [[17.0]], [[39.0]], [[59.0]]]
    assert runner.calls == [
        ("prefill", 0, 32, 15), ("decode", 17, 1, 0), ("decode", 18, 32, 10), ("decode", 40, 20, 0),
    ]  # fmt: skip
    assert session.tokens.tolist() == text.tolist()


def test_parts_of_a_prompt_are_padded_and_scores_are_not():
    runner = Padded(limit=64)
    session = Session.begin(runner, ids(23), chunk=20)
    session.feed(ids(23))
    assert session.score(ids(3)).shape == (1, 3, 1)
    assert runner.calls == [("prefill", 0, 32, 12), ("decode", 20, 16, 13), ("decode", 23, 3, 0)]


def test_an_error_leaves_no_padding():
    session = Session.begin(Padded(limit=64), ids(3))
    with pytest.raises(InputError):
        session.feed(ids(3, first=-1))
    assert (session.state.padding, session.position) == (0, 0)

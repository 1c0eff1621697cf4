"""Prompts of a batch that begin alike are read and kept once: the tokens of reading each row, drafts, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.backends.memory import aligned_zeros, small_pages
from sylvester.compiler import ops, prefix
from sylvester.compiler.cache_ops import attention_q
from sylvester.compiler.errors import InputError, Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import StateSlot
from sylvester.compiler.runner import SHARED
from sylvester.compiler.session import Session
from sylvester.passes import QuantizeAttention, QuantizeCache, SharePrefix
from tests import zoo
from tests.test_derive_bias import biased, by_distance
from tests.test_derive_decode import VOCAB, derived, gpt
from tests.test_drafting import eager

COMMON, OWN, NEW = 70, 5, 24
MODELS = {
    "grouped": lambda: zoo.traced("llama-gqa"),
    "window": lambda: zoo.traced("mistral"),
    "bias": lambda: derived(biased(by_distance), max_length=128),
}


@functools.cache
def compiled(name: str = "grouped", passes: str = "", draft: str | None = None) -> sv.Compiled:
    target = sv.Target(threads=2, isas=("avx2",))
    return sv.compile(MODELS[name]().clone(), passes=passes or (), draft=draft, target=target)


def prompts(rows: int, common: int = COMMON, own: int = OWN, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    begin = random.integers(3, VOCAB, common)
    return np.concatenate([np.tile(begin, (rows, 1)), random.integers(3, VOCAB, (rows, own))], 1)


def generated(model: sv.Compiled, ids: np.ndarray, **options: object) -> np.ndarray:
    return model.generate(ids, NEW, **{"stop": (), "reuse": False, **options})


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize(
    ("name", "passes"),
    [("grouped", ""), ("window", "quantize-cache"), ("bias", ""), ("grouped", "quantize-cache(bits=8)")],
)
def test_tokens_are_those_of_reading_each_row(name, passes, rows):
    """Rounded caches are read in the same parts, as results depend on them."""
    model, ids = compiled(name, passes), prompts(rows)
    exact = model.manifest.generation.uniform
    before = dataclasses.replace(model.sharing)

    found = generated(model, ids, share=None if exact else True)

    assert np.array_equal(found, generated(model, ids, share=False, chunk=COMMON if passes else 0))
    assert model.sharing.batches - before.batches == 1
    assert model.sharing.spared - before.spared == COMMON * (rows - 1)
    assert model.sharing.kept - before.kept == (COMMON * (rows - 1) if rows >= prefix.ROWS else 0)


def sessions(model: sv.Compiled, ids: np.ndarray) -> tuple[Session, Session]:
    """One that shares the beginning of its rows, and one that does not, at the end of the prompt."""
    both = tuple(Session.begin(model._runner, ids) for _ in range(2))
    both[0].share(ids[0, :COMMON], keep=True)
    for session in both:
        session.feed(ids[:, session.position :])
    return both


def test_logits_are_near_and_other_rows_hold_nothing():
    ids = prompts(6)
    shared, plain = sessions(compiled(), ids)
    for array in shared.state.arrays.values():
        assert not array[1:, :, :COMMON].any()
        array[1:, :, :COMMON] = np.nan
    for count in (1, 3, 17):
        tokens = prompts(6, 0, count)
        found, wanted = (session.score(tokens) for session in (shared, plain))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("draft", ["ngram", "skip-layers(layers=(1, 2, 3))"])
def test_drafts_change_no_token(draft):
    model, ids = eager(compiled(draft=draft)), prompts(4)
    for way in ({}, {"temperature": 0.9, "seed": 3}):
        wanted = generated(model, ids, draft=False, **way)
        assert np.array_equal(generated(model, ids, **way), wanted)
    assert model.drafting.drafted > 20
    assert model.sharing.kept >= 4 * COMMON * 3


def test_a_token_has_its_bits_in_any_company():
    ids = prompts(4)
    session = sessions(compiled(), ids)[0]
    tokens = prompts(4, 0, 16, seed=1)
    alone = np.stack([session.feed(tokens[:, i : i + 1]) for i in range(16)], 1)
    for count in (2, 5, 16):
        session.rewind(COMMON + OWN)
        assert np.array_equal(session.score(tokens[:, :count]), alone[:, :count])


def test_caches_that_share_are_used_again():
    model, read = compiled(), []
    model._pool.clear()
    run = model._runner.run

    def counted(entry, inputs, state=None):
        read.append((entry, *next(iter(inputs.values())).shape))
        return run(entry, inputs, state)

    model._runner.run = counted
    try:
        first, second = prompts(4), np.concatenate([prompts(4)[:, :COMMON], prompts(4, 0, 9, seed=1)], 1)
        one = model.generate(first, 1, stop=())
        assert read == [("start", 1, COMMON), ("decode", 4, OWN)]
        read.clear()
        two = model.generate(second, 1, stop=())
        assert read == [("decode", 4, 9)]
        longer = np.concatenate([np.tile(second[:1], (4, 1)), prompts(4, 0, 2, seed=2)], 1)
        three = model.generate(longer, 1, stop=(), reuse=True)
        read.clear()
        alone = [model.generate(ids, 1, stop=(), share=False) for ids in (first, second, longer)]
        assert read[0] == ("start", 4, COMMON + OWN)
    finally:
        model._runner.run = run
    for found, wanted in zip((one, two, three), alone, strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="the system has no pages of two sizes")
def test_memory_that_rows_do_not_touch_is_not_committed():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    size, apart = 1 << 26, 1 << 20
    array = aligned_zeros((2, size), "uint8")
    assert small_pages(array[1:])
    before = resident()
    array[1, ::apart] = 1
    assert resident() - before < size // 8
    assert (array.sum(1) == [0, size // apart]).all()


def test_lists_of_prompts_share():
    model = compiled()
    ids = [*prompts(4).tolist(), *prompts(2, own=9).tolist()]
    before = model.sharing.batches
    assert generated(model, ids) == generated(model, ids, share=False)
    assert model.sharing.batches == before + 2


def test_what_does_not_begin_alike_is_left_alone():
    model = compiled()
    before = dataclasses.replace(model.sharing)
    for ids in (prompts(4, prefix.LEAST - 1), prompts(1)):
        generated(model, ids)
    assert model.sharing == before
    assert prefix.common(np.array([[1, 2, 3]] * 2)) == 2
    assert prefix.common(np.array([[1, 2, 3], [1, 5, 3]])) == 1


def test_refusals_say_why():
    model = compiled(passes="quantize-cache(bits=8)")
    model.sharing.refused = ""
    generated(model, prompts(4))
    assert "`decode` computes other than `prefill`" in str(model.sharing)
    with pytest.raises(InputError, match="share is 3, expected True, False or None"):
        generated(model, prompts(4), share=3)
    manifest = compiled().manifest
    entry = manifest.entries["decode"]
    symbols = tuple(dataclasses.replace(symbol, min=2) for symbol in entry.symbols)
    fixed = {**manifest.entries, "decode": dataclasses.replace(entry, symbols=symbols)}
    assert prefix.refusal(dataclasses.replace(manifest, entries=fixed), True) == (
        "'decode' takes batches of 2, one row alone does not fit"
    )
    slots = {key: dataclasses.replace(slot, shape=slot.shape[:2]) for key, slot in manifest.state.items()}
    assert "expected [batch, heads, 128, features]" in prefix.refusal(dataclasses.replace(manifest, state=slots), True)


def test_the_pass_adds_an_input_to_what_reads_caches():
    before = derived(gpt())
    after = Pipeline((SharePrefix(), SharePrefix()))(before)
    assert list(after.entries["decode"].examples) == [*before.entries["decode"].examples, SHARED]
    assert [str(node.args) for node in after.entries["decode"].calls()] == [
        str(node.args) for node in before.entries["decode"].calls()
    ]
    readers = after.entries["decode"].calls(ops.attention.target)
    assert {node.kwargs["shared"].meta["bind"].key for node in readers} == {SHARED}
    assert SHARED not in after.entries["prefill"].examples
    quantised = Pipeline((QuantizeCache(bits=8),))(after)
    assert all("shared" in node.kwargs for node in quantised.entries["decode"].calls(attention_q.target))


def test_the_pass_refuses_caches_that_rows_need():
    program = derived(gpt())
    program.state["k0"] = StateSlot(0, (2, *program.state["k0"].shape[1:]), torch.float32)
    refused = Pipeline((SharePrefix(),), check=False).run(program)[1].rows[0].changes.refused
    assert [r.reason for r in refused] == ["the cache 'k0' is of a fixed batch of 2"]
    program = derived(gpt())
    entry = program.entries["decode"]
    update = entry.calls(ops.kv_update.target)[0]
    entry.emit(torch.ops.aten.sum.default, update, before=entry.graph.output_node())
    refused = Pipeline((SharePrefix(),), check=False).run(program)[1].rows[0].changes.refused
    assert [r.reason for r in refused] == ["%sum_default reads the cache 'k0', expected attention only"]
    with pytest.raises(Unsupported, match="no entry has caches"):
        Pipeline((SharePrefix(),))(gpt())


def test_the_pass_refuses_products_that_would_round_the_prefix_alone():
    before = Pipeline((QuantizeAttention(products="int8", cosine=0.5),))(derived(gpt()))
    after, ledger = Pipeline((SharePrefix(),), check=False).run(before)
    assert SHARED not in after.entries["decode"].examples
    assert "products of int8" in ledger.rows[0].changes.refused[0].reason

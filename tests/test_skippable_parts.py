"""Parts of `decode` that a call can skip: what is computed, what is written, what runs."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.backends.kernel_table import read_table
from sylvester.compiler.artefact import open_runner
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.verify import verify
from sylvester.passes.skippable_parts import SkippableParts
from tests import zoo

CPU = sv.Target("cpu", threads=2, isas=("avx2",))
LAYERS = 4
SETS = {
    "nothing": ((), ()),
    "everything": (range(4), range(4)),
    "attention": (range(4), ()),
    "feed-forward": ((), range(4)),
    "mixed": ((0, 2), (1, 2)),
    "after two layers": ((2, 3), (2, 3)),
}


@functools.cache
def skippable(name: str, passes: str = "") -> Program:
    program = zoo.traced(name).clone()
    return (program.rewrite(passes) if passes else program).rewrite([SkippableParts()])


def skips(attention, ffn) -> np.ndarray:
    return np.array([[n in attention, n in ffn] for n in range(LAYERS)], np.float32).ravel()


@functools.cache
def runner(folder: Path, name: str, passes: str, target: str):
    place = folder / f"{name}-{target}-{len(passes)}"
    with sv.compile(skippable(name, passes), target=CPU if target == "cpu" else target) as compiled:
        compiled.save(place)
    return open_runner(place, 2)


def step(run, chosen, batch: int = 2):
    """Logits of two tokens after nine, the caches before and after."""
    tokens = np.random.default_rng(0).integers(3, zoo.VOCAB, (batch, 11))
    key = run.manifest.entries["prefill"].inputs[0].name
    state = run.new_state("prefill", {key: tokens[:, :9]})
    run.run("prefill", {key: tokens[:, :9]}, state)
    state.position = 9
    before = {name: array.copy() for name, array in state.arrays.items()}
    outputs = run.run("decode", {key: tokens[:, 9:], "skips": chosen}, state)
    return next(iter(outputs.values())), before, state.arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("skippable")


@pytest.mark.parametrize("name", ["llama-gqa", "phi"])
@pytest.mark.parametrize("chosen", SETS)
def test_a_call_computes_what_the_parts_left_do(name, chosen, folder):
    """As if the others were dropped; caches of attention that is skipped keep every bit, on both backends."""
    attention, ffn = SETS[chosen]
    found, before, after = step(runner(folder, name, "", "cpu"), skips(attention, ffn))
    wanted, old, new = step(runner(folder, name, "", "reference"), skips(attention, ffn))

    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(wanted - dropped(name, attention, ffn)).max() < 1e-4
    assert changed(before, after) == changed(old, new) == set(range(LAYERS)) - set(attention)


def changed(before, after):
    """Layers whose caches are others."""
    return {int(key[1:]) for key in before if not np.array_equal(before[key], after[key])}


def dropped(name, attention, ffn):
    attention, ffn = tuple(attention), tuple(ffn)
    program = zoo.traced(name).clone()
    if attention or ffn:
        program = program.rewrite([sv.passes.DropSublayers(attention=attention, ffn=ffn, phase="decode")])
    tokens = torch.tensor(np.random.default_rng(0).integers(3, zoo.VOCAB, (2, 11)))
    key = next(iter(program.entries["prefill"].examples))
    empty = {n: torch.zeros(2, *map(int, s.shape[1:]), dtype=s.dtype) for n, s in program.state.items()}
    filled = program.run("prefill", {key: tokens[:, :9]}, empty)
    given = {key: tokens[:, 9:], "past": torch.tensor(9)}
    found = program.run("decode", given, {name: filled[name] for name in program.state})
    return next(iter(found.values())).numpy()


def test_attention_over_bfloat16_is_found():
    assert len(skippable("llama-gqa", "bf16").info["skips"]) == 2 * LAYERS


@pytest.mark.nightly
def test_records_of_a_quantised_cache_stay(folder):
    passes = "quantize-cache(bits=8)"
    chosen = skips((1, 3), (0, 3))
    found, before, after = step(runner(folder, "llama-gqa", passes, "cpu"), chosen)
    wanted, _, _ = step(runner(folder, "llama-gqa", passes, "reference"), chosen)

    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)
    assert changed(before, after) == {0, 2}


def test_kernels_of_skipped_parts_do_not_run(folder):
    """The profile of a call books no time for them, and some for the others."""
    run = runner(folder, "llama-gqa", "", "cpu")
    specs = read_table(folder / "llama-gqa-cpu-0").entries["decode"]
    tokens = np.full((1, 4), 5)
    state = run.new_state("prefill", {"input_ids": tokens})
    state.position, times = 4, np.zeros(len(specs))
    run.run("decode", {"input_ids": tokens, "skips": skips((1,), (2, 3))}, state, times)
    for layer in range(LAYERS):
        for module, skipped in (("self_attn.o_proj", layer == 1), ("mlp.down_proj", layer >= 2)):
            place = f"layers.{layer}.{module}"
            mine = [t for spec, t in zip(specs, times, strict=True) if any(place in label for label in spec.labels)]
            assert mine, place
            assert all((t == 0) == skipped for t in mine), place


def test_parts_in_order():
    program, ledger = Pipeline((SkippableParts(),)).run(zoo.traced("phi").clone())

    verify(program)
    assert program.info["skips"] == [[n, kind] for n in range(LAYERS) for kind in ("attention", "ffn")]
    assert ledger.rows[0].changes.counts() == {"attention": LAYERS, "ffn": LAYERS}
    assert list(program.weights) == list(zoo.traced("phi").weights)
    assert "skips" not in [n.target for n in program.entries["prefill"].placeholders()]


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(Unsupported, match="needs an entry 'decode'"):
        zoo.traced("bert").clone().rewrite([SkippableParts()])
    with pytest.raises(CompileError, match="can be skipped already"):
        skippable("llama-gqa").clone().rewrite([SkippableParts()])

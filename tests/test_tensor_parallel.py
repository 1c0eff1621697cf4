"""Parts of a model split between ranks: what each rank keeps, what is refused, and that ranks compute the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as hf
from torch import fx

import sylvester as sv
from sylvester.backends.cuda import backend, emulated, runtime
from sylvester.backends.cuda.backend import Cuda
from sylvester.backends.reference import Reference
from sylvester.compiler.errors import CompileError, ContractBroken, Unsupported
from sylvester.compiler.ledger import Row
from sylvester.compiler.manifest import read
from sylvester.compiler.parallel_ops import RANKS
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.program import Program
from sylvester.compiler.progress import silent
from sylvester.passes import tensor_parallel
from sylvester.passes.tensor_parallel import TensorParallel
from tests import rank, zoo
from tests.graphs import ADD, EMBEDDING, GELU, LINEAR, RESHAPE, Builder, aten, block, decoder, dialect
from tests.programs import reasons

MODELS = {
    "llama-tied": zoo.causal(
        hf.LlamaForCausalLM, hf.LlamaConfig, 2, **(zoo.GQA | {"num_hidden_layers": 2}), tie_word_embeddings=True
    ),
    "gpt2": zoo.causal(
        hf.GPT2LMHeadModel, hf.GPT2Config, 2, n_layer=2, n_embd=48, n_head=6, n_positions=64, **zoo.ENDS
    ),
}
"""Grouped heads and a tied head; queries, keys and values in one layer, and biases."""
ROOT = Path(__file__).parent.parent
WORLD = 2
TOLERANCE = 1e-5


def split(program: Program, number: int = 1) -> tuple[Program, Row]:
    done, ledger = Pipeline((TensorParallel(number, WORLD),)).run(program)
    assert ledger.rows[0].error is not None
    assert ledger.rows[0].error < 2e-6
    return done, ledger.rows[0]


def heads_of(count: int, ffn: int = 52, cached: bool = False, mask: tuple[int, ...] = ()) -> Program:
    """Two blocks of width 24 with `count` key/value heads for 4 query heads of 6 features."""
    b = Builder()
    x, caches = b.input(2, 5, 24), {}
    bias = b.input(*mask) if mask else None
    for n in range(2):
        normed = b.rms(x, f"{n}.norm")
        q = b.heads(b.linear(normed, f"{n}.q", 24), 4)
        k, v = (b.heads(b.linear(normed, f"{n}.{part}", 6 * count), count) for part in "kv")
        if cached:
            zero = b.call(aten.full.default, [], 0, dtype=torch.int64)
            for name, new in ((f"k{n}", k), (f"v{n}", v)):
                caches[name] = b.call(dialect.kv_update.default, b.state(name, 2, count, 8, 6), new, zero)
        x = b.call(ADD, x, b.linear(b.joined(b.attention(q, k, v, bias)), f"{n}.o", 24))
        hidden = b.call(GELU, b.linear(b.rms(x, f"{n}.norm2"), f"{n}.up", ffn, bias=True))
        x = b.call(ADD, x, b.linear(hidden, f"{n}.down", 24, bias=True))
    return b.returns(x, **caches)


def test_each_rank_keeps_its_rows_and_columns() -> None:
    program = heads_of(2)

    done, row = split(program)

    before, after = program.weights, done.weights
    assert row.changes.counts() == {"split attention": 2, "split ffn": 2}
    assert torch.equal(after["0.q.weight"], before["0.q.weight"][12:])
    assert torch.equal(after["0.k.weight"], before["0.k.weight"][6:])
    assert torch.equal(after["1.o.weight"], before["1.o.weight"][:, 12:])
    assert torch.equal(after["1.up.bias"], before["1.up.bias"][26:])
    assert torch.equal(after["1.down.weight"], before["1.down.weight"][:, 26:])
    assert torch.equal(after["1.down.bias"], before["1.down.bias"])
    assert torch.equal(after["0.norm"], before["0.norm"])
    assert done.info[RANKS] == {"rank": 1, "world": 2}


def test_a_part_is_summed_before_its_bias() -> None:
    done, _ = split(heads_of(4))

    sums = done.main.calls(dialect.all_reduce.default)
    assert len(sums) == 4
    assert all(node.args[0].target is LINEAR and len(node.args[0].args) < 3 for node in sums)
    down = [next(iter(node.users)) for node in sums[1::2]]
    assert [user.target for user in down] == [ADD, ADD]
    assert [user.args[1].meta["bind"].key for user in down] == ["0.down.bias", "1.down.bias"]


def test_caches_hold_the_heads_of_the_rank() -> None:
    done, _ = split(heads_of(2, cached=True), 0)

    assert {slot.shape for slot in done.state.values()} == {(2, 1, 8, 6)}


@pytest.mark.parametrize(("heads", "world", "reason"), [
    (1, 2, "found 4 query heads and 1 key/value heads, which 2 ranks do not divide"),
    (2, 4, "found 4 query heads and 2 key/value heads, which 4 ranks do not divide"),
])  # fmt: skip
def test_attention_stays_whole_where_ranks_do_not_divide_its_heads(heads: int, world: int, reason: str) -> None:
    program = heads_of(heads, cached=True)
    done, ledger = Pipeline((TensorParallel(0, world),)).run(program)

    assert ledger.rows[0].changes.counts() == {"split ffn": 2}
    assert reasons(ledger) == [reason]
    assert done.state == program.state
    assert torch.equal(done.weights["0.q.weight"], program.weights["0.q.weight"])


@pytest.mark.parametrize(
    ("mask", "found"), [((2, 1, 5, 5), []), ((1, 4, 5, 5), ["the mask has a value for each head"])]
)
def test_masks_are_the_same_for_all_heads(mask: tuple[int, ...], found: list[str]) -> None:
    _, ledger = Pipeline((TensorParallel(1, 2),)).run(heads_of(4, mask=mask))

    assert reasons(ledger) == found


def test_hidden_features_that_ranks_do_not_divide() -> None:
    _, ledger = Pipeline((TensorParallel(0, 2),)).run(heads_of(2, ffn=51))

    assert ledger.rows[0].changes.counts() == {"split attention": 2}
    assert reasons(ledger) == ["found 51 features, which 2 ranks do not divide"]


def test_nothing_to_split_is_an_error() -> None:
    with pytest.raises(CompileError, match=r"can split no part between 5 ranks: found 3 query heads.*; found 52"):
        Pipeline((TensorParallel(0, 5),)).run(decoder())


def twice(b: Builder, x: fx.Node) -> fx.Node:
    """Hidden features that are averaged before the last layer."""
    return b.rms(x)


def cut(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(RESHAPE, b.call(aten.slice.Tensor, x, 2, 0, 48), [2, 5, 48])


@pytest.mark.parametrize(
    ("between", "reason"), [(twice, "averages over what would be split"), (cut, "a slice takes some of what")]
)
def test_what_needs_all_features_stays_whole(between: Callable[[Builder, fx.Node], fx.Node], reason: str) -> None:
    b = Builder()
    x = b.call(EMBEDDING, b.weight("table", 31, 24), b.ids(2, 5, high=31))
    x = block(b, block(b, x, "0", b.rms, heads=4), "1", b.rms, heads=4)
    for n in range(2):
        hidden = between(b, b.linear(b.rms(x, f"norm{n}"), f"up{n}", 52))
        x = b.call(ADD, x, b.linear(hidden, f"down{n}", 24))

    _, ledger = Pipeline((TensorParallel(0, 2),)).run(b.returns(x))

    assert ledger.rows[0].changes.counts() == {"split attention": 2, "split ffn": 2}
    assert [reason in found for found in reasons(ledger)] == [True]


def test_ranks_that_do_not_add_up_break_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "all_reduce", type("op", (), {"target": aten.clone.default}))

    with pytest.raises(ContractBroken, match="relative error"):
        Pipeline((TensorParallel(0, 2),)).run(heads_of(2))


@pytest.mark.parametrize(("number", "world", "message"), [
    (0, 1, "world is 1, expected a whole number from 2"),
    (2, 2, "rank is 2, expected a whole number below the world of 2"),
    (-1, 2, "rank is -1, expected a whole number from 0"),
])  # fmt: skip
def test_options_are_checked(number: int, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorParallel(number, world)


def test_a_part_is_not_split_again() -> None:
    done, _ = split(heads_of(4))

    with pytest.raises(CompileError, match="split already"):
        Pipeline((TensorParallel(0, 2),)).run(done)


def test_one_rank_alone_does_not_run_and_other_targets_refuse() -> None:
    steps = "tensor-parallel(rank=0, world=2)"
    refused = pytest.raises(CompileError, match=r"rank 0 of 2, but torch\.distributed has no process group")
    with sv.compile(heads_of(2), target="reference", passes=steps) as compiled, refused:
        compiled(x0=torch.zeros(2, 5, 24))
    with pytest.raises(Unsupported, match=r"cpu has no lowering for \['all_reduce'\]"):
        sv.compile(heads_of(2), passes=steps)


def traced(entry: zoo.Entry) -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = entry.build().eval()
        zoo.randomise(model)
        return sv.trace(model, entry.sample(2, 11))


def alone(program: Program) -> dict[str, np.ndarray]:
    """What the whole program gives for what `rank.run` reads."""
    ids = torch.from_numpy(rank.IDS)
    state = {name: torch.zeros(2, *slot.shape[1:]) for name, slot in program.state.items()}
    first = program.run("prefill", {"input_ids": ids[:, : rank.KEPT]}, state)
    step = {"input_ids": ids[:, rank.KEPT :], "past": torch.tensor(rank.KEPT)}
    then = program.run("decode", step, {name: first[name] for name in state})
    return {"prefill": first["logits"].numpy(), "decode": then["logits"].numpy()}


def test_sums_over_ranks_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that have the same part: each sum is twice what one has."""
    monkeypatch.setattr(backend, "build", emulated.build)
    program = split(heads_of(2), 0)[0]
    Cuda().build(program, sv.Target("cuda", arch="sm_90"), tmp_path, silent).seal(tmp_path)
    runner = runtime.GpuRunner(tmp_path, read(tmp_path), emulated.Emulated())
    given = {"x0": np.random.default_rng(0).standard_normal((2, 5, 24), np.float32)}
    with pytest.raises(CompileError, match=r"rank 0 of 2, but torch\.distributed has no process group"):
        runner.run("forward", given)
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda numbers: numbers.mul_(2))
    exact = program.run("forward", {"x0": torch.from_numpy(given["x0"])})
    for name, found in runner.run("forward", given).items():
        np.testing.assert_allclose(found, exact[name], atol=1e-5 * float(exact[name].abs().max()))
    assert "sums over ranks" in runner.notes[0]
    runner.close()


def built(program: Program, target: str, folder: Path) -> None:
    """A part's artefact, as the rank opens it."""
    folder.mkdir()
    if target == "reference":
        Reference().build(program, sv.Target("reference"), folder, silent).seal(folder)
        return
    with mock.patch.object(backend, "build", emulated.build):
        Cuda().build(program, sv.Target("cuda", arch="sm_90"), folder, silent).seal(folder)


BY_NIGHT = [pytest.param(t, m, marks=pytest.mark.nightly) for t, m in (("reference", "gpt2"), ("cuda", "llama-tied"))]


@pytest.mark.parametrize(("target", "model"), [("reference", "llama-tied"), *BY_NIGHT])
def test_two_processes_compute_what_one_does(tmp_path: Path, target: str, model: str) -> None:
    program = traced(MODELS[model])
    expected = alone(program)
    for number in range(WORLD):
        built(split(program, number)[0], target, tmp_path / f"{model}-{number}")

    command = [sys.executable, "-m", "tests.rank", str(tmp_path)]
    processes = [subprocess.Popen([*command, str(n), str(WORLD), model], cwd=ROOT) for n in range(WORLD)]
    assert [process.wait(timeout=600) for process in processes] == [0] * WORLD

    for number in range(WORLD):
        found = np.load(tmp_path / f"{model}-{number}.npz")
        for key, exact in expected.items():
            assert np.abs(found[key] - exact).max() <= TOLERANCE * np.abs(exact).max(), (number, key)

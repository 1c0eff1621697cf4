"""Feed-forward parts that saturated tokens skip: masks, calibration, branches in the plan that leave kernels out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sylvester as sv
from sylvester.backends.kernel_table import read_table
from sylvester.compiler.artefact import open_runner
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import attention, kv_update
from sylvester.compiler.pipeline import Pipeline
from sylvester.compiler.skip_ops import add_unless, layers_to_skip
from sylvester.compiler.stages import DECODE
from sylvester.compiler.verify import verify
from sylvester.passes import DepthSchedule, Quantize, RotateHadamard, SkipFFN
from tests import zoo
from tests.depth_cases import decoded, ids, rewritten, traced

CPU = sv.Target("cpu", isas=("avx2",))
ALL = {"cold_start": 0, "cold_end": 0, "warmup": 0}


def calibrated(name):
    program = traced(name).clone()
    key = next(iter(program.entries["prefill"].examples))
    program.calibration = Calibration(tuple({key: ids(24, 1)} for _ in range(4)))
    return program


def shares(changes):
    return [f.value for f in changes.figures if f.name == "share of tokens that skip the FFN"]


@pytest.mark.parametrize("name", zoo.DIVERSE)
def test_a_threshold_above_one_changes_no_bit(name):
    tokens = ids()
    program = rewritten(name, SkipFFN(threshold=1.5, **ALL))

    verify(program)
    assert len(program.entries[DECODE].calls(add_unless.target)) == zoo.case(name).blocks - 1
    assert torch.equal(decoded(program, tokens), decoded(traced(name), tokens))


@pytest.mark.parametrize("name", ["llama-gqa", "phi", "opt"])
def test_a_threshold_of_minus_one_runs_one_part(name):
    """As if the parts after the first were dropped."""
    tokens, count = ids(), zoo.case(name).blocks
    program = rewritten(name, SkipFFN(threshold=-1.0, **ALL))
    dropped = rewritten(name, sv.passes.DropSublayers(ffn=tuple(range(1, count)), phase="decode"))

    torch.testing.assert_close(decoded(program, tokens), decoded(dropped, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("run", "gone"), [(1, (1, 3)), (2, (1, 2))])
def test_a_run_ends_after_so_many_parts(run, gone):
    tokens = ids()
    program = rewritten("llama-gqa", SkipFFN(threshold=-1.0, max_run=run, **ALL))
    dropped = rewritten("llama-gqa", sv.passes.DropSublayers(ffn=gone, phase="decode"))

    torch.testing.assert_close(decoded(program, tokens), decoded(dropped, tokens), rtol=1e-4, atol=1e-4)


def test_attention_and_caches_are_those_of_every_layer():
    program = rewritten("llama-gqa", SkipFFN(threshold=0.9, **ALL))

    assert len(program.entries[DECODE].calls(attention.target)) == 4
    assert len(program.entries[DECODE].calls(kv_update.target)) == 8
    assert not program.entries["prefill"].calls(add_unless.target)


def test_cold_layers_always_run():
    program = rewritten("opt", SkipFFN(threshold=-1.0, cold_start=1, cold_end=2, warmup=0))

    assert len(program.entries[DECODE].calls(add_unless.target)) == 1  # five layers, two of them between, one runs
    assert len(program.entries[DECODE].calls(layers_to_skip.target)) == 1


@pytest.mark.parametrize("target", [0.2, 0.5])
def test_the_share_skipped_is_the_target(target):
    program, ledger = Pipeline((SkipFFN(target=target, **ALL),)).run(calibrated("llama-gqa"))

    found = sum(shares(ledger.rows[0].changes)) / 4
    assert abs(found - target) <= 0.02
    assert any("of all feed-forward parts are skipped" in note for note in ledger.rows[0].changes.notes)
    verify(program)


def test_the_first_generated_tokens_run_everything():
    tokens = ids(9, 1)
    program = rewritten("llama-gqa", SkipFFN(threshold=-1.0, cold_start=0, cold_end=0, warmup=4))
    whole, found = decoded(traced("llama-gqa"), tokens), decoded(program, tokens)

    torch.testing.assert_close(found[:, :4], whole[:, :4], rtol=1e-5, atol=1e-5)
    assert (found[:, 4:] - whole[:, 4:]).abs().max() > 1e-2


def test_static_parts_are_the_same_for_every_token():
    step = SkipFFN(target=0.5, static=True, cold_start=1, cold_end=0)
    program, ledger = Pipeline((step,)).run(calibrated("llama-gqa"))

    assert not program.entries[DECODE].calls(add_unless.target)
    assert len(program.info["skipped"]["decode"]["ffn"]) == 2
    assert 0 not in program.info["skipped"]["decode"]["ffn"]
    assert len(ledger.rows[0].changes.figures) == 3


@pytest.mark.parametrize("name", ["llama-gqa", "phi", "gpt2"])
def test_rows_of_a_batch_do_not_move_each_other(name):
    steps = (SkipFFN(threshold=0.95, **ALL),)
    tokens = ids(6, 3)
    with sv.compile(traced(name), passes=steps, target=CPU, threads=2) as compiled:
        together = compiled.generate(tokens, 12)
        alone = [compiled.generate(row[None], 12) for row in tokens]
    with sv.compile(traced(name), passes=steps, target="reference") as reference:
        assert torch.equal(reference.generate(tokens, 12), together)
    for row, single in zip(together, alone, strict=True):
        assert torch.equal(row[: single.shape[1]], single[0])


@pytest.fixture(scope="module")
def wide():
    """A model with enough work in a step for two threads."""
    config = LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    zoo.randomise(model)
    return sv.trace(model, {"input_ids": ids(5)})


@pytest.mark.parametrize(("threshold", "ran"), [(-1.0, [True, False, False, False]), (1.5, [True] * 4)])
def test_kernels_of_skipped_parts_do_not_run(wide, threshold, ran, tmp_path):
    """The profile of a step books no time for them; with a threshold above one it does."""
    with sv.compile(wide, passes=(SkipFFN(threshold=threshold, **ALL),), target=CPU) as compiled:
        compiled.save(tmp_path / "artefact")

    for threads in (1, 2):
        assert booked(tmp_path / "artefact", threads) == ran


def booked(folder, threads):
    """For each layer, whether the kernels of its feed-forward part took time in a decoding step."""
    runner = open_runner(folder, threads)
    try:
        tokens = {"input_ids": ids(5, 1).numpy()}
        state = runner.new_state("prefill", tokens)
        runner.run("prefill", tokens, state)
        state.position = 5
        specs = read_table(folder).entries[DECODE]
        times = np.zeros(len(specs))
        runner.run(DECODE, {"input_ids": ids(1, 1).numpy()}, state, times)
    finally:
        runner.close()
    found = []
    for layer in range(4):
        place = f"layers.{layer}.mlp.down_proj"
        mine = [t for spec, t in zip(specs, times, strict=True) if any(place in label for label in spec.labels)]
        assert mine
        found.append(all(t > 0 for t in mine))
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("batch", [1, 3])
def test_two_threads_take_the_same_branches(wide, batch):
    """Thresholds between which tokens differ, over many steps: both threads decide alike."""
    tokens = ids(6, batch)
    steps = (SkipFFN(threshold=0.75, **ALL),)
    with sv.compile(wide, passes=steps, target="reference") as reference:
        expected = reference.generate(tokens, 50)
    for threads in (1, 2):
        with sv.compile(wide, passes=steps, target=CPU, threads=threads) as compiled:
            assert torch.equal(compiled.generate(tokens, 50), expected)


def test_quantised_and_rotated_parts_are_skipped_alike():
    tokens = ids(6)
    steps = (RotateHadamard(), SkipFFN(threshold=0.95, **ALL), Quantize(weights=8))
    with sv.compile(traced("llama-gqa"), passes=steps, target="reference") as reference:
        expected = reference.generate(tokens, 10)
    with sv.compile(traced("llama-gqa"), passes=steps, target=CPU) as compiled:
        assert torch.equal(compiled.generate(tokens, 10), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.2, "threshold": 0.9}, "either target or threshold"),
        ({"target": 1.5}, "a number between 0 and 1"),
        ({"cold_start": -2}, "cold_start is -2"),
        ({"threshold": 0.9, "static": True}, "no threshold"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SkipFFN(**options)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("bert", (SkipFFN(threshold=0.9),), "needs an entry 'decode'"),
        ("llama-gqa", (SkipFFN(),), "a target is calibrated on data, found none"),
        ("llama-gqa", (SkipFFN(threshold=0.9, cold_start=2, cold_end=2),), "no feed-forward part can be skipped"),
        ("llama-gqa", (DepthSchedule(min_layers=2), SkipFFN(threshold=0.9)), "decoding has stages already"),
    ],
)
def test_what_a_program_does_not_allow_is_an_error(name, steps, message):
    with pytest.raises(CompileError, match=message):
        rewritten(name, *steps)


def test_a_target_out_of_reach_says_what_is_possible():
    with pytest.raises(CompileError, match=r"target=0.9 is not reachable: of 4 feed-forward parts at most 0.75"):
        Pipeline((SkipFFN(target=0.9, **ALL),)).run(calibrated("llama-gqa"))


def test_quality_against_the_share_skipped_is_in_the_ledger():
    for step in (SkipFFN(target=0.5, **ALL), sv.passes.SkipLayers(speedup=2)):
        ledger = Pipeline((step,)).run(calibrated("llama-gqa"))[1]

        points = {float(f.where): f.value for f in ledger.rows[0].changes.figures if f.name == "KL at skip ratio"}
        assert max(points) == 0.5
        assert all(kl > 0 for kl in points.values())

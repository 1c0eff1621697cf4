"""The CPU runtime on a hand-written artefact: binding, errors, state, threads, forks, variants."""

from __future__ import annotations

import dataclasses
import multiprocessing
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from sylvester.backends import cpu_runtime, memory
from sylvester.backends.tensor_file import map_tensors
from sylvester.compiler import artefact, knobs
from sylvester.compiler.errors import ArtefactError, CompileError, InputError, Unsupported
from sylvester.compiler.manifest import read
from tests import artefacts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return artefacts.write(tmp_path_factory.mktemp("artefact") / "lm")


@pytest.fixture
def engine(folder):
    engine = artefact.open_runner(folder)
    yield engine
    engine.close()


def ids(*rows):
    return np.array(rows, np.int64)


def prefill(engine, tokens, entry="prefill"):
    state = engine.new_state("prefill", {"input_ids": tokens})
    return engine.run(entry, {"input_ids": tokens}, state)["logits"], state


def test_outputs_are_fresh_and_right(engine):
    logits, _ = prefill(engine, ids([3, 1], [2, 2]))
    again, _ = prefill(engine, ids([3, 1], [2, 2]))

    assert logits.argmax(-1).tolist() == [[6, 4], [4, 4]]
    assert logits.max() == artefacts.SCALE
    assert not np.shares_memory(logits, again)


def test_state_carries_over_to_decode(engine):
    _, state = prefill(engine, ids([3, 1]))
    state.position = 2

    logits = engine.run("decode", {"input_ids": ids([4])}, state)["logits"]

    assert logits.argmax(-1).tolist() == [[7]]
    assert state.arrays["first"][0, :4].tolist() == [3, 1, 4, 0]


def test_two_states_do_not_mix(engine):
    _, one = prefill(engine, ids([3, 1]))
    _, two = prefill(engine, ids([5, 1]))
    one.position = two.position = 2
    step = {"input_ids": ids([1])}

    found = [engine.run("decode", step, state)["logits"].argmax() for state in (one, two, one)]

    assert found == [4, 6, 4]


def test_strided_inputs_are_made_contiguous(engine):
    strided = ids([3, 7, 1, 7])[:, ::2]

    assert prefill(engine, strided)[0].argmax(-1).tolist() == [[6, 4]]


def test_arena_grows_with_the_batch(engine):
    for rows in (1, 40, 2):
        logits, _ = prefill(engine, np.full((rows, 16), 2))
        assert logits.shape == (rows, 16, artefacts.VOCAB)
        assert (logits.argmax(-1) == 4).all()


REFUSED = {
    "wrong name": ({"inputs": ids([1])}, "unexpected input 'inputs', expected ['input_ids']"),
    "missing": ({}, "missing input 'input_ids'"),
    "the position is not the caller's": ({"input_ids": ids([1]), "past": np.array(0)}, "unexpected input 'past'"),
    "dtype": ({"input_ids": np.array([[1]], np.int32)}, "'input_ids' has dtype int32, expected int64"),
    "float": ({"input_ids": np.array([[1.0]])}, "'input_ids' has dtype float64, expected int64"),
    "rank": ({"input_ids": np.array([1])}, "'input_ids' has shape [1], expected [s0, s1]"),
    "list": ({"input_ids": [[1]]}, "'input_ids' is a list, expected a tensor or a numpy array of int64"),
    "too long": ({"input_ids": np.ones((1, 17), np.int64)}, "17 in dimension 1, above the compiled maximum of 16"),
    "empty": ({"input_ids": np.ones((1, 0), np.int64)}, "0 in dimension 1, below the compiled minimum of 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_inputs_are_refused(engine, case):
    inputs, message = REFUSED[case]

    with pytest.raises(InputError) as error:
        engine.new_state("prefill", inputs)

    assert message in error.value.message


def test_close_name_is_suggested(engine):
    with pytest.raises(InputError) as error:
        engine.new_state("prefill", {"input_id": ids([1])})

    assert error.value.hint == "did you mean 'input_ids'?"


def test_batch_of_state_and_input_must_agree(engine):
    _, state = prefill(engine, ids([3, 1]))

    with pytest.raises(InputError, match=r"'first' has shape \[1, 16\], expected \[2, 16\]"):
        engine.run("decode", {"input_ids": ids([1], [1])}, state)


def test_missing_state_is_refused(engine):
    with pytest.raises(InputError, match="works on a state"):
        engine.run("decode", {"input_ids": ids([1])})


def test_token_out_of_range_is_named(engine):
    with pytest.raises(InputError, match="index 5000 in input 'input_ids' is out of range"):
        prefill(engine, ids([1, 5000]))


def test_unknown_entry_is_refused(engine):
    with pytest.raises(CompileError, match="no entry named 'verify'"):
        prefill(engine, ids([1]), entry="verify")


def test_closed_engine_refuses(folder):
    engine = artefact.open_runner(folder)
    prefill(engine, ids([1]))
    engine.close()

    with pytest.raises(CompileError, match="closed"):
        prefill(engine, ids([1]))


def test_threads_come_from_argument_then_knob_then_manifest(folder, monkeypatch):
    assert artefact.open_runner(folder).threads == artefacts.MANIFEST.threads
    monkeypatch.setenv(knobs.THREADS.name, "3")
    assert artefact.open_runner(folder).threads == 3
    assert artefact.open_runner(folder, threads=5).threads == 5
    with pytest.raises(CompileError, match="threads must be at least 1, found 0"):
        artefact.open_runner(folder, threads=0)
    with pytest.raises(CompileError, match="threads must be at most 1024, found 20000"):
        artefact.open_runner(folder, threads=20000)
    monkeypatch.setenv(knobs.THREADS.name, "20000")
    with pytest.raises(CompileError, match="threads must be at most 1024, found 20000"):
        artefact.open_runner(folder)


def test_threads_of_python_share_an_engine(engine):
    wrong = []

    def work(token):
        for _ in range(200):
            logits, _ = prefill(engine, np.full((1, 1 + token), token))
            if (logits.argmax(-1) != 2 * token % artefacts.VOCAB).any():
                wrong.append(token)

    workers = [threading.Thread(target=work, args=(token,)) for token in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert wrong == []


def run_in_child(engine, pipe):
    pipe.send(int(prefill(engine, ids([3]))[0].argmax()))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_child_makes_its_own_team(engine):
    prefill(engine, ids([3]))
    here, there = multiprocessing.Pipe()
    with engine._lock:
        child = multiprocessing.get_context("fork").Process(target=run_in_child, args=(engine, there))
        child.start()

    assert here.poll(20)
    assert here.recv() == 6
    child.join()


def test_best_variant_is_taken_and_the_knob_forces_one(folder, monkeypatch):
    assert artefact.open_runner(folder).isa == "avx2"
    monkeypatch.setenv(knobs.ISA.name, "scalar")
    assert artefact.open_runner(folder).isa == "scalar"


@pytest.mark.parametrize(
    ("isas", "forced", "message"),
    [
        (("scalar", "avx2"), "avx512", "but the artefact has ['scalar', 'avx2']"),
        (("scalar", "avx2", "avx512"), "avx512", "but this CPU has avx2 at most"),
    ],
)
def test_impossible_variant_is_refused(folder, monkeypatch, isas, forced, message):
    monkeypatch.setenv(knobs.ISA.name, forced)

    with pytest.raises(Unsupported) as error:
        cpu_runtime.load(folder, dataclasses.replace(artefacts.MANIFEST, isas=isas))

    assert message in error.value.message


def test_other_abi_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"avx2.so has ABI 7, this version calls ABI 2"):
        artefact.open_runner(artefacts.write(tmp_path / "old", abi=7))


def test_code_that_is_no_library_is_refused(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "code" / "scalar.so").write_bytes(b"not a library")
    read(broken).seal(broken)

    with pytest.raises(ArtefactError, match="cannot load"):
        artefact.open_runner(broken)


def test_mapped_weights_are_read_only(folder):
    scale = map_tensors(folder / "weights.safetensors")["scale"]

    assert scale.tolist() == [artefacts.SCALE]
    assert not scale.flags.writeable


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{}"[:9]])
def test_broken_weight_file_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content or b"\0")

    with pytest.raises(ArtefactError, match="no safetensors header"):
        map_tensors(path)


def test_aligned_keeps_what_is_aligned():
    straight = memory.aligned_empty((3, 5), "float32")
    shifted = memory.aligned_zeros((17,), "float32")[1:]

    assert memory.aligned(straight) is straight
    assert memory.aligned(shifted).ctypes.data % memory.LINE == 0
    assert memory.aligned(shifted).tolist() == shifted.tolist()


def test_running_needs_no_torch(folder):
    script = (
        "import sys, numpy as np, sylvester as sv\n"
        f"lm = sv.load({str(folder)!r})\n"
        "assert lm.generate(np.array([[3, 1]]), max_new_tokens=3).tolist() == [[3, 1, 4, 7, 2]]\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr

"""A real language model as a CPU artefact: threads agree, text is the model's, nothing needs torch, clear errors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.compiler import knobs
from sylvester.compiler.artefact import open_runner
from sylvester.compiler.errors import InputError, ToolchainMissing
from tests import zoo

MAX_LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    case = zoo.case("llama-gqa")
    target = sv.Target("cpu", isas=("scalar",), max_length=MAX_LENGTH)
    with sv.compile(case.model, case.inputs, target=target) as compiled:
        return compiled.save(tmp_path_factory.mktemp("cpu") / "lm")


def ids(rows, length):
    return np.random.default_rng(length).integers(0, zoo.VOCAB, (rows, length))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_the_result(folder, threads):
    """Lengths around the sizes where steps begin to be shared between threads."""
    with sv.load(folder, threads=1) as one, sv.load(folder, threads=threads) as many:
        for length in (1, 2, 3, 4, 5, 7, 8, 16, 33):
            for _ in range(3):
                np.testing.assert_array_equal(many(ids(1, length)).logits, one(ids(1, length)).logits)


def test_greedy_tokens_are_those_of_the_model(folder):
    model, prompt = zoo.case("llama-gqa").model, ids(2, 5)
    expected = torch.from_numpy(prompt)
    with torch.no_grad():
        for _ in range(30):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)

    with sv.load(folder, threads=2) as lm:
        assert lm.generate(prompt, 30, stop=()).tolist() == expected.tolist()


def test_token_outside_the_vocabulary_is_an_error_every_time(folder):
    with sv.load(folder) as lm:
        for token in (zoo.VOCAB, -1, 10**12):
            with pytest.raises(InputError, match=f"index {token} in input 'input_ids' is out of range"):
                lm(np.array([[1, token, 2]]))
        assert np.isfinite(lm(ids(1, 3)).logits).all()


def test_length_above_the_compiled_maximum(folder):
    with sv.load(folder) as lm, pytest.raises(InputError, match=f"above the compiled maximum of {MAX_LENGTH}"):
        lm(ids(1, MAX_LENGTH + 1))


def test_full_state_is_an_error_not_a_write_outside(folder):
    runner = open_runner(folder)
    step = {"input_ids": ids(1, 4)}
    state = runner.new_state("decode", step)
    runner.run("decode", step, state)

    for position in (MAX_LENGTH - 3, MAX_LENGTH, 10**9, -1):
        state.position = position
        with pytest.raises(InputError, match=f"no room in the state for this call at position {position}"):
            runner.run("decode", step, state)
    state.position = MAX_LENGTH - 4
    assert np.isfinite(runner.run("decode", step, state)["logits"]).all()
    runner.close()


def test_generation_needs_no_torch(folder):
    script = (
        "import sys, numpy as np, sylvester as sv\n"
        f"print(sv.load({str(folder)!r}).generate(np.ones((1, 4), np.int64), 5, stop=()).shape)\n"
        "sys.exit(bool({'torch', 'transformers', 'safetensors', 'networkx'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, "(1, 9)\n"), done.stderr


def test_missing_compiler_is_an_error_with_a_way_out(monkeypatch):
    case = zoo.case("mlp")
    monkeypatch.setenv(knobs.CC.name, "no-such-compiler")

    with pytest.raises(ToolchainMissing, match="no such compiler: 'no-such-compiler'") as error:
        sv.compile(case.model, case.inputs, target="cpu")

    assert "pip install ziglang" in error.value.hint


def test_an_artefact_that_replaced_another_runs_its_own_code(tmp_path, monkeypatch):
    """dlopen knows loaded code by its path, whatever lies there now, and a relative one whatever the folder is."""
    monkeypatch.chdir(tmp_path)
    x = torch.randn(2, 8)
    for model in (torch.nn.Softmax(-1), torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.ReLU())):
        with sv.compile(model, (x,), target=sv.Target("cpu", isas=("scalar",))) as compiled:
            compiled.save("out")
        found = sv.load("out")(x)
        torch.testing.assert_close(found, model(x))

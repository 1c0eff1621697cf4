"""Calls and generation of artefacts for GPUs on an emulated device."""

from __future__ import annotations

import numpy as np
import pytest

import sylvester as sv
from sylvester.backends.cuda import runtime
from sylvester.backends.cuda.emulated import Emulated
from sylvester.compiler.errors import CompileError, InputError
from tests import cuda_models


@pytest.fixture
def reference():
    return cuda_models.reference()


@pytest.fixture
def compiled():
    with cuda_models.opened(cuda_models.folder(), Emulated()) as made:
        yield made


def device_of(compiled):
    return compiled._runner.device


def test_a_call_gives_what_the_model_gives(compiled, reference):
    given = cuda_models.ids(2, 4)
    np.testing.assert_allclose(compiled(given)["logits"], reference(given)["logits"], atol=1e-5)


def test_greedy_tokens_of_a_batch_are_those_of_the_model(compiled, reference):
    prompt = cuda_models.ids(2, 9)
    assert compiled.generate(prompt, 3).tolist() == reference.generate(prompt, 3).tolist()


def test_memory_is_given_back():
    compiled = cuda_models.opened(cuda_models.folder(), Emulated())
    assert device_of(compiled).held
    compiled.close()
    assert not device_of(compiled).held


def test_accesses_outside_of_memory_are_seen():
    device = Emulated()
    address = device.allocate(8)
    device.write(address, np.zeros(1, np.int64))
    with pytest.raises(AssertionError, match="8 bytes at"):
        device.read(address + 4, np.zeros(1, np.int64))


def test_graphs_give_the_tokens_of_the_model(compiled, reference):
    prompt = cuda_models.ids(1, 5)
    assert compiled.generate(prompt, 6).tolist() == reference.generate(prompt, 6).tolist()
    assert device_of(compiled).replays == 2 + 4, "calls and choices"


def test_caches_stay_on_the_device(compiled):
    runner, device = compiled._runner, device_of(compiled)
    prompt = cuda_models.ids(1, 4)
    state = runner.new_state("prefill", {"input_ids": prompt})
    runner.run("prefill", {"input_ids": prompt}, state)
    state.position, device.sent, device.fetched = 4, 0, 0
    outputs = runner.run("decode", {"input_ids": prompt[:, :1]}, state)
    assert device.sent == 512, "an id and the position, padded"
    assert device.fetched == outputs["logits"].nbytes + runtime.FLAG * 2


def test_rows_share_the_beginning_of_their_prompts(compiled, reference):
    prompt = np.repeat(cuda_models.ids(1, 6), 2, 0)
    prompt[1, -1] += 1
    assert compiled.generate(prompt, 1, share=True).tolist() == reference.generate(prompt, 1).tolist()
    assert compiled.sharing.batches == 1


def test_a_closed_artefact_says_so():
    compiled = cuda_models.opened(cuda_models.folder(), Emulated())
    compiled.close()
    with pytest.raises(CompileError, match="the artefact is closed"):
        compiled.generate(cuda_models.ids(1, 3), 1)


def test_an_error_is_reported_once(compiled):
    with pytest.raises(InputError, match=f"index {cuda_models.VOCAB} is out of range"):
        compiled(np.full((1, 3), cuda_models.VOCAB))
    compiled(cuda_models.ids(1, 3))


def test_arrays_of_the_host_are_no_caches(compiled):
    runner, inputs = compiled._runner, {"input_ids": cuda_models.ids(1, 2)}
    state = runner.new_state("prefill", inputs)
    name = next(iter(state.arrays))
    state.arrays[name] = np.asarray(state.arrays[name])
    with pytest.raises(InputError, match=r"is a ndarray of shape .*, expected a row-major array of the device"):
        runner.run("prefill", inputs, state)


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["quantize-cache(bits=8)", "quantize-cache(bits=4)", "quantize(weights=8)"])
def test_tokens_of_lossy_models(tmp_path, step):
    prompt, passes = cuda_models.ids(2, 5), [step]
    folder = cuda_models.saved(cuda_models.program(), tmp_path / "made", passes=passes)
    with (
        cuda_models.opened(folder, Emulated()) as compiled,
        sv.compile(cuda_models.program().clone(), target="reference", passes=passes) as reference,
    ):
        assert compiled.generate(prompt, 5).tolist() == reference.generate(prompt, 5).tolist()

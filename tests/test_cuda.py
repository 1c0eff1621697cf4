"""The target `cuda` on machines without a GPU: numbers of whole programs, artefacts, calls on a null device."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.backends.cuda import calls, runtime
from sylvester.backends.cuda.device import NullDevice
from sylvester.backends.cuda.plan_file import size_text
from sylvester.backends.cuda.simulated import Simulated
from sylvester.codegen.gpu_plan import gpu_entries
from sylvester.codegen.index import Size, atom, index
from sylvester.compiler.check import evaluate
from sylvester.compiler.errors import CompileError, InputError, Unsupported
from sylvester.compiler.manifest import read
from sylvester.compiler.program import value
from sylvester.compiler.sizes import evaluate as number
from tests import zoo
from tests.graphs import decoder

ZOO = zoo.NAMES


def simulated(program, name):
    """Outputs and the state after a call of an entry on its examples, with Triton's interpreter."""
    entry, made = program.entries[name], gpu_entries(program)[name]
    sizes = {}
    for node in entry.placeholders("input"):
        example = entry.examples[node.meta["bind"].key]
        for n, size in zip(value(node).shape, example.shape, strict=True):
            if isinstance(n, torch.SymInt):
                sizes[str(n.node.expr)] = size
    given = {**entry.examples, **{k: program.weights[k] for k in program.weights}}
    for key, slot in program.state.items():
        shape = [sizes[str(n.node.expr)] if isinstance(n, torch.SymInt) else n for n in slot.shape]
        given[key] = torch.zeros(shape, dtype=slot.dtype)
    return Simulated(made, given, sizes).run()


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
def test_a_decoder_by_the_interpreter(norm):
    program = decoder(norm)
    expected = evaluate(program)
    found = simulated(program, "forward")
    torch.testing.assert_close(found["y0"], expected["forward"]["y0"], atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda") / "made"
    with sv.compile(zoo.traced("llama-tied").clone(), target=sv.Target("cuda", arch="sm_90")) as compiled:
        compiled.save(folder)
    return folder


def opened(folder, **options):
    device = NullDevice(**options)
    return runtime.GpuRunner(folder, read(folder), device), device


def test_calls_launch_every_kernel_within_memory(artefact):
    runner, device = opened(artefact)
    state = runner.new_state("prefill", {"input_ids": np.zeros((2, 7), np.int64)})
    outputs = runner.run("prefill", {"input_ids": np.zeros((2, 7), np.int64)}, state)
    assert outputs["logits"].shape[0] == 2
    many = len(device.launches)
    state.position = 7
    runner.run("decode", {"input_ids": np.zeros((2, 1), np.int64)}, state)
    names = {name for name, *_ in device.launches[many:]}
    assert {"gemv", "attention", "loops"} <= names
    assert "matmul" in {name for name, *_ in device.launches[:many]}
    runner.close()
    del state
    assert not device.held


def test_what_does_not_fit_is_refused_before_it_is_copied(artefact):
    runner, _ = opened(artefact)
    state = runner.new_state("prefill", {"input_ids": np.zeros((1, 4), np.int64)})
    caches = sum(array.nbytes for array in state.arrays.values())
    needed = runner._room["weights.safetensors"].nbytes + caches
    for memory in (1000, needed):
        with pytest.raises(
            CompileError, match=r"takes .* GB \(weights .*, caches of one sequence .*\), the device has"
        ):
            opened(artefact, memory=memory)
    assert opened(artefact, memory=2 * needed + (1 << 20))


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_a_device_that_the_artefact_has_no_code_for(artefact, arch):
    with pytest.raises(Unsupported, match=rf"code for .*sm_90.*, the device is {arch}"):
        opened(artefact, arch=arch)


def test_cubins_serve_later_devices_of_their_version():
    assert runtime.built_for("sm_86", ("sm_80", "sm_89", "sm_90")) == "sm_80"
    assert runtime.built_for("sm_89", ("sm_80", "sm_89")) == "sm_89"
    assert runtime.built_for("sm_120", ("sm_90", "sm_120", "sm_100")) == "sm_120"


@pytest.mark.parametrize(
    ("device", "hint"), [("sm_100", r"compile again with .*'sm_100'"), ("sm_103", "code can be built for .*'sm_120'")]
)
def test_code_of_hopper_and_later_is_for_one_architecture(device, hint):
    with pytest.raises(Unsupported, match=rf"the device is {device}\n.*{hint}"):
        runtime.built_for(device, ("sm_90", "sm_100") if device == "sm_103" else ("sm_90",))


def test_without_a_driver_an_artefact_says_so(artefact, monkeypatch):
    monkeypatch.setattr("sylvester.backends.cuda.driver.LIBRARY", "libnowhere.so")
    made = runtime.load(artefact, read(artefact))
    with pytest.raises(Unsupported, match=r"has no libnowhere\.so"):
        made.run("prefill", {})


def test_an_unknown_architecture_is_refused():
    with pytest.raises(CompileError, match=r"found arch='sm_70'"):
        sv.compile(decoder(), target=sv.Target("cuda", arch="sm_70"))


def test_what_kernels_report_becomes_an_error(artefact, monkeypatch):
    runner, device = opened(artefact)

    def reported(address, array):
        array.fill(9 if array.dtype == np.int64 else 0)

    monkeypatch.setattr(device, "read", reported)
    inputs = {"input_ids": np.zeros((1, 4), np.int64)}
    state = runner.new_state("prefill", inputs)
    with pytest.raises(InputError, match="index 9 is out of range"):
        runner.run("prefill", inputs, state)


@pytest.mark.parametrize("limit", [3, 100])
def test_tensors_beyond_what_kernels_address_are_refused(artefact, monkeypatch, limit):
    runner, device = opened(artefact)
    inputs = {"input_ids": np.zeros((1, 4), np.int64)}
    state = runner.new_state("prefill", inputs)
    monkeypatch.setattr(calls, "LIMIT", limit)
    with pytest.raises(InputError, match=f"elements, kernels on GPUs address at most {limit}"):
        runner.run("prefill", inputs, state)
    assert not device.launches


def test_sizes_as_text():
    n = atom(Size("s0"))
    for size in (index(7), n * 3 + 5, (n * 2 + 1) // 4 * 6, (n + 1) % 3):
        expected = size.substitute({Size("s0"): index(10)}).constant
        assert number(size_text(size), {"s0": 10}) == expected


def test_kernels_are_stored_once(artefact):
    data = json.loads((artefact / "launches.json").read_text())
    files = [k["files"]["sm_90"] for k in data["kernels"]]
    assert len(files) == len(set(files))
    launches = [x for entry in data["entries"].values() for x in entry["launches"]]
    assert len(launches) > 2 * len(files)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_has_launches(name):
    for entry in gpu_entries(zoo.traced(name).clone()).values():
        assert entry.launches

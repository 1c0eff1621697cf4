"""Resident memory of compiling and running is what the report says; weights come to huge pages in one copy."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sylvester as sv
from benchmarks.memory import compiling, running
from sylvester.backends import huge_pages, memory, memory_plan
from sylvester.backends.memory_plan import MemoryPlan
from sylvester.backends.tensor_file import TensorFile, map_tensors
from sylvester.backends.tensor_writer import Deferred, write_tensors
from sylvester.codegen.formats import packed
from sylvester.codegen.layout import F32, Format, Layout
from sylvester.compiler import knobs
from sylvester.passes.fold_weights import VALUES_AT_ONCE, _scaled
from tests import zoo

MB = 1 << 20
LAYERS, INPUTS, OUTPUTS = 4, 1536, 3072
MODEL = 4 * LAYERS * INPUTS * OUTPUTS
ROOM = 60 * MB
needs_huge_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for"
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file larger than what stays mapped, with an odd tensor at its end."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    rng = np.random.default_rng(0)
    arrays = {"big": rng.standard_normal((3 * MB, 1), np.float32), "odd": rng.integers(0, 9, 7).astype(np.int8)}
    write_tensors(path, {n: Deferred(a.shape, a.dtype.name, lambda a=a: a) for n, a in arrays.items()})
    return path


@needs_huge_pages
def test_read_weights_are_the_mapped_ones_on_a_huge_page(weights):
    file, mapped = TensorFile(weights), map_tensors(weights)

    file.read()

    for name, array in file.arrays.items():
        np.testing.assert_array_equal(array, mapped[name])
        assert not array.flags.writeable
        assert array.ctypes.data != mapped[name].ctypes.data
    starts = {name: array.ctypes.data % huge_pages.PAGE for name, array in file.arrays.items()}
    assert starts["big"] < 4096  # the header alone stands before it
    assert starts["big"] % memory.LINE == 0


def test_weights_stay_mapped_where_they_should(weights, monkeypatch):
    def stays():
        file = TensorFile(weights)
        before = file.arrays
        file.read()
        return file.arrays is before

    with monkeypatch.context() as patch:
        patch.setenv(knobs.HUGE_PAGES.name, "0")
        assert stays()
    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "LEAST", 1 << 30)
        assert stays()
    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "available", lambda: float(MB))
        assert stays()


def test_available_memory_is_read_from_the_system(tmp_path, monkeypatch):
    found = memory.available()
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")

    assert found > MB
    assert memory.available() == float("inf")


@pytest.fixture(scope="module", params=["", *(pytest.param(p, marks=pytest.mark.nightly) for p in ("w8a8", "w4a8"))])
def measured(request, tmp_path_factory):
    """Sizes of compiling and running in processes of their own, with the predictions."""
    folder = tmp_path_factory.mktemp("memory") / "artefact"
    found = compiling(folder, request.param, "avx2", LAYERS, INPUTS, OUTPUTS)
    stored = (folder / "weights.safetensors").stat().st_size
    return found | {"run": running(folder, INPUTS), "stored": stored, "quantised": bool(request.param)}


def test_compiling_never_holds_a_second_copy_of_the_weights(measured):
    """What the passes made of the weights comes on top; packing them does not."""
    made = measured["stored"] if measured["quantised"] else 0

    assert measured["peak"] - measured["before"] < made + ROOM
    assert made < MODEL / 3


def test_running_takes_weights_and_arena_and_little_else(measured):
    told = measured["memory"]

    assert measured["run"] <= measured["stored"] + told["arena"] + told["state"] + ROOM


def test_predictions_are_near_what_was_measured(measured):
    told = measured["memory"]

    assert told["weights"] == pytest.approx(measured["stored"], rel=0.01)
    assert told["running"] == pytest.approx(measured["run"], rel=0.25)
    assert measured["peak"] - measured["before"] < 1.25 * told["compiling"]


def test_the_plan_counts_arena_state_and_weights():
    case = zoo.case("llama-gqa")
    seen = []
    target = sv.Target("cpu", isas=("scalar",), max_length=64)
    with sv.compile(case.model, case.inputs, target=target, progress=lambda *step: seen.append(step)) as compiled:
        told, runner = compiled.report["memory"], compiled._runner
        arenas = {}
        for length in (case.inputs["input_ids"].shape[1], 64):
            given = {"input_ids": np.ones((case.inputs["input_ids"].shape[0], length), np.int64)}
            state = runner.new_state("prefill", given)
            runner.run("prefill", given, state)
            arenas[length] = runner._arena.nbytes
        ledger = compiled.ledger

    shorter, longest = arenas.values()
    assert shorter <= told["arena"] < told["longest_arena"] == longest
    assert told["state"] == sum(array.nbytes for array in state.arrays.values())
    assert told["longest_running"] - told["running"] == told["longest_arena"] - told["arena"]
    stages = [stage for stage, _, _ in seen]
    assert stages.index(next(s for s in stages if s.startswith("memory: compiling takes"))) < stages.index("compile")
    assert f"note: {next(s for s in stages if s.startswith('memory:'))}" in ledger


def test_too_little_memory_is_a_note(monkeypatch):
    plan = MemoryPlan(compiling=3 * 10**9, weights=10**9, arena=0, longest_arena=5 * 10**9, state=0)
    monkeypatch.setattr(memory_plan, "available", lambda: 4e9)

    _, *short = plan.notes()

    assert short == [
        "memory is short: running at the longest sequence takes 6045.0 MB, this machine has 4000.0 MB free"
    ]


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("form", [F32, Format("q8", 32), Format("q4", 64), Format("q3", 32)])
def test_packing_in_pieces_is_packing_at_once(form, ways, monkeypatch):
    from sylvester.codegen import formats

    rng, k = np.random.default_rng(0), 128
    widths = (100, 100) if ways > 1 else (70, 33, 130)
    kinds = {"f32": (np.float32, k), "q8": (np.int8, k), "q4": (np.uint8, k // 2), "q3": (np.uint8, 3 * k // 8)}
    dtype, columns = kinds[form.name]
    parts = [rng.integers(0, 100, (n, columns)).astype(dtype) for n in widths]
    scales = [rng.random((n, k // form.group), np.float32) for n in widths] if form.group else []
    layout = Layout("panels", tuple("abc"[: len(widths)]), format=form, ways=ways)

    whole = list(packed(layout, parts, scales))
    monkeypatch.setattr(formats, "PIECE", 1)
    pieces = list(packed(layout, parts, scales))

    assert len(whole) == 1
    assert len(pieces) > 3
    np.testing.assert_array_equal(np.concatenate(pieces), whole[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_scaled_in_slices_are_those_scaled_at_once(axis):
    weight = torch.randn(3 * VALUES_AT_ONCE // 1000, 700)
    factor = torch.randn(weight.shape[axis], dtype=torch.float64).unsqueeze(1 - axis)

    assert _scaled(weight, factor.expand(weight.shape)).equal((weight.double() * factor).float())


def test_a_transposed_weight_is_not_copied():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(80, 300))
            self.narrow = nn.Parameter(torch.randn(5, 300))

        def forward(self, x):
            wide = nn.functional.linear(x, self.weight.t().contiguous())
            return nn.functional.linear(wide.sin(), self.narrow)

    model, x = Turned().eval(), torch.randn(3, 80)
    program = sv.trace(model, (x,))

    assert {t.data_ptr() for t in program.weights.values()} == {t.data_ptr() for t in model.parameters()}
    with sv.compile(program, target=sv.Target("cpu", isas=("scalar",))) as compiled:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        told, arena = compiled.report["memory"], compiled._runner._arena.nbytes
    assert told["compiling"] == memory_plan.WORKING
    assert told["arena"] == arena > 0


@needs_huge_pages
def test_reading_needs_no_second_copy(weights):
    script = (
        "from pathlib import Path\n"
        "from sylvester.backends.tensor_file import TensorFile\nfrom benchmarks.memory import status\n"
        f"file = TensorFile(Path({str(weights)!r}))\nbefore = status('RssAnon')\nfile.read()\n"
        "print(status('RssAnon') - before, status('VmHWM') - status('VmRSS'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, above = json.loads("[" + done.stdout.strip().replace(" ", ",") + "]")
    size = weights.stat().st_size

    assert size <= grown < size + 4 * MB
    assert above < 12 * MB

"""Kernel times of an artefact: names, bytes and operations that can be counted by hand, and outputs unchanged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sylvester as sv
from sylvester.__main__ import main
from sylvester.backends import cpu_profile, limits
from sylvester.backends.cpu_profile import KernelTime, bound, entry_bound, profile, streamed
from sylvester.backends.kernel_table import NAME, KernelSpec, read_table
from sylvester.backends.limits import MIB, Limits, Peak, Read
from sylvester.codegen.costs import operations
from sylvester.codegen.scalar import Call, Constant
from sylvester.compiler.artefact import open_runner
from sylvester.compiler.errors import ArtefactError, CompileError, ToolchainMissing, Unsupported
from sylvester.compiler.manifest import read
from tests import artefacts, zoo

ROWS, DEPTH, WIDTH, WORDS = 5, 96, 64, 50
LIMITS = Limits(
    "cpu",
    1,
    "cc",
    (Read(MIB, False, 1, 10e9), Read(100 * MIB, False, 1, 1e9)),
    (Peak("f32", "vector", 1, 1e9), Peak("int8", "vector", 1, 4e9)),
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, DEPTH)
        self.wide = nn.Linear(DEPTH, WIDTH, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.softmax(self.wide(self.words(ids)), -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    with sv.compile(Small().eval(), (torch.ones(ROWS, dtype=torch.int64),), target=scalar()) as compiled:
        return compiled.save(tmp_path_factory.mktemp("profile") / "small")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    case = zoo.case("llama-gqa")
    with sv.compile(case.model, case.inputs, target=scalar(max_length=40)) as compiled:
        return compiled.save(tmp_path_factory.mktemp("profile") / "lm")


@pytest.fixture
def known_limits(monkeypatch):
    monkeypatch.setattr(limits, "measure", lambda *_, **__: LIMITS)
    monkeypatch.setattr("sylvester.cli_kernels.measure", lambda *_, **__: LIMITS)
    monkeypatch.setattr(cpu_profile, "SETTLING", 0.0)


def scalar(**options):
    return sv.Target("cpu", isas=("scalar",), **options)


def timed(folder, rows=ROWS, threads=2):
    runner = open_runner(folder, threads)
    inputs = {"ids": np.arange(rows) % WORDS}
    found = profile(runner, "forward", inputs, None, 5)
    runner.close()
    return found


def by_name(times, name):
    (found,) = [t for t in times if t.kernel.name.startswith(name)]
    return found


def test_every_kernel_has_a_time_and_a_name(folder):
    times = timed(folder)

    assert sum(t.seconds for t in times) > 0
    assert all(t.seconds >= 0 for t in times)
    linear = by_name(times, "linear").kernel
    assert any(label.startswith("linear ") and label.endswith("wide") for label in linear.labels)
    assert linear.streams
    assert [t.kernel for t in times] == list(read_table(folder).entries["forward"])


@pytest.mark.parametrize("rows", [1, ROWS, 33])
def test_a_linear_layer_costs_its_weights_its_rows_and_2mnk(folder, rows):
    linear = by_name(timed(folder, rows), "linear")

    assert linear.bytes == 4 * (WIDTH * DEPTH + rows * (DEPTH + WIDTH))
    assert linear.flops == 2 * rows * WIDTH * DEPTH


def test_a_gather_reads_its_rows_not_the_table(folder):
    gather = timed(folder, 3)[0]

    assert gather.kernel.name == "loop"
    assert gather.bytes == 3 * 8 + 2 * 3 * DEPTH * 4


@pytest.mark.parametrize("threads", [1, 3])
def test_profiled_outputs_are_those_of_a_run(folder, threads):
    runner, inputs = open_runner(folder, threads), {"ids": np.arange(17)}
    times = np.zeros(len(read_table(folder).entries["forward"]))

    plain, profiled = runner.run("forward", inputs), runner.run("forward", inputs, None, times)
    runner.close()

    for name, array in plain.items():
        np.testing.assert_array_equal(profiled[name], array)
    assert times.sum() > 0


def test_attention_reads_the_filled_part_of_the_state(lm):
    runner = open_runner(lm)
    step = {"input_ids": np.ones((1, 1), np.int64)}
    state = runner.new_state("decode", step)
    found = []
    for state.position in (0, 7, 20):
        costs = [t for t in profile(runner, "decode", step, state, 1) if t.kernel.name.startswith("attention")]
        found.append((costs[0].flops, costs[0].bytes))
    runner.close()

    config = zoo.case("llama-gqa").model.config
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    keys = np.array([1, 8, 21])
    assert [f for f, _ in found] == list(4 * size * heads * keys)
    assert [b for _, b in found] == list(4 * 2 * size * (heads + shared * keys))


def test_operations_count_arithmetic_on_floats():
    x, n = Constant(1.0, "f32"), Constant(1, "i64")
    product = Call("mul", (x, Call("exp", (x,), "f32")), "f32")

    assert operations(product) == 13
    assert operations(Call("where", (Call("lt", (x, x), "b8"), product, x), "f32")) == 13
    assert operations(Call("add", (n, n), "i64")) == 0


def kernel(seconds=1.0, flops=0.0, moved=0.0, arithmetic="f32", streams=False):
    return KernelTime(KernelSpec("k", (), arithmetic, streams), seconds, flops, moved)


def test_the_bound_is_the_longer_of_moving_and_computing():
    assert bound([kernel(flops=2e9, moved=1e9)], LIMITS, 0).limit == "1 Gop/s f32"
    assert bound([kernel(flops=2e9, arithmetic="int8")], LIMITS, 0).seconds == 0.5
    assert bound([kernel(moved=1e5)], LIMITS, 1e12).seconds == pytest.approx(1e5 / 10e9)
    assert bound([kernel(moved=1e5, streams=True)], LIMITS, 1e12).seconds == pytest.approx(1e5 / 1e9)


def test_the_bound_of_a_call_leaves_activations_in_the_caches():
    times = [kernel(moved=1e5, streams=True), kernel(moved=1e9)]

    assert streamed(times) == 1e5
    assert entry_bound(times, LIMITS).seconds == pytest.approx(1e5 / 10e9)


def test_the_same_kernel_of_every_layer_has_one_title():
    first = KernelSpec("linear_f32", ("rms_norm", "linear_3 layers.0.up", "add_2 layers.0"), "f32", True)
    later = KernelSpec("linear_f32", ("rms_norm", "linear_9 layers.11.up", "add_8 layers.11"), "f32", True)

    assert first.title == later.title == "linear_f32 rms_norm+linear+add layers.*.up"


def test_bench_kernels_prints_by_time_with_the_whole_call_last(lm, capsys, known_limits):
    assert main(["bench", str(lm), "--kernels", "--runs", "3", "--length", "12", "--threads", "1"]) == 0

    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head == "decode, batch 1, length 12"
    assert columns.split()[:4] == ["kernel", "calls", "ms", "share"]
    assert columns.endswith("of limit")
    assert any(row.startswith("linear") for row in rows)
    assert rows[-1].startswith("all kernels")


def test_bench_kernels_json(lm, capsys, known_limits):
    assert main(["bench", str(lm), "--kernels", "--entry", "prefill", "--runs", "3", "--length", "4", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["entry"] == "prefill"
    assert [row["ms"] for row in found["kernels"]] == sorted((row["ms"] for row in found["kernels"]), reverse=True)
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    assert sum(row["calls"] for row in found["kernels"]) == found["call"]["calls"] == len(found["steps"])
    assert found["call"]["of limit"] > 0


def test_without_a_compiler_the_times_remain(tmp_path, capsys, monkeypatch):
    def none(*_, **__):
        raise ToolchainMissing("none")

    folder = artefacts.write(tmp_path / "lm")
    monkeypatch.setattr("sylvester.cli_kernels.measure", none)
    monkeypatch.setattr(cpu_profile, "SETTLING", 0.0)
    assert main(["bench", str(folder), "--kernels", "--runs", "2", "--length", "9", "--json"]) == 0

    (row,) = json.loads(capsys.readouterr().out)["kernels"]
    assert row["kernel"] == "step pick lm"
    assert row["ms"] == pytest.approx(1)
    assert row["GB/s"] == pytest.approx(8)
    assert row["Gflop/s"] == pytest.approx(10)
    assert "of limit" not in row


def test_what_cannot_be_profiled_is_said(tmp_path, folder):
    runner = open_runner(folder)
    with pytest.raises(CompileError, match="no entry named 'decode'"):
        profile(runner, "decode", {}, None, 1)
    runner.close()
    old = artefacts.write(tmp_path / "old")
    (old / NAME).unlink()
    read(old).seal(old)
    with pytest.raises(ArtefactError, match=f"has no {NAME}"):
        read_table(old)
    (old / NAME).write_text('{"entries": 3}')
    with pytest.raises(ArtefactError, match="entries: expected dict, found 3"):
        read_table(old)
    with (
        pytest.raises(Unsupported, match="target 'reference' does not time its kernels"),
        sv.compile(nn.ReLU(), (torch.ones(2),), target="reference") as compiled,
    ):
        profile(compiled._runner, "forward", {}, None, 1)


def test_doctor_prints_the_limits(capsys, known_limits):
    assert main(["doctor", "--limits"]) == 0
    out = capsys.readouterr().out
    assert "GB/s" in out
    assert "Gop/s" in out

    assert main(["doctor", "--limits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peaks"][1]["arithmetic"] == "int8"

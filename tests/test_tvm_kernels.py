"""TVM's code for regions: equal to ours at odd and at several open sizes, and part of an artefact that needs no TVM."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylvester as sv
from sylvester.backends import engines
from sylvester.backends.engines import OURS, Setting, claim
from sylvester.backends.region_bench import RegionBench, build, difference
from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuning_database import Database, Entry, Time
from sylvester.backends.tvm_engine import Engine, load
from sylvester.codegen.compile import compile_program
from sylvester.codegen.isa import NEON, Isa
from sylvester.codegen.region import Refused, Region
from sylvester.codegen.space import Candidate
from sylvester.compiler.target import Target, host_architecture
from tests import kernel_harness
from tests.programs import program

if host_architecture() != "x86_64":
    pytest.skip("TVM's code is taken for x86-64 only", allow_module_level=True)

BLOCKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm and softmax": lambda x, w: F.layer_norm(x, (67,), w, None).softmax(-1),
    "exp": lambda x, w: torch.exp(x * 40) + torch.sigmoid(x * 50),
    "activations": lambda x, w: F.gelu(x) * F.gelu(w, approximate="tanh") + F.silu(x) - torch.erf(x) + torch.tanh(x),
    "math": lambda x, w: torch.log(x.abs() + 1) * torch.sin(w) + torch.cos(x) + x.abs() ** 1.5 + x.abs().sqrt(),
    "rounding": lambda x, w: (x * 20).round().clamp(-9, 9).to(torch.int8),
    "steps": lambda x, w: x.floor() + (3 * x).ceil() * (5 * w).trunc(),
    "truth": lambda x, w: torch.logical_and(x > w, ~(x < 0)).any(-1),
    "extremes": lambda x, w: torch.maximum(x, w).amax(-1) - torch.minimum(x, w).amin(-1),
    "padding": lambda x, w: F.pad(x, (2, 1)),
    "joined": lambda x, w: torch.cat([x, x * w], -1),
    "turned": lambda x, w: (x * w).transpose(1, 2).contiguous(),
    "integers": lambda x, w: (x * 9).to(torch.int32).sum(-1),
    "product": lambda x, w: (x * w).prod(-1),
    "number": lambda x, w: x.sum(),
}


@pytest.fixture(scope="module")
def tvm() -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tvm", reason="TVM is an extra: pip install 'sylvester[tvm]'")
    return load()


def regions(function: Callable[..., Tensor], *shape: int) -> list[Region]:
    made = program(function, torch.randn(*shape), weights={"w": torch.randn(shape[-1])})
    return list(compile_program(made).unit.regions.values())


def benches(isa: Isa, of: Engine, found: list[Region], folder) -> Iterator[tuple[Region, RegionBench, list[Candidate]]]:
    """Of every region a bench with our function and all candidates, from one library."""
    texts = [(r, {OURS: r.function.text} | {c: of.source(r, c, isa) for c in of.candidates(r, isa)}) for r in found]
    library, first = build(texts, isa, folder, find_compiler()), 0
    for region, candidates in texts:
        numbers = {c: first + n for n, c in enumerate(candidates)}
        first += len(candidates)
        with closing(RegionBench(library, region, numbers, 2)) as bench:
            yield region, bench, list(candidates)[1:]


@pytest.mark.parametrize("isa", [i for i in kernel_harness.supported() if not i.features], ids=lambda i: i.name)
def test_candidates_compute_what_our_kernels_do(isa, tvm, tmp_path):
    found = [r for function in BLOCKS.values() for r in regions(function, 3, 13, 67)]
    found += regions(lambda x, w: x.mean(1) * w, 3, 13, 64)
    checked = 0

    for region, bench, candidates in benches(isa, tvm, found, tmp_path):
        for candidate in candidates:
            assert bench.wrong(candidate, OURS) == "", (region.function.text, candidate)
            checked += 1

    assert checked > 2 * len(BLOCKS)


def test_infinities_and_nan_are_treated_as_ours_are(tvm, tmp_path):
    isa = kernel_harness.supported()[1]
    found = regions(lambda x, w: torch.maximum(x, w) + x.amax(-1, keepdim=True) + torch.where(x > 0, x, w), 3, 5, 40)
    found += regions(lambda x, w: F.silu(x) + F.gelu(w) + torch.tanh(x) + torch.exp(w), 3, 5, 40)

    for region, bench, candidates in benches(isa, tvm, found, tmp_path):
        floats = [a for name, a in bench.inputs.items() if name not in region.nest.writes]
        for array, special in zip(floats, ((0, np.nan), (7, np.inf), (90, -np.inf)), strict=False):
            array[special[0] % array.size] = special[1]
        expected = bench.result(OURS)
        for candidate in candidates:
            result = bench.result(candidate)
            assert all(difference(expected[n], result[n]) == "" for n in region.nest.writes if n in result), candidate


def test_rows_run_side_by_side_where_they_follow_each_other(tvm):
    isa = next(i for i in kernel_harness.supported() if i.name != "scalar")
    (columns,) = regions(lambda x, w: x.mean(1), 3, 13, 64)
    (odd,) = regions(lambda x, w: x.mean(1), 3, 13, 67)
    (rows,) = regions(lambda x, w: x.mean(2), 3, 13, 64)

    taken = ["TVM_ROWS" in str(tvm.candidates(r, isa)) for r in (columns, odd, rows)]

    assert taken == [True, False, False]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, w: x.argmax(-1), "the reduction argmax"),
        (lambda x, w: F.softplus(x), "the function softplus of f32"),
        (lambda x, w: w[(x > 0).long()], "positions read from memory"),
        (lambda x, w: F.pad(torch.exp(x), (1, 1)), "long expressions in a branch"),
    ],
    ids=["argmax", "softplus", "gather", "branch"],
)
def test_what_has_no_form_in_tvm_is_refused(function, reason, tvm):
    isa = kernel_harness.supported()[0]
    found = regions(function, 3, 5, 8)

    with pytest.raises(Refused, match=reason):
        [tvm.source(r, c, isa) for r in found for c in tvm.candidates(r, isa)]


def test_other_architectures_are_refused(tvm):
    (region,) = regions(lambda x, w: x * w, 3, 5)

    with pytest.raises(Refused, match="code for aarch64"):
        tvm.source(region, tvm.candidates(region, NEON)[0], NEON)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_artefact_with_a_tvm_kernel_needs_neither_tvm_nor_torch(tvm, tmp_path, monkeypatch):
    path, isa = tmp_path / "tuning.sqlite", next(i for i in kernel_harness.supported() if i.name == "avx2")
    monkeypatch.setattr(engines, "default_path", lambda: path)
    monkeypatch.setenv("SYLVESTER_TUNE", "1")
    monkeypatch.setenv("SYLVESTER_ISA", isa.name)
    x = torch.randn(3, 13, 64)
    target = Target(isas=(isa.name,), threads=2, engines=("tvm",))
    _record(path, Setting(isa, 2, find_compiler(), tvm), Mean(), x, Candidate({"TVM_ROWS": 8}))

    with sv.compile(Mean(), (x,), target=target) as compiled:
        assert "tvm 2.00x, TVM_ROWS=8" in str(compiled.ledger)
        torch.testing.assert_close(compiled(x), x.mean(1))
        compiled.save(tmp_path / "saved")

    assert b"sv_tvm_" not in (tmp_path / "saved/code/scalar.so").read_bytes()
    script = (
        "import sys, numpy as np, sylvester as sv\n"
        f"x = np.arange(3 * 13 * 64, dtype=np.float32).reshape(3, 13, 64)\n"
        f"y = sv.load({str(tmp_path / 'saved')!r})(x)\n"
        "np.testing.assert_allclose(y, x.mean(1), rtol=1e-6)\n"
        "sys.exit(bool({'torch', 'tvm', 'tvm_ffi'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _record(path, setting: Setting, model: nn.Module, x: Tensor, chosen: Candidate) -> None:
    """As if a race had been won."""
    (region,) = compile_program(sv.trace(model, (x,))).unit.regions.values()
    times = {str(OURS): Time(200, (200,) * 8), str(chosen): Time(100, (100,) * 8)}
    with Database(path) as database:
        database.record(Entry(setting.key(region), str(chosen), True, 0.03, times))


def test_a_region_is_claimed_when_tvm_is_measured_to_be_faster(tvm, tmp_path, monkeypatch):
    """Ours adds up columns one by one, which reads a cache line for every number."""
    monkeypatch.setattr(engines, "default_path", lambda: tmp_path / "tuning.sqlite")
    monkeypatch.setenv("SYLVESTER_TUNE", "1")
    found = regions(lambda x, w: x.mean(1), 4, 64, 256)
    isas = kernel_harness.supported()[:2]

    claims = claim(found, isas, Target(threads=1, engines=("tvm",)), find_compiler(), seconds=60.0)

    assert list(claims.texts) == [r.function.text for r in found]
    assert "measured now" in claims.notes[0]

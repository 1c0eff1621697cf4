"""Engines that may build regions: they win by measurement, are checked before, and a failure leaves our kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sylvester as sv
from sylvester.backends import engines, tvm_engine
from sylvester.backends.engines import OURS, Claims, Competition, Setting, claim
from sylvester.backends.region_bench import difference
from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuning_database import Database
from sylvester.backends.tvm_engine import Engine
from sylvester.codegen.compile import compile_program
from sylvester.codegen.isa import of
from sylvester.codegen.region import Refused, Region
from sylvester.codegen.space import Candidate
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.target import Target, host_architecture
from tests.programs import program

ISA = of(host_architecture())[0]
OTHER = Candidate({"FAKE": 1})


def scaled(x: Tensor) -> Tensor:
    return x * 2 + 1


def regions(function: Callable[..., Tensor] = scaled) -> list[Region]:
    return list(compile_program(program(function, torch.randn(5, 7, 3))).unit.regions.values())


def engine(edit: Callable[[str], str] = lambda text: text, version: str = "1") -> Engine:
    """An engine whose code is ours, edited."""
    return Engine("fake", version, lambda *_: (OTHER,), lambda region, *_: edit(region.function.text))


def compete(path, of: Engine, *, theirs: int = 80, seconds: float | None = 60.0) -> Claims:
    """A competition in which our function takes 100 ns and the other as given."""
    with Database(path / "tuning.sqlite") as database:
        race = Competition(
            Setting(ISA, 1, find_compiler(), of),
            database,
            timed=lambda bench: lambda c, runs: [100 if c == OURS else theirs] * runs,
        )
        return race.run(regions(), seconds)


def test_faster_engine_takes_the_region_and_the_database_remembers(tmp_path):
    (region,) = regions()
    won = compete(tmp_path, engine(lambda text: f"/* theirs */\n{text}"))
    again = compete(tmp_path, engine(lambda text: f"/* theirs */\n{text}"), seconds=None)

    assert won.on(ISA) == {region.function.text: f"/* theirs */\n{region.function.text}"}
    assert won.notes == ("fake: loop output y0 [7x5]: fake 1.25x, FAKE=1, 0.1 us ours, measured now",)
    assert again.texts == won.texts
    assert again.notes[0].endswith("from the database")
    assert won.on(replace(ISA, name="other")) == {}


@pytest.mark.parametrize(("theirs", "verdict"), [(98, "ours (fake 1.02x)"), (125, "ours (fake 0.80x)")])
def test_engine_that_is_not_clearly_faster_loses(tmp_path, theirs, verdict):
    found = compete(tmp_path, engine(), theirs=theirs)

    assert found.texts == {}
    assert verdict in found.notes[0]


def test_another_version_of_the_engine_is_measured_anew(tmp_path):
    compete(tmp_path, engine())

    found = compete(tmp_path, engine(version="2"), seconds=None)

    assert found.texts == {}
    assert found.notes[0].endswith("not measured: compile with `tune=` seconds: our kernel runs")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: text.replace(" + 1.0f", " + 1.5f"), "fake is wrong: off by 0.5, the largest value is"),
        (lambda text: text.replace("] = ", " + 1] = "), "fake is wrong: writes outside its buffers"),
        (lambda text: text.replace("return", "retrun").replace("int64_t lo, hi;", "int64_t lo;"), "by the C compiler"),
    ],
    ids=["values", "memory", "text"],
)
def test_wrong_code_never_wins(tmp_path, edit, reason):
    found = compete(tmp_path, engine(edit))

    assert found.texts == {}
    assert reason in found.notes[0]
    assert found.notes[0].endswith(": our kernel runs")


def test_wrong_candidate_is_left_out_of_the_race(tmp_path):
    def source(region: Region, candidate: Candidate, isa: object) -> str:
        text = region.function.text
        return text if candidate == OTHER else text.replace(" + 1.0f", " + 1.5f")

    found = compete(tmp_path, Engine("fake", "1", lambda *_: (OTHER, Candidate({"FAKE": 2})), source))

    assert "fake 1.25x, FAKE=1" in found.notes[0]
    assert "; left out: FAKE=2: off by 0.5, the largest value is" in found.notes[0]


def test_region_without_a_form_in_the_engine_stays_ours(tmp_path):
    def refuse(text: str) -> str:
        raise Refused("the reduction argmax")

    found = compete(tmp_path, engine(refuse))

    assert found.notes[0].endswith("fake has no code: the reduction argmax: our kernel runs")


def test_no_time_measures_nothing(tmp_path):
    found = compete(tmp_path, engine(lambda _: pytest.fail("built without time")), seconds=0.0)

    assert found.notes[0].endswith("not measured: compile with `tune=` seconds: our kernel runs")


def test_without_tvm_the_report_says_so_and_our_kernels_run(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "default_path", lambda: tmp_path / "tuning.sqlite")
    monkeypatch.setenv("SYLVESTER_TUNE", "1")
    _forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "tvm", None)
    x = torch.randn(5, 7, 3)

    with sv.compile(_Scaled(), (x,), target=Target(isas=(ISA.name,), threads=1, engines=("tvm",))) as compiled:
        torch.testing.assert_close(compiled(x), scaled(x))
        notes = str(compiled.ledger)

    assert "tvm is not used: it is not installed: pip install 'sylvester[tvm]': our kernels run" in notes


def test_tvm_that_does_not_start_is_reported(monkeypatch):
    monkeypatch.setenv("SYLVESTER_TUNE", "1")
    monkeypatch.setattr(tvm_engine, "import_module", _broken)

    found = claim(regions(), (ISA,), Target(engines=("tvm",)), find_compiler())

    assert found.notes == ("tvm is not used: it does not start: libtvm.so: undefined symbol: our kernels run",)


def test_switch_and_foreign_machine_leave_our_kernels(monkeypatch):
    target = Target(engines=("tvm",), arch="aarch64" if host_architecture() == "x86_64" else "x86_64")
    monkeypatch.setenv("SYLVESTER_TUNE", "1")
    foreign = claim(regions(), (ISA,), target, find_compiler())
    monkeypatch.setenv("SYLVESTER_TUNE", "0")
    off = claim(regions(), (ISA,), Target(engines=("tvm",)), find_compiler())

    assert foreign.notes[0].startswith("tvm is not used: cannot time code for ")
    assert off.notes == ("tvm is not asked: SYLVESTER_TUNE=0: our kernels run",)


@pytest.mark.parametrize("named", ["tvm", ("xla",), ("tvm", "tvm")])
def test_unknown_engines_are_refused(named):
    with pytest.raises(CompileError, match=r"engines must be a tuple of at most one of \['tvm'\], found"):
        Target(engines=named)


def test_target_without_engines_refuses_them():
    with pytest.raises(Unsupported, match="'reference' takes no engine 'tvm'"):
        sv.compile(_Scaled(), (torch.randn(2, 3),), target=Target("reference", engines=("tvm",)))


def test_results_agree_up_to_rounding_and_in_what_is_not_finite():
    values = np.array([1.0, -200.0, np.inf, np.nan], np.float32)

    assert difference(values, values * np.float32(1 + 1e-6)) == ""
    assert difference(values, values * np.float32(1.01)) == "off by 2, the largest value is 200"
    assert difference(values, np.nan_to_num(values)) == "infinities or NaN differ"
    assert difference(np.array([1, 2]), np.array([1, 3])) == "1 of 2 integers differ"


class _Scaled(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(x)


def _forget(monkeypatch) -> None:
    """As in a process that has not imported TVM."""
    for name in ("tvm_region", "tvm_source", "tvm_scalar", "tvm_math"):
        monkeypatch.delitem(sys.modules, f"sylvester.codegen.{name}", raising=False)


def _broken(name: str):
    raise OSError("libtvm.so: undefined symbol")

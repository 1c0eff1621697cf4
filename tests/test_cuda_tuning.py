"""Tiles of launches for GPUs, chosen by timing them on an emulated device whose clock is told what is fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.backends.cuda import backend, bench, emulated, tune
from sylvester.backends.tuning_database import Database
from sylvester.compiler.errors import CompileError
from tests import cuda_models

FAST = 2
"""Warps of the kernels that the clock favours."""
TARGET = sv.Target("cuda", arch="sm_90")


class Clock(emulated.Emulated):
    """Kernels of `FAST` warps take half of the time, which is not spent; those of `broken` warps write nothing."""

    broken = 0
    timing = False

    def mark(self):
        self.timing = not self.timing
        return 0

    def elapsed(self, first, last):
        return 5e-4 if self.last.warps == FAST else 1e-3

    def launch(self, function, grid, warps, shared, types, values):
        self.last = function
        if function.warps != self.broken and not self.timing:
            super().launch(function, grid, warps, shared, types, values)


@pytest.fixture
def device(monkeypatch, tmp_path):
    made = Clock(memory=4 << 30)
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SYLVESTER_TUNE", raising=False)
    monkeypatch.setattr(backend, "build", emulated.build)
    monkeypatch.setattr(bench, "build", emulated.build)
    monkeypatch.setattr(bench, "CACHE", 256)
    monkeypatch.setattr(tune, "first_device", lambda: made)
    return made


def compiled(**options: object) -> sv.Compiled:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24)).eval()
    return sv.compile(model, (torch.randn(1, 40),), dynamic={}, **{"target": TARGET, **options})


def kernels(made: sv.Compiled) -> list[int]:
    data = backend.json.loads((Path(made._folder) / "launches.json").read_text())
    return [kernel["warps"] for kernel in data["kernels"]]


def test_the_fastest_tile_is_built_and_remembered(device, tmp_path):
    with compiled() as before, compiled(tune=60) as tuned, compiled() as after:
        assert kernels(before) != [FAST]
        assert kernels(tuned) == kernels(after) == [FAST]
        assert "warps=2, 2.00x the speed of the default" in tuned.ledger
        folder = tuned.save(tmp_path / "made")
        x = np.random.default_rng(0).standard_normal((1, 40), np.float32)
        results = [cuda_models.opened(f, Clock())(x) for f in (folder, before.save(tmp_path / "first"))]
    np.testing.assert_allclose(*results, atol=1e-5)


def test_a_tile_that_computes_something_else_is_left_out(device):
    device.broken = FAST
    with compiled(tune=60) as made:
        assert kernels(made) != [FAST]
        assert "computes something else here and is left out" in made.ledger


def test_time_that_runs_out_is_said_and_what_was_timed_is_kept(device):
    with compiled(tune=1e-9) as made:
        assert "the time ran out before 1 of 1 kernels" in made.ledger
    with compiled(tune=60):
        pass
    with Database(tune.default_path()) as database:
        assert [entry.finished for entry in database.entries()] == [True]


def test_tuning_takes_one_architecture(device):
    with pytest.raises(CompileError, match="tuning takes one architecture"):
        compiled(target="cuda", tune=1)


def test_memory_for_timing_is_given_back(device):
    with compiled(tune=60):
        assert not device.held


def test_kernels_that_do_not_fit_are_not_timed(device):
    device.memory = 1024
    with compiled(tune=60) as made:
        assert "gemv 1x24x40 was not timed: the device is out of memory" in made.ledger
    assert not device.held

"""Cores that a process may keep busy: affinity, and the quotas of its control groups."""

from __future__ import annotations

import pytest

from sylvester.compiler.cores import usable
from sylvester.compiler.errors import CompileError
from sylvester.compiler.target import Target


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "damaged"}, 64),
        ({"outer/inner/cpu.max": "max 100000", "outer/cpu.max": "200000 100000"}, 2),
        ({"outer/inner/cpu.max": "50000 100000"}, 1),
        ({"elsewhere/cpu.max": "100000 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "9900000 100000"}, 64),
    ],
    ids=str,
)
def test_quota_bounds_the_cores(tmp_path, monkeypatch, files, found):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text("4:memory:/x\n0::/outer/inner\n")
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text + "\n")

    assert usable(own, groups) == found


def test_without_control_groups_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5})

    assert usable(tmp_path / "none", tmp_path / "none") == 2


@pytest.mark.parametrize("threads", [-2, 5000])
def test_threads_of_a_target_are_checked(threads):
    with pytest.raises(CompileError, match="threads must be at"):
        Target.parse(Target(threads=threads))

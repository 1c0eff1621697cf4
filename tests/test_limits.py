"""The limits of this machine: what is measured, kept between runs, measured again, and asked of the result."""

from __future__ import annotations

import json

import pytest

from sylvester.backends import limits
from sylvester.backends.limits import MIB, Limits, Peak, Read
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, ToolchainMissing

SMALL = (2 * MIB, 4 * MIB)
KNOWN = Limits(
    "cpu",
    2,
    "cc",
    (Read(MIB, False, 2, 90e9), Read(MIB, True, 2, 100e9), Read(4 * MIB, False, 2, 50e9), Read(MIB, False, 1, 40e9)),
    (Peak("f32", "vector", 2, 1e12), Peak("int8", "vector", 2, 2e12), Peak("int8", "tile", 2, 8e12)),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder and small working sets; zig keeps its own cache between tests."""
    zig = knobs.cache_folder() / "zig"
    monkeypatch.setenv(knobs.CACHE.name, str(tmp_path))
    (tmp_path / "zig").symlink_to(zig)
    monkeypatch.setattr(limits, "WORKING_SETS", SMALL)
    monkeypatch.setattr(limits, "ENOUGH", MIB)
    monkeypatch.setattr(limits, "LOOPS", 1000)
    return tmp_path / "limits"


def kept(cache):
    (path,) = cache.iterdir()
    return path


def test_everything_measured_is_positive_and_named(cache):
    stages = []

    found = limits.measure(2, progress=lambda stage, done, total: stages.append((stage, done, total)))

    assert found.threads == 2
    assert found.cpu
    assert found.toolchain
    assert all(read.bytes_per_second > 0 for read in found.reads)
    assert {(r.threads, r.huge_pages) for r in found.reads} == {(t, h) for t in (1, 2) for h in (False, True)}
    assert {*SMALL} < {r.bytes for r in found.reads}
    assert all(peak.operations_per_second > 0 for peak in found.peaks)
    assert {p.threads for p in found.peaks if p.arithmetic == "f32"} == {1, 2}
    assert stages[-1] == ("limits", 3, 3)


def test_one_measurement_is_kept_and_again_replaces_it(cache, monkeypatch):
    first = limits.measure(1)
    with monkeypatch.context() as patched:
        patched.setattr(limits, "_run", lambda *_: pytest.fail("measured twice"))
        assert limits.measure(1) == first

    data = json.loads(kept(cache).read_text())
    data["peaks"][0]["operations_per_second"] = 1.0
    kept(cache).write_text(json.dumps(data))
    assert limits.measure(1).peaks[0].operations_per_second == 1.0
    assert limits.measure(1, again=True).peaks[0].operations_per_second > 1.0


def test_threads_are_kept_apart(cache):
    assert [limits.measure(n).threads for n in (1, 2)] == [1, 2]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "[]", '{"cpu": "x"}', b"\xff"])
def test_a_corrupted_file_is_measured_again(cache, text):
    first = limits.measure(1)
    kept(cache).write_bytes(text if isinstance(text, bytes) else text.encode())

    assert limits.measure(1).cpu == first.cpu
    assert json.loads(kept(cache).read_text())["cpu"] == first.cpu


def test_a_cache_that_cannot_be_written_costs_only_the_next_measurement(cache):
    cache.write_text("a file where the folder should be")

    assert limits.measure(1).peaks


def test_no_compiler_is_an_error_with_a_way_out(cache, monkeypatch):
    monkeypatch.setenv(knobs.CC.name, "no-such-compiler")

    with pytest.raises(ToolchainMissing, match="no such compiler"):
        limits.measure(1)


def test_threads_below_one_are_refused(cache):
    with pytest.raises(CompileError, match="threads must be at least 1, found 0"):
        limits.measure(0)


def test_bandwidth_lies_between_the_working_sets_measured():
    assert KNOWN.bandwidth(MIB) == 100e9
    assert KNOWN.bandwidth(2 * MIB) == pytest.approx(75e9)
    assert KNOWN.bandwidth(1) == 100e9
    assert KNOWN.bandwidth(1 << 40) == 50e9
    assert KNOWN.bandwidth(MIB, threads=1) == 40e9


def test_peak_is_that_of_the_fastest_unit_or_of_float32():
    assert KNOWN.peak("int8") == 8e12
    assert KNOWN.peak("bf16") == 1e12

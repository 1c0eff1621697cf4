"""The benchmark of the target cuda, rehearsed on the CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks.cuda.__main__ import _engines, main
from benchmarks.cuda.works import Sizes, Work
from benchmarks.suite import sizes
from sylvester.compiler.errors import Unsupported


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    for name, found in list(sizes.LLAMAS.items()):
        monkeypatch.setitem(sizes.LLAMAS, name, dict(found))


@pytest.mark.nightly
def test_a_rehearsal_runs_every_engine(tmp_path, capsys, shapes):
    path = tmp_path / "rows.json"
    rows = main(["--rehearse", "--models", str(tmp_path), "--works", "S-decode-1", "--json", str(path)])
    assert {(row.engine, row.precision) for row in rows} >= {("sylvester", p) for p in ("bf16", "int8", "int4")}
    assert not [row.failure for row in rows if row.failure]
    assert len(json.loads(path.read_text())) == len(rows)
    told = capsys.readouterr().out
    assert "goal 2.0x" in told
    assert "rotate and round" in told
    assert "int8 attention" in told


def test_without_a_gpu_it_says_so():
    with pytest.raises(Unsupported, match="GPU"):
        main(["--works", "S"])


def test_unknown_works_are_named():
    with pytest.raises(SystemExit, match="no work begins with"):
        main(["--rehearse", "--works", "X"])


def test_float8_is_measured_on_prompts_where_it_can_be():
    def precisions(arch, kind):
        machine = SimpleNamespace(arch=arch, rehearsal=True)
        return [precision for engine, precision in _engines(machine, Work("S", kind, 1)) if engine == "sylvester"]

    assert precisions("sm_90", "prefill") == ["bf16", "int8", "fp8", "int4"]
    assert precisions("sm_90", "decode") == precisions("sm_80", "prefill") == ["bf16", "int8", "int4"]
    assert Work("S", "prefill", 1).bytes_read("fp8", Sizes()) == Work("S", "prefill", 1).bytes_read("int8", Sizes())


def test_what_bounds_a_step():
    work, at = Work("L", "decode", 1), Sizes()
    assert work.operations(at) == pytest.approx(2 * 1.236e9, rel=0.06)
    assert work.bytes_read("bf16", at) == pytest.approx(2 * 1.236e9 + 4 * 1024 * 16 * 512, rel=0.001)

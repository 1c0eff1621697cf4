"""The arithmetic of the benchmark reports: which peer a row is compared with, bounds, goals, errors and drawings."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as xml
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import support
from benchmarks.drawing import Bar, bars
from benchmarks.measure import Engine, Row, error, measure
from benchmarks.suite import __main__ as suite
from benchmarks.suite import report
from benchmarks.suite.maker import MAKERS, plan
from benchmarks.suite.works import FULL, chosen, find

THREADS = 2
DECODE = find("S-decode")
ROWS = [
    Row("S-decode", "sylvester", "int8", median=2.0, best=1.9, error=0.1),
    Row("S-decode", "quick", "int4", median=1.0, best=0.9, error=0.4),
    Row("S-decode", "level", "int8", median=5.0, best=4.0, error=0.1),
    Row("S-decode", "exact", "fp32", median=4.0, best=4.0, error=0.0),
    Row("S-decode", "broken", "fp32", failure="no such engine"),
]


class Machine:
    """100 GB/s at any working set, 1 Tflop/s at any arithmetic."""

    def bandwidth(self, working_set: float, threads: int | None = None) -> float:
        return 1e11

    def peak(self, arithmetic: str, threads: int | None = None) -> float:
        return 1e12


def test_a_row_is_compared_with_peers_at_its_precision_or_above() -> None:
    assert report.best_peer(ROWS, "int8") == 4.0
    assert report.best_peer(ROWS, "int4") == 1.0
    assert report.best_peer(ROWS[:1], "int8") is None


def test_goals_are_judged_by_ratio_and_by_bound() -> None:
    bound = report.bound_ms(DECODE, "int8", Machine(), THREADS)
    ours = report.lines(DECODE, ROWS, Machine(), THREADS)[0]

    assert bound == pytest.approx((109.5e6 + 2 * 2 * 256 * 12 * 768) / 1e11 * 1e3, rel=1e-3)
    assert ours.ratio == 2.0
    assert ours.goal == "1.8x met, 60% missed"


def test_the_bound_of_a_prefill_is_arithmetic() -> None:
    assert report.bound_ms(find("S-prefill"), "bf16", Machine(), THREADS) == pytest.approx(91.9, rel=0.02)


def test_failed_rows_stay_in_the_table_and_out_of_the_drawing() -> None:
    found = report.lines(DECODE, ROWS, None, THREADS)

    assert "failed: no such engine" in "\n".join(report.table(found))
    assert "broken" not in report.drawing(found)
    assert report.document(found, {})["rows"][-1]["failure"] == "no such engine"


def test_bars_are_valid_svg_with_lengths_in_proportion() -> None:
    drawn = xml.fromstring(bars({"a < b": [Bar("one", 10.0, ours=True, bound=5.0), Bar("two", 20.0)]}))
    widths = [float(rect.get("width", 0)) for rect in drawn.iter("{http://www.w3.org/2000/svg}rect") if rect.get("rx")]

    assert widths[1] == pytest.approx(2 * widths[0])
    assert "a < b" in [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]


def test_measure_interleaves_and_reports_the_error() -> None:
    calls: list[str] = []

    def engine(name: str, value: float) -> Engine:
        return Engine(name, "fp32", lambda: calls.append(name), lambda: np.array([1.0, value]))

    first, second = measure("work", [engine("a", 2.0), engine("b", 1.0)], np.array([1.0, 2.0]), runs=3)

    assert (first.error, second.error) == (0.0, 0.5)
    assert calls[:10] == ["a"] * 5 + ["b"] * 5
    assert len(calls) == 30


def test_an_output_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \[2\], expected \[3\]"):
        error(np.zeros(2), np.ones(3))


def test_works_are_chosen_by_name_or_beginning() -> None:
    assert [work.name for work in chosen(["S"])] == ["S-decode", "S-prefill"]
    assert chosen(["zoo-mlp"]) == [find("zoo-mlp")]
    assert chosen([])[: len(FULL)] == FULL
    with pytest.raises(ValueError, match="no work 'Q'"):
        chosen(["Q"])


def test_every_work_has_our_engine_and_a_peer_at_each_precision() -> None:
    for work in FULL:
        for precision in work.precisions:
            names = [maker.name for maker, at in plan(work, ()) if at == precision]
            assert names[0] == "sylvester"
            assert len(names) > 1
    assert {maker.name for maker, _ in plan(DECODE, ("torch",))} == {"torch"}
    assert len({maker.build for maker in MAKERS}) == len(MAKERS)


def test_an_engine_that_ends_the_process_is_charged_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skipped: list[Any] = []

    def attempt(work: object, options: object, skip: tuple[Any, ...], log: Path) -> tuple[list[dict[str, Any]], int]:
        skipped.append(skip)
        if not skip:
            return [{"using": ["crashing", "fp32"]}], -11
        return [{"using": ["exact", "fp32"]}, {"using": ["measuring", ""]}, {"row": asdict(ROWS[3])}], 0

    monkeypatch.setattr(suite, "attempt", attempt)
    first, second = suite.run(DECODE, argparse.Namespace(models=tmp_path))

    assert first.engine == "crashing"
    assert "code -11" in first.failure
    assert second == ROWS[3]
    assert skipped == [(), (("crashing", "fp32"),)]


def test_the_support_matrix_is_made_of_test_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "tests.test_zoo_cpu"
    cases = [
        (f"{place}", "test_onnxruntime_agrees_with_float64[llama-gqa-ort]", ""),
        (f"{place}", "test_onnxruntime_agrees_with_float64[t5-encoder-standard]", "<failure/>"),
        ("tests.test_rotate_zoo", "test_every_rotation_keeps_the_outputs[bert-step0]", ""),
        ("tests.test_rotate_zoo", "test_every_rotation_keeps_the_outputs[bert-step1]", "<error/>"),
        ("tests.test_rotate_zoo", "test_every_rotation_keeps_the_outputs[vit-step0]", "<skipped/>"),
        ("tests.test_other", "test_onnxruntime_agrees_with_float64[mlp-ort]", ""),
    ]
    lines = [f'<testcase classname="{c}" name="{n}">{inside}</testcase>' for c, n, inside in cases]
    (tmp_path / "r.xml").write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")
    monkeypatch.setattr("sys.argv", ["support", str(tmp_path / "r.xml")])
    support.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]

    assert rows[0] == "| model | onnx | onnx, ops=ort | rotate-hadamard |"
    assert "| llama-gqa |  | yes |  |" in rows
    assert "| t5-encoder | no |  |  |" in rows
    assert "| bert |  |  | no |" in rows
    assert "| vit |  |  |  |" in rows

"""The arithmetic of the benchmark of pages: bytes, works, goals, checks of the engines, and the server."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from benchmarks.measure import Row
from benchmarks.quality.recipes import MODEL
from benchmarks.suite import report
from benchmarks.web import checks, sources, works
from benchmarks.web.server import serving
from benchmarks.web.sizes import Fact
from sylvester.backends.limits import Limits, Peak, Read

DECODE = works.chosen(["decode"], [2], ["novels"])[0]
LIMITS = Limits("page", 2, "", (Read(1 << 20, False, 2, 1e10),), (Peak("int8", "vector", 2, 1e12),))
EXPECTED = checks.Reference((7, 8, 9), np.log(np.array([0.125, 0.125, 0.75])))


def test_the_sizes_of_the_shipped_model_are_those_of_its_folder() -> None:
    config = AutoConfig.from_pretrained(MODEL)

    assert {name: getattr(config, name) for name in works.SHIPPED_SIZES} == works.SHIPPED_SIZES


def test_a_decode_step_reads_every_weight_and_the_caches() -> None:
    weights = 16 * (2 * 192 * 192 + 2 * 192 * 64 + 3 * 192 * 512) + 192 * 4096

    assert DECODE.read("fp32") == 4 * weights + 4 * 2 * 256 * 16 * 64
    assert DECODE.read("int4") == 0.5625 * weights + 2 * 2 * 256 * 16 * 64


def test_works_are_chosen_by_kind_name_and_threads() -> None:
    assert [work.name for work in works.chosen(["encode", "prefill"], [1, 2])] == [
        "S-prefill-1t", "S-prefill-2t", "B-encode-1t", "B-encode-2t",
    ]  # fmt: skip
    assert DECODE.threads == 2


def test_every_engine_reads_as_many_tokens_as_llama_cpp_makes_of_the_text() -> None:
    given = sources.given(DECODE)

    assert len(given["ids"]) == 256 - 32 // 2 == len(given["text"]) + 2
    assert given["ids"][2:] == [3 + byte for byte in given["text"].encode()]


def test_our_row_is_judged_by_the_best_peer_and_the_bandwidth_of_the_page() -> None:
    times = {("sylvester", "int4"): 1.0, ("wllama", "int4"): 9.0, ("onnxruntime", "int8"): 5.0}
    rows = [Row(DECODE.name, engine, kind, median=found) for (engine, kind), found in times.items()]
    line = report.lines(DECODE, rows, LIMITS, DECODE.threads)[0]

    assert line.ratio == 5.0
    assert line.bound == pytest.approx(1e3 * DECODE.read("int4") / 1e10)
    assert line.goal == "6.0x missed, 50% met"


@pytest.mark.parametrize(
    ("answer", "error", "tokens"),
    [
        ({"tokens": [7, 8, 9], "logits": [1.0, 1.0, 1.0 + np.log(6)]}, 0.0, 3),
        ({"tokens": [7, 9, 9], "logprobs": [[2, np.log(0.75)], [0, np.log(0.25)]]}, np.log(2) / 2, 1),
    ],
)
def test_tokens_and_probabilities_are_held_against_the_reference(
    answer: dict[str, Any], error: float, tokens: int
) -> None:
    assert checks.difference(answer, EXPECTED) == pytest.approx(error, abs=1e-12)
    assert checks.agreeing(answer, EXPECTED) == tokens


def test_hidden_states_have_a_relative_error() -> None:
    expected = checks.Reference((), np.array([1.0, -4.0]))

    assert checks.difference({"hidden": [1.0, -3.0]}, expected) == 0.25


def test_only_an_fp32_engine_must_give_the_tokens_of_the_reference() -> None:
    assert checks.problem("fp32", 1e-5, 3, EXPECTED) == ""
    assert checks.problem("int4", 0.5, 1, EXPECTED) == ""
    assert "2 of 3 tokens" in checks.problem("fp32", 1e-5, 2, EXPECTED)
    assert "error 1.0e-02" in checks.problem("fp32", 1e-2, 3, EXPECTED)


def test_a_fact_says_whether_it_is_met() -> None:
    assert str(Fact("code", 150.0, 150, "KB")).endswith("met")
    assert str(Fact("code", 150.1, 150, "KB")).endswith("missed")


def test_the_server_isolates_pages_and_stays_in_its_folders(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "model.bin").write_bytes(b"weights")
    (tmp_path / "hidden").write_bytes(b"secret")
    with serving({"models": tmp_path / "shown"}) as site:
        with urllib.request.urlopen(f"{site}models/model.bin") as answer:
            assert answer.read() == b"weights"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Content-Security-Policy"] is None
        for path in ("models/../hidden", "models/%2e%2e/hidden", "hidden", "other/model.bin"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(site + path)

"""The comparison of quality with peers: rows of our own engine, and which rows are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import peers, sylvester_candidates
from sylvester.passes import Quantize

PEER = peers.Row("peer", "int4", "float32", 4000, 4.5, 4.5, 4.5, 60.0, 0.02, 0.9, exact=False)
OWN = replace(PEER, engine="sylvester", name="w4a8", kl=0.01)


def test_only_rows_that_are_no_larger_are_compared() -> None:
    larger = replace(OWN, name="w8a8", linears=8.1, kl=0.001)

    assert peers.beside(PEER, [OWN, larger]) == "0.50 x KL by w4a8"
    assert not peers.beside(PEER, [larger])
    assert not peers.beside(PEER, [replace(OWN, total=5000)])
    assert not peers.beside(replace(PEER, exact=True), [OWN])


@pytest.mark.nightly
def test_our_rows_are_measured_against_the_float_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipes = {"fp32": (), "w8a8": (Quantize(weights=8),)}
    monkeypatch.setattr(sylvester_candidates, "RECIPES", recipes)
    monkeypatch.setattr(sylvester_candidates, "artefact", lambda work, program: sylvester_candidates.in_torch(program))
    options = peers.parse(["--windows", "1", "--engines", "sylvester", "--json", str(tmp_path / "rows.json")])
    exact, low = peers.measured(peers.load(options, tmp_path), options.engines)

    assert exact.kl == 0
    assert exact.bits == 32
    assert 8 < low.bits < 8.25
    assert 0 < low.kl < 0.05
    assert low.agreement > 0.9


def test_an_engine_that_is_not_installed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.ENGINES, "absent", "absent_candidates")
    monkeypatch.setattr(peers, "Judge", lambda work: None)

    assert not list(peers.measured(None, ["absent"]))
    assert "absent       skipped: No module named" in capsys.readouterr().out

"""report.html: one well-formed page of its own, with what the ledger knows, in every artefact."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import sylvester as sv
from sylvester.__main__ import main
from sylvester.compiler.changes import Changes, Figure, Refusal
from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.manifest import Manifest, read_verified
from sylvester.compiler.pipeline import Pass
from sylvester.compiler.report_html import render
from sylvester.compiler.svg import Bar, bar_chart
from tests import artefacts

MODEL = """
import torch

def factory():
    return torch.nn.Linear(4, 3).eval(), (torch.zeros(3, 4),)
"""
PLACES = ["layers.0.mlp", 'layers.1."<&>"', "layers.2.mlp"]


@dataclass(frozen=True)
class Halve(Pass):
    """Round weights; finds out things with names that need care in HTML."""

    name: ClassVar[str] = "halve"
    contract: ClassVar = "lossy"

    def run(self, program):
        changes = Changes()
        for i, key in enumerate(list(program.weights)):
            program.weights[key] = program.weights[key].half().float()
            changes.apply("half", key)
            changes.figures.append(Figure(PLACES[i], "sqnr dB", -3.0 + 10 * i))
        for where in PLACES[:2]:
            changes.figures += [Figure(where, "max/rms before", 30.0), Figure(where, "max/rms after", 4.0)]
        changes.figures.append(Figure(PLACES[2], "max/rms before", math.inf))
        changes.note("a < b & c")
        changes.refuse("half", Refusal("it is <script>alert(1)</script>"), "head")
        return changes


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU()).eval()
    x = torch.randn(3, 6)
    data = [torch.randn(2, 6) for _ in range(5)]
    with sv.compile(model, (x,), target="reference", passes=[Halve()], calibration=data) as made:
        yield made


@pytest.fixture(scope="module")
def page(compiled):
    return compiled.report_html.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(page):
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def sections(tree):
    return [node.text for node in tree.iter("h2")]


def texts(tree, tag):
    return ["".join(node.itertext()) for node in tree.iter(tag)]


def test_page_has_every_section(tree):
    assert sections(tree) == [
        "Summary", "From pass to pass", "Quality", "Passes", "Decisions", "Measured by layer", "Refused", "Notes",
        "The ledger as text",
    ]  # fmt: skip


def test_page_needs_nothing_from_outside(page, tree):
    style = tree.find("head/style").text
    policy = tree.find("head/meta[@http-equiv]").get("content")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    tags = {node.tag for node in tree.iter()}
    names = {name for node in tree.iter() for name in node.attrib}

    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'"
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "a", "base", "form"}
    assert not {n for n in names if n in ("src", "href", "style", "action", "data") or n.startswith("on")}
    assert not re.search(r"https?:|//|url\(|@import", page)


def test_page_is_html_that_closes_what_it_opens(page):
    class Balance(HTMLParser):
        open: ClassVar[list[str]] = []

        def handle_starttag(self, tag, attributes):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page)
    parser.close()

    assert parser.open == []


def test_page_says_what_the_ledger_says(compiled, tree):
    cells, items = texts(tree, "td"), texts(tree, "li")

    assert "halve: a < b & c" in items
    assert "it is <script>alert(1)</script>" in cells
    assert {"calibration", "held-out"} <= set(cells)
    assert "4 samples to fit, 1 held back" in cells
    assert texts(tree, "pre") == [compiled.report["ledger"]["text"]]


def test_figures_are_drawn_by_layer_and_pairs_side_by_side(tree):
    *_, sqnr, rms = tree.iter("svg")

    assert texts(tree, "h3")[-2:] == ["halve: sqnr dB", "halve: max/rms"]
    assert texts(sqnr, "title") == PLACES[:2]
    assert len(list(sqnr.iter("rect"))) == 2
    assert len(list(rms.iter("rect"))) == 2 + 4
    assert texts(rms, "text")[:2] == ["before", "after"]
    assert "inf" in texts(rms, "text")


def test_bars_have_the_lengths_of_their_values():
    drawn = ElementTree.fromstring(bar_chart([Bar("a", (2.0,)), Bar("b", (-1.0,)), Bar("c", (0.0,))], ["x"]))
    bars = [(float(r.get("x")), float(r.get("width"))) for r in drawn.iter("rect")]

    (a, long), (b, short), (c, none) = bars
    assert long == pytest.approx(2 * short, abs=0.2)
    assert b + short == pytest.approx(a, abs=0.11)
    assert c == pytest.approx(a, abs=0.11)
    assert none < 1


def test_long_labels_are_cut_and_whole_in_the_tooltip():
    label = "model.layers.0." + "very_long_name." * 5
    drawn = ElementTree.fromstring(bar_chart([Bar(label, (1.0,))], ["x"]))
    shown = next(drawn.iter("text"))

    assert len(shown.text) < len(label)
    assert shown.find("title").text == label


def test_page_is_checked_like_every_file(compiled, tmp_path):
    folder = compiled.save(tmp_path / "out")
    assert "report.html" in read_verified(folder).files

    (folder / "report.html").write_text("<p>better numbers</p>")

    with pytest.raises(ArtefactError, match=r"report\.html in .* is (edited|truncated)"):
        sv.load(folder)


def test_page_of_a_report_without_anything():
    page = render({}, Manifest("null", {}))

    assert "<h2>Summary</h2>" in page
    assert "Passes" not in re.findall("<h2>(.*?)</h2>", page)


def test_command_prints_the_ledger(compiled, tmp_path, capsys):
    folder = str(compiled.save(tmp_path / "out"))

    assert main(["report", folder]) == 0
    out = capsys.readouterr().out

    assert out.startswith("target: reference\npasses: halve\ncalibration: 4 samples to fit, 1 held back\n")
    assert compiled.report["ledger"]["text"] in out


def test_command_writes_the_page(compiled, page, tmp_path, capsys):
    folder = str(compiled.save(tmp_path / "out"))

    assert main(["report", folder, "--html", str(tmp_path / "page.html")]) == 0

    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert main(["report", folder, "--html", str(tmp_path / "no" / "page.html")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_command_prints_json(compiled, tmp_path, capsys):
    assert main(["report", str(compiled.save(tmp_path / "out")), "--json"]) == 0

    (row,) = [r for r in json.loads(capsys.readouterr().out)["ledger"]["rows"] if r["pass"] == "halve"]
    assert row["figures"][1] == {"where": PLACES[1], "name": "sqnr dB", "value": 7.0}
    assert [j["data"] for j in row["quality"]] == ["calibration", "held-out"]


def test_command_refuses_artefacts_without_a_report(tmp_path, capsys):
    folder = artefacts.write(tmp_path / "lm")

    assert main(["report", str(folder)]) == 1
    assert "no report.json" in capsys.readouterr().err


def test_compile_command_takes_calibration(tmp_path, monkeypatch, capsys):
    (tmp_path / "report_models.py").write_text(MODEL)
    np.save(tmp_path / "data.npy", np.ones((2, 4), np.float32))
    np.save(tmp_path / "bad.npy", np.full((2, 4), np.nan, np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["compile", "report_models:factory", "--target", "null", "-o", "out", "--calibration"]

    assert main([*command, "data.npy"]) == 0
    assert main([*command, "bad.npy"]) == 1
    assert "calibration sample 0: input 'input': 8 of 8 values are NaN" in capsys.readouterr().err
    assert main(["report", "out"]) == 0
    assert "calibration: 1 samples to fit, 0 held back" in capsys.readouterr().out

"""Graphs before and after passes: what is recorded, the page, the networkx graph, and `sylvester show`."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import torch

import sylvester as sv
from sylvester.__main__ import main
from sylvester.compiler import graph_html
from sylvester.compiler.graph_steps import recorder, recording
from tests import zoo


@pytest.fixture(scope="module")
def recorded():
    case = zoo.case("mlp")
    with recording() as record:
        program = sv.trace(case.model, case.inputs)
        rounded = program.rewrite("w8a8")
    return program, rounded, record.steps


def test_every_pass_is_recorded_where_it_changed_something(recorded):
    _, _, steps = recorded
    names = [step.name for step in steps]
    rounding = next(step for step in steps if step.name in ("quantize", "quantize(weights=8)"))

    assert names[0] == "canonicalize"
    assert rounding.changed == ["forward"]
    assert any("linear_w8" in line for line in rounding.after["forward"])
    assert recorder() is None


def test_the_page_shows_both_sides_and_is_whole(recorded):
    _, _, steps = recorded
    page = graph_html.render("a <model>", steps)
    root = ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    rows = root.findall(".//tr")
    links = {a.get("href") for a in root.iter("a")}
    targets = {f"#{item.get('id')}" for item in root.iter() if item.get("id")}

    assert "a &lt;model&gt;" in page
    assert "<script" not in page
    assert any(cell.get("class") == "made" for row in rows for cell in row)
    assert any(cell.get("class") == "gone" for row in rows for cell in row)
    assert {f"#s{i}" for i in range(len(steps))} <= links & targets


def test_networkx_has_every_value_once_and_weights_are_shared(recorded):
    program, _, _ = recorded
    graph = program.to_networkx()
    weights = [key for key, data in graph.nodes(data=True) if data["op"] == "weight"]

    assert nx.is_directed_acyclic_graph(graph)
    assert sorted(weights) == sorted(f"weight/{key}" for key in program.weights)
    assert [data["op"] for _, data in graph.nodes(data=True)].count("linear") == sum(
        n.target is torch.ops.aten.linear.default for _, n in program.nodes()
    )
    assert nx.has_path(graph, "forward/x", "forward/output")


def test_show_prints_differences_and_writes_the_page(tmp_path, capsys):
    assert main(["show", "tests.test_graph_steps:factory", "--passes", "w8a8", "--diff"]) == 0
    changed = capsys.readouterr().out
    page = tmp_path / "graphs.html"
    assert main(["show", "tests.test_graph_steps:factory", "--passes", "w8a8", "--html", str(page)]) == 0

    assert changed.startswith("--- before\n+++ after\n")
    assert "quantize-cache" in page.read_text()


def factory():
    case = zoo.case("mlp")
    return case.model, case.inputs

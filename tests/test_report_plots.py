"""Pictures of the report: sums over passes, what layers became, curves and the Pareto front, from what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar
from xml.etree import ElementTree

import pytest
import torch
import transformers as hf

import sylvester as sv
from sylvester.compiler import report_plots
from sylvester.compiler.changes import Changes
from sylvester.compiler.layer_grid import Grid
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.pipeline import Pass
from sylvester.compiler.report_html import render
from sylvester.compiler.svg_plot import Series, plot
from sylvester.compiler.totals import Totals
from sylvester.passes import Quantize, RotateHadamard

LAYERS = 3


@dataclass(frozen=True)
class Sweep(Pass):
    """Measures at several ratios, rounds one table, and drops nothing."""

    name: ClassVar[str] = "sweep"
    contract: ClassVar = "lossy"

    def run(self, program):
        changes = Changes()
        for ratio, kl in ((0.5, 0.4), (0.0, 0.0), (0.25, 0.1)):
            changes.figure(f"{ratio:.3f}", "KL at skip ratio", kl)
        changes.became("1", "block", "dropped")
        changes.became("model.layers.0", "ffn", 'a "<&>" b')
        return changes


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=48, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 20
    ids = [model.generate(torch.randint(97, (1, 1)), max_length=20, do_sample=True, eos_token_id=96) for _ in range(5)]
    passes = [RotateHadamard(), Sweep(), Quantize(weights=4, activations=None, per_layer={"*.1.*": 8, "*.v_proj.*": 8})]
    with sv.compile(model, {"input_ids": ids[0]}, target="reference", passes=passes, calibration=ids) as made:
        yield made


@pytest.fixture(scope="module")
def rows(compiled):
    return compiled.report["ledger"]["rows"][compiled.report["ledger"]["start"] :]


def drawn(svg):
    return ElementTree.fromstring(svg)


def texts(node, tag="text"):
    return ["".join(found.itertext()) for found in node.iter(tag)]


def test_totals_follow_the_rows_from_the_first_pass_asked_for(compiled, rows):
    found = Totals.of(rows)
    start, *_, last = found.steps

    assert [s.step for s in found.steps] == ["start", *(row["pass"] for row in rows)]
    assert (start.size, last.size) == (rows[0]["before"]["parameter_bytes"], rows[-1]["after"]["parameter_bytes"])
    assert (start.loss, found.measure, found.data) == (0.0, "KL nats", "held-out")
    assert last.size < 0.6 * start.size
    assert last.loss == next(q for q in rows[-1]["quality"] if q["data"] == "held-out")["quality"]["kl"] > 0
    assert last.seconds == rows[-1]["runs"][1]
    assert compiled.report["ledger"]["totals"]["steps"][-1]["size"] == last.size


def test_table_has_what_each_pass_added_and_the_ratio_to_the_start(rows):
    totals = Totals.of(rows)
    head, start, *lines = totals.table()

    assert head[:4] == ["after", "weights MB", "this pass", "x start"]
    assert head[4:7] == ["run ms", "this pass", "x start"]
    assert head[7:] == ["KL nats (held-out)", "this pass", "perplexity (held-out)", "this pass", "x start"]
    assert start[2:4] == ["", 1.0]
    assert sum(line[2] for line in lines) == pytest.approx((totals.steps[-1].size - totals.steps[0].size) / 1e6)
    assert lines[-1][3] == pytest.approx(totals.steps[-1].size / totals.steps[0].size)
    assert sum(line[8] for line in lines) == pytest.approx(totals.steps[-1].loss)


def test_totals_without_data_know_sizes_only():
    facts = {"before": {"parameter_bytes": 0}, "after": {"parameter_bytes": 4_000_000}}
    found = Totals.of([{"pass": "grow", "runs": None, **facts}])

    assert found.table() == [
        ["after", "weights MB", "this pass", "x start"],
        ["start", 0.0, "", ""],
        ["grow", 4.0, 4.0, ""],
    ]
    assert Totals.of([]).steps == ()
    assert report_plots.way([]) == ""


def test_totals_of_other_models_add_errors():
    facts = {"before": {"parameter_bytes": 8}, "after": {"parameter_bytes": 4}, "runs": None}
    drifts = [{"output": "y", "error": 0.25, "cosine": 1.0}, {"output": "z", "error": 0.5, "cosine": 1.0}]
    found = Totals.of([
        {"pass": "a", **facts, "quality": [{"data": "calibration", "quality": None, "drifts": drifts}]},
        {"pass": "b", **facts, "quality": []},
    ])  # fmt: skip

    assert [s.loss for s in found.steps] == [0.0, 0.5, 0.5]
    assert (found.measure, found.data) == ("error", "calibration")


def test_ledger_says_it_in_text(compiled):
    text = compiled.report["ledger"]["text"]
    lines = text[text.index("from pass to pass") :].splitlines()

    assert "not the time on the target" in lines[0]
    assert lines[1].split()[:3] == ["after", "weights", "MB"]
    assert [line.split()[0] for line in lines[2:5]] == ["start", "rotate-hadamard", "sweep"]
    assert lines[5].startswith("quantize(weights=4")


def test_rows_carry_what_layers_became(rows):
    found = {(b["layer"], b["part"]): b["what"] for b in rows[-1]["layers"]}

    assert found == {
        (f"model.layers.{i}", part): "int8" if i == 1 else "int4/int8" if part == "attention" else "int4"
        for i in range(LAYERS)
        for part in ("attention", "ffn")
    }


def test_grid_composes_passes_in_order(rows):
    grid = Grid.of(rows, LAYERS + 1)

    assert grid.columns == ("0", "1", "2", "3")
    assert grid.cells["1", "attention"] == grid.cells["1", "ffn"] == ("dropped",)
    assert grid.cells["0", "ffn"] == ('a "<&>" b', "int4")
    assert grid.cells["2", "attention"] == ("int4/int8",)
    assert ("3", "ffn") not in grid.cells


def test_grid_is_drawn_with_texts_and_tooltips(rows):
    svg = drawn(Grid.of(rows, LAYERS + 1).svg())
    hints = texts(svg, "title")

    assert {"dropped", "int4", "int4/int8"} <= set(texts(svg))
    assert 'a "<&>" b' in texts(svg)
    assert '0 ffn: a "<&>" b, int4' in hints
    assert "3 attention: as it was" in hints
    assert len(list(svg.iter("rect"))) == 4 * 2 + 1


def test_texts_that_do_not_fit_are_whole_below():
    rows = [{"layers": [{"layer": "0", "part": "ffn", "what": what} for what in ("skipped in decode", "int4")]}]
    svg = drawn(Grid.of(rows).svg())

    assert texts(svg)[-1] == "skipped in decode"
    assert "skipped in…" in texts(svg)
    assert texts(svg).count("int4") == 1


def test_long_models_go_below_each_other():
    rows = [{"layers": [{"layer": str(i), "part": "attention", "what": "shares 3"} for i in range(40)]}]
    svg = drawn(Grid.of(rows).svg())
    columns = [t for t in texts(svg) if t.isdigit()]

    assert columns == [str(i) for i in range(40)]
    assert texts(svg).count("attention") == 3


@pytest.mark.parametrize(
    ("layers", "columns"),
    [
        (["encoder.layer.0", "decoder.layer.0"], ("encoder.layer.0", "decoder.layer.0")),
        (["h.1.mlp", "h.0.mlp"], ("0", "1")),
        (["head", "2"], ("head", "2")),
        (["2", "blocks.0"], ("0", "1", "2")),
    ],
)
def test_columns_are_numbers_where_paths_differ_in_one(layers, columns):
    rows = [{"layers": [{"layer": layer, "part": "ffn", "what": "int8"} for layer in layers]}]

    assert Grid.of(rows).columns == columns


@pytest.mark.parametrize(
    ("layer", "what", "shown"),
    [
        ("model.layers.4", "shares model.layers.3", "shares 3"),
        ("model.layers.4", "shares model.layers.4", "shares 4"),
        ("model.layers.4", "skipped by 2.5", "skipped by 2.5"),
        ("head", "shares a.3", "shares a.3"),
        ("4", "int4", "int4"),
    ],
)
def test_layers_in_texts_are_called_like_their_columns(layer, what, shown):
    rows = [{"layers": [{"layer": layer, "part": "ffn", "what": what}]}]

    assert list(Grid.of(rows).cells.values()) == [(shown,)]


def test_other_parts_get_rows_and_nothing_gets_no_picture():
    rows = [{"layers": [{"layer": "0", "part": "cross_attention", "what": "dropped"}]}]

    assert Grid.of(rows).rows == ("attention", "ffn", "cross_attention")
    assert Grid.of([{"layers": []}, {}]).svg() == ""


def test_curve_goes_through_its_points(compiled, rows):
    svg = drawn(report_plots.curves(rows).split("\n", 1)[1])
    (line,) = svg.iter("polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]

    assert "KL: 0.25, 0.1" in texts(svg, "title")
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)
    assert points[0][1] > points[1][1] > points[2][1]
    assert {"skip ratio", "KL"} <= set(texts(svg))
    assert "KL at skip ratio" not in compiled.report_html.read_text().split("Measured by layer")[-1].split("<h2>")[0]


def test_figures_of_places_are_no_curve():
    figures = [{"where": "layers.0", "name": "KL at skip ratio", "value": 1.0}]

    assert not report_plots.is_point(figures[0])
    assert report_plots.curves([{"pass": "p", "figures": figures}]) == ""


SEARCH = {
    "front": [
        {"size": 4e6, "latency": 2e-3, "kl": 0.3, "predicted": 0.2, "chosen": False},
        {"size": 6e6, "latency": 3e-3, "kl": 0.1, "predicted": 0.1, "chosen": True},
        {"size": 9e6, "latency": None, "kl": math.inf, "predicted": 0.1, "chosen": False},
    ]
}


def test_front_marks_the_choice():
    page = render({"search": SEARCH}, Manifest("null", {}))
    svgs = [drawn(f"<svg{part.split('</svg>')[0]}</svg>") for part in page.split("<svg")[1:]]

    assert "size MB against KL" in page
    assert "latency ms against KL" in page
    for svg, place in zip(svgs, ("6", "3"), strict=True):
        rings = [c for c in svg.iter("circle") if c.get("fill") == "none"]
        dots = {t: c for c in svg.iter("circle") for t in texts(c, "title")}
        assert len(dots) == 2
        (ring,) = rings
        assert ring.get("cx") == dots[f"measured: {place}, 0.1"].get("cx")
        assert "chosen" in texts(svg)


def test_budget_beside_what_was_predicted_and_measured():
    chosen = {"genome": "<b>", "predicted": {"size": 5e6, "max_kl": 0.1}, "measured": {"size": 5.5e6, "latency": 0.002}}
    page = render({"search": SEARCH | {"budget": {"size": 6e6}, "chosen": chosen}}, Manifest("null", {}))
    lines = [texts(row, "td") for row in drawn(page.removeprefix("<!DOCTYPE html>\n")).iter("tr")]

    assert ["size", "6 MB", "5 MB", "5.5 MB"] in lines
    assert ["latency", "", "", "2 ms"] in lines
    assert ["max_kl", "", "0.1", ""] in lines


@pytest.mark.parametrize("search", [None, {}, {"front": []}, {"front": [{"size": None, "latency": None, "kl": None}]}])
def test_no_search_no_front(search):
    assert "Pareto" not in render({"search": search} if search is not None else {}, Manifest("null", {}))


@pytest.mark.parametrize(
    "points",
    [
        ((0.0, 1.0),),
        ((2.0, -3.0), (2.0, -3.0)),
        ((0.0, 0.0),),
        ((-5e9, 1e-9), (5e9, 3e-9)),
        ((1.0, 2.0), (math.nan, 1.0)),
    ],
)
def test_axes_hold_any_finite_points(points):
    svg = drawn(plot([Series("<s>", points)], "x", "y"))
    centres = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]

    assert len(centres) == sum(all(map(math.isfinite, p)) for p in points)
    assert all(0 <= x <= float(svg.get("width")) and 0 <= y <= float(svg.get("height")) for x, y in centres)


def test_plot_of_nothing_is_nothing():
    assert plot([], "x", "y") == plot([Series("s", ((math.inf, 1.0),))], "x", "y") == ""


def test_page_of_a_whole_compilation_is_well_formed(compiled):
    page = compiled.report_html.read_text(encoding="utf-8")
    tree = drawn(page.removeprefix("<!DOCTYPE html>\n"))
    headings = texts(tree, "h2")

    assert headings[:4] == ["Summary", "From pass to pass", "What each layer became", "Quality against ratio"]
    assert not {n for node in tree.iter() for n in node.attrib if n in ("style", "href", "src") or n.startswith("on")}
    assert 'a "<&>" b' not in page
    json.dumps(compiled.report)

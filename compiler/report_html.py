"""report.html: one page about a compilation that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sylvester.compiler import report_plots
from sylvester.compiler.budget import FIELDS, shown
from sylvester.compiler.html_page import page
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.svg import Bar, bar_chart
from sylvester.compiler.totals import Totals

STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } h3 { font-size: 1em; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: .2em .8em .2em 0; text-align: left; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
pre { overflow-x: auto; font-size: 12px; } svg { max-width: 100%; height: auto; }
"""
BEFORE, AFTER = " before", " after"
Row = Mapping[str, Any]


def render(report: Mapping[str, Any], manifest: Manifest) -> str:
    """The page for the content of report.json and manifest.json; well-formed as XML too."""
    ledger = report.get("ledger", {})
    rows: list[Row] = list(ledger.get("rows", ()))
    asked = rows[ledger.get("start", 0) :]
    sections = {
        "Summary": _facts(_summary(report, rows, manifest)),
        "From pass to pass": _way(asked),
        "What each layer became": report_plots.layers(rows, report.get("model", {}).get("layers") or 0),
        "Quality against ratio": report_plots.curves(rows),
        "Budget": _budget(report.get("search") or {}),
        "Pareto front": report_plots.front(report.get("search")),
        "Quality": _quality(rows),
        "Passes": _passes(rows),
        "Decisions": _list(f"{row['pass']}: {note}" for row in rows for note in row.get("notes", ())),
        "Measured by layer": _figures(rows),
        "Refused": _refusals(rows),
        "Fusions": _fusions(ledger.get("fusions", ())),
        "Notes": _list(ledger.get("notes", ())),
        "The ledger as text": f"<pre>{escape(ledger['text'])}</pre>" if ledger.get("text") else "",
    }
    body = "\n".join(f"<h2>{name}</h2>\n{text}" for name, text in sections.items() if text)
    model = str(report.get("model", {}).get("architecture") or "model")
    return page(f"{model} for {manifest.target}", STYLE, body)


def _summary(report: Mapping[str, Any], rows: Sequence[Row], manifest: Manifest) -> dict[str, object]:
    model = report.get("model", {})
    data = model.get("calibration")
    sizes = [rows[0]["before"]["parameter_bytes"], rows[-1]["after"]["parameter_bytes"]] if rows else []
    return {
        "target": " ".join(filter(None, [manifest.target, manifest.arch, *manifest.isas])),
        "model": model.get("architecture"),
        "kind": model.get("kind"),
        "longest sequence": model.get("max_length"),
        "weights": " → ".join(f"{size / 1e6:.2f} MB" for size in dict.fromkeys(sizes)),
        "passes": ", ".join(manifest.passes) or "none asked for",
        "entries": ", ".join(manifest.entries),
        "calibration": f"{data['fit']} samples to fit, {data['held']} held back" if data else "none",
    }


def _facts(facts: Mapping[str, object]) -> str:
    known = [f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items() if value]
    return "<table>\n" + "\n".join(known) + "\n</table>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers to the right; nothing at all without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(value: object) -> str:
    if isinstance(value, (int, float)):
        return f'<td class="number">{value if isinstance(value, int) else format(value, ".4g")}</td>'
    return f"<td>{escape(str(value))}</td>"


def _list(items: Iterable[str]) -> str:
    lines = [f"<li>{escape(str(item))}</li>" for item in items]
    return "<ul>\n" + "\n".join(lines) + "\n</ul>" if lines else ""


def _budget(search: Mapping[str, Any]) -> str:
    """What was asked for, what a search predicted of its choice, and what that turned out to be."""
    bounds, chosen = search.get("budget") or {}, search.get("chosen") or {}
    columns = [bounds, chosen.get("predicted") or {}, chosen.get("measured") or {}]
    names = [name for name in FIELDS if any(name in column for column in columns)]
    lines = [[name, *(shown(name, c[name]) if name in c else "" for c in columns)] for name in names]
    return _table(("field", "bound", "predicted", "measured"), lines)


def _way(rows: Sequence[Row]) -> str:
    """Cumulative size, time and quality over the passes asked for, as a table and as bars."""
    if not rows:
        return ""
    head, *lines = Totals.of(rows).table()
    return f"{report_plots.way(rows)}\n{_table(list(map(str, head)), lines)}"


def _quality(rows: Sequence[Row]) -> str:
    judged = [(row["pass"], found) for row in rows for found in row.get("quality", ())]
    predicted = [_prediction(name, found) for name, found in judged if found.get("quality")]
    moved = [[name, f["data"], d["output"], d["error"], d["cosine"]] for name, f in judged for d in f.get("drifts", ())]
    headings = (
        "after pass",
        "data",
        "perplexity float",
        "now",
        "this pass",
        "KL nats",
        "top-1 agreement %",
        "positions",
    )
    return _table(headings, predicted) + _table(("after pass", "data", "output", "relative error", "cosine"), moved)


def _prediction(name: str, found: Row) -> list[object]:
    quality = found["quality"]
    scores = [quality["perplexity_before"], quality["perplexity"], found["change"], quality["kl"]]
    return [name, found["data"], *scores, 100 * quality["agreement"], quality["positions"]]


def _passes(rows: Sequence[Row]) -> str:
    headings = ("pass", "contract", "applied", "refused", "nodes", "weights MB", "Mflop", "pass ms", "max error")
    return _table(headings, [_pass(row) for row in rows])


def _pass(row: Row) -> list[object]:
    before, after = row["before"], row["after"]
    changed = [
        _arrow(str(before["nodes"]), str(after["nodes"])),
        _arrow(*(f"{facts['parameter_bytes'] / 1e6:.2f}" for facts in (before, after))),
        _arrow(*(f"{facts['flops'] / 1e6:.1f}" for facts in (before, after))),
    ]
    counts = sum(row["applied"].values()), sum(item["count"] for item in row["refused"])
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    return [row["pass"], row["contract"], *counts, *changed, round(1e3 * row["seconds"]), error]


def _arrow(before: str, after: str) -> str:
    return after if before == after else f"{before} → {after}"


def _refusals(rows: Sequence[Row]) -> str:
    found = [[row["pass"], r["rule"], r["count"], r["reason"], r["at"]] for row in rows for r in row["refused"]]
    return _table(("pass", "rule", "count", "reason", "first at"), found)


def _fusions(fusions: Sequence[Row]) -> str:
    found = [[f["entry"], f["kind"], f["count"], f["bytes_saved"] / 1e3] for f in fusions]
    return _table(("entry", "fused", "count", "kB less moved"), found)


def _figures(rows: Sequence[Row]) -> str:
    """One chart for each pass and name; names that end in "before" and "after" share one."""
    charts = []
    for row in rows:
        bars_of = [f for f in row.get("figures", ()) if not report_plots.is_point(f)]
        for name, values in _charts(bars_of).items():
            series = list(dict.fromkeys(key for found in values.values() for key in found))
            bars = [Bar(where, tuple(found.get(key) for key in series)) for where, found in values.items()]
            charts.append(f"<h3>{escape(row['pass'])}: {escape(name)}</h3>\n{bar_chart(bars, series)}")
    return "\n".join(charts)


def _charts(figures: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Title -> place -> series -> value."""
    charts: dict[str, dict[str, dict[str, float]]] = {}
    for figure in figures:
        name = str(figure["name"])
        series = next((end for end in (BEFORE, AFTER) if name.endswith(end)), "")
        title = name.removesuffix(series) if series else name
        charts.setdefault(title, {}).setdefault(str(figure["where"]), {})[series.strip() or name] = figure["value"]
    return charts

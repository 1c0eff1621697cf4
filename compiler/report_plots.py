"""The pictures of report.html: from pass to pass, what layers became, quality against a ratio, the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sylvester.compiler.layer_grid import Grid
from sylvester.compiler.svg import LETTERS, Bar, bar_chart
from sylvester.compiler.svg_plot import Series, plot
from sylvester.compiler.totals import EXPLAINED, Totals

Row = Mapping[str, Any]
AT = " at "
"""A figure named "KL at skip ratio" is a point of a curve: the ratio is its place, KL its value."""


def way(rows: Sequence[Row]) -> str:
    """Bars of size and time as ratios to the start, and of the loss, after every pass."""
    totals = Totals.of(rows)
    if not totals.steps:
        return ""
    start = totals.steps[0]
    timed = any(s.seconds is not None for s in totals.steps) and start.seconds
    series = ["weights", "run time"] if timed else ["weights"]
    bars = []
    for step in totals.steps:
        ratios = [step.size / start.size if start.size else None]
        if timed and start.seconds:
            ratios.append(None if step.seconds is None else step.seconds / start.seconds)
        bars.append(Bar(_short(step.step), tuple(ratios)))
    parts = [f"<p>{escape(EXPLAINED)}</p>", f"<h3>Ratio to the start: {escape(' and '.join(series))}</h3>"]
    parts.append(bar_chart(bars, series))
    if totals.measure:
        losses = [Bar(_short(step.step), (step.loss,)) for step in totals.steps]
        parts += [f"<h3>{escape(totals.measure)} against float, {escape(totals.data)} data</h3>"]
        parts.append(bar_chart(losses, [totals.measure]))
    return "\n".join(parts)


def _short(step: str) -> str:
    """A pass by its beginning: the name."""
    return step if len(step) <= LETTERS else f"{step[: LETTERS - 1]}…"


def layers(rows: Sequence[Row], count: int = 0) -> str:
    """The grid of what layers became; `count` layers in all, 0 where that is not known."""
    return Grid.of(rows, count).svg()


def is_point(figure: Row) -> bool:
    """Whether a figure is a point of a curve: its place is a number, its name says value and place."""
    return AT in str(figure["name"]) and _number(figure["where"]) is not None


def curves(rows: Sequence[Row]) -> str:
    """One plot per pass and kind of place, with a curve for each value."""
    parts = []
    for row in rows:
        found = [f for f in row.get("figures", ()) if is_point(f)]
        for place in dict.fromkeys(str(f["name"]).split(AT, 1)[1] for f in found):
            mine = [f for f in found if str(f["name"]).endswith(AT + place)]
            names = dict.fromkeys(str(f["name"]).split(AT, 1)[0] for f in mine)
            series = [Series(name, _points(mine, name + AT + place), joined=True) for name in names]
            if drawn := plot(series, place, ", ".join(names)):
                parts.append(f"<h3>{escape(row['pass'])}: {escape(', '.join(names))} at {escape(place)}</h3>\n{drawn}")
    return "\n".join(parts)


def front(search: Mapping[str, Any] | None) -> str:
    """Size and latency against KL of every point a search kept, the chosen one with a ring."""
    points: Sequence[Row] = (search or {}).get("front") or ()
    parts = []
    for name, unit, scale in (("size", "size MB", 1e-6), ("latency", "latency ms", 1e3)):
        known = [p for p in points if _number(p.get(name)) is not None and _number(p.get("kl")) is not None]
        marked = frozenset(i for i, p in enumerate(known) if p.get("chosen"))
        places = tuple((float(p[name]) * scale, float(p["kl"])) for p in known)
        if drawn := plot([Series("measured", places, marked=marked)], unit, "KL nats"):
            parts.append(f"<h3>{unit} against KL</h3>\n{drawn}")
    return "\n".join(parts)


def _points(figures: Sequence[Row], name: str) -> tuple[tuple[float, float], ...]:
    found = [(_number(f["where"]), _number(f["value"])) for f in figures if f["name"] == name]
    return tuple(sorted((x, y) for x, y in found if x is not None and y is not None))


def _number(given: object) -> float | None:
    """A finite number, also as a text; None for anything else."""
    try:
        found = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None

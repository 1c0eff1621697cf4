"""Bar charts as inline SVG: labels, bars and numbers, without a script, a style sheet or anything from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#4c78a8", "#e08214")
LABEL, BARS, NUMBER = 300, 340, 80
"""Widths of the three columns."""
BAR, GAP, TOP = 12, 5, 4
LETTERS = 44
"""Characters of a label that fit; the whole label is its tooltip."""


@dataclass(frozen=True)
class Bar:
    """A place with one value for each series; None where the series has none."""

    label: str
    values: tuple[float | None, ...]


def bar_chart(bars: Sequence[Bar], series: Sequence[str]) -> str:
    """Horizontal bars in the order given, from zero; the series of a place stand below each other."""
    step = BAR * len(series) + GAP
    legend = 0 if len(series) == 1 else BAR + GAP
    height, width = TOP + legend + step * len(bars), LABEL + BARS + NUMBER
    shown = [v for bar in bars for v in bar.values if v is not None and math.isfinite(v)]
    scale = _Scale(min([0.0, *shown]), max([0.0, *shown]))
    parts = list(_legend(series)) if legend else []
    for i, bar in enumerate(bars):
        parts += _bar(bar, TOP + legend + i * step, scale)
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-size="10">'
    return "\n".join([head, *parts, "</svg>"])


@dataclass(frozen=True)
class _Scale:
    """Values to horizontal places within the bars."""

    least: float
    most: float

    def __call__(self, value: float) -> float:
        span = self.most - self.least or 1.0
        return LABEL + BARS * (value - self.least) / span


def _legend(series: Sequence[str]) -> Iterator[str]:
    for i, name in enumerate(series):
        x = LABEL + 110 * i
        yield f'<rect x="{x}" y="{TOP}" width="10" height="10" fill="{COLOURS[i]}"/>'
        yield f'<text x="{x + 14}" y="{TOP + 9}" fill="currentColor">{escape(name)}</text>'


def _bar(bar: Bar, top: int, scale: _Scale) -> Iterator[str]:
    middle = top + (BAR * len(bar.values)) / 2 + 3
    label = bar.label if len(bar.label) <= LETTERS else f"…{bar.label[1 - LETTERS :]}"
    yield f'<text x="{LABEL - 6}" y="{middle:g}" text-anchor="end" fill="currentColor">{escape(label)}'
    yield f"<title>{escape(bar.label)}</title></text>"
    for i, value in enumerate(bar.values):
        if value is None:
            continue
        y = top + i * BAR
        if math.isfinite(value):
            left, right = sorted((scale(0.0), scale(value)))
            size = f'x="{left:.1f}" y="{y}" width="{max(right - left, 0.5):.1f}" height="{BAR - 2}"'
            yield f'<rect {size} fill="{COLOURS[i]}"/>'
        yield f'<text x="{LABEL + BARS + 6}" y="{y + BAR - 3}" fill="currentColor">{value:.4g}</text>'

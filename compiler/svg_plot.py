"""Points and curves in a plane as inline SVG: axes with round numbers, a colour per series, a ring around a choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from sylvester.compiler.svg import COLOURS

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 26, 44
"""Margins around the plane; numbers and labels stand in them."""
TICKS = 5
NAMED, APART = 90, 110
"""Where the names of series begin after the margin, and how far they are from each other at most."""
CHOSEN = 45
"""Width of the word beside the ring."""
MORE = (*COLOURS, "#5aae61", "#9970ab", "#b2182b")


@dataclass(frozen=True)
class Series:
    """Points (x, y) under one name, `joined` by a line in order of x; those in `marked` (by number) get a ring."""

    name: str
    points: tuple[tuple[float, float], ...]
    joined: bool = False
    marked: frozenset[int] = frozenset()


def plot(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """All finite points of all series in one plane; an empty text where there are none."""
    shown = [p for s in series for p in s.points if _finite(p)]
    if not shown:
        return ""
    x = _Axis.over([p[0] for p in shown], LEFT, WIDTH - RIGHT)
    y = _Axis.over([p[1] for p in shown], HEIGHT - BOTTOM, TOP)
    parts = [*_frame(x, y, x_label, y_label), *_names(series)]
    for number, one in enumerate(series):
        parts += _series(one, MORE[number % len(MORE)], x, y)
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" font-size="10">'
    return "\n".join([head, *parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """Values `low` to `high` along the page from `start` to `stop`; `step` between the numbers that are written."""

    low: float
    high: float
    step: float
    start: float
    stop: float

    @staticmethod
    def over(values: Sequence[float], start: float, stop: float) -> _Axis:
        least, most = min(values), max(values)
        span = most - least or abs(most) or 1.0
        step = _round_step(span / TICKS)
        low, high = math.floor(least / step) * step, math.ceil(most / step) * step
        return _Axis(low, high if high > low else low + step, step, start, stop)

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> Iterator[str]:
    """Thin lines at round numbers, the numbers, and what the axes mean."""
    for value in x.ticks():
        at = f"{x(value):.1f}"
        yield f'<line x1="{at}" y1="{TOP}" x2="{at}" y2="{HEIGHT - BOTTOM}" stroke="currentColor" opacity="0.15"/>'
        yield _text(x(value), HEIGHT - BOTTOM + 14, _number(value, x.step), "middle")
    for value in y.ticks():
        at = f"{y(value):.1f}"
        yield f'<line x1="{LEFT}" y1="{at}" x2="{WIDTH - RIGHT}" y2="{at}" stroke="currentColor" opacity="0.15"/>'
        yield _text(LEFT - 6, y(value) + 3, _number(value, y.step), "end")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle")
    yield _text(4, TOP - 12, y_label, "start")


def _names(series: Sequence[Series]) -> Iterator[str]:
    """The colours, when there is more than one."""
    start = LEFT + NAMED
    apart = min(APART, (WIDTH - start) // max(1, len(series)))
    for number, one in enumerate(series if len(series) > 1 else ()):
        x, colour = start + apart * number, MORE[number % len(MORE)]
        yield f'<rect x="{x}" y="{TOP - 20}" width="10" height="10" fill="{colour}"/>'
        yield _text(x + 14, TOP - 11, one.name, "start")


def _series(one: Series, colour: str, x: _Axis, y: _Axis) -> Iterator[str]:
    places = [(x(p[0]), y(p[1])) if _finite(p) else None for p in one.points]
    if one.joined:
        way = " ".join(f"{px:.1f},{py:.1f}" for px, py in sorted(p for p in places if p))
        yield f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for number, (place, point) in enumerate(zip(places, one.points, strict=True)):
        if place is None:
            continue
        centre = f'cx="{place[0]:.1f}" cy="{place[1]:.1f}"'
        hint = escape(f"{one.name}: {point[0]:.4g}, {point[1]:.4g}")
        yield f'<circle {centre} r="3" fill="{colour}"><title>{hint}</title></circle>'
        if number in one.marked:
            yield f'<circle {centre} r="7" fill="none" stroke="#b2182b" stroke-width="2"/>'
            right = place[0] > WIDTH - RIGHT - CHOSEN
            yield _text(place[0] + (-10 if right else 10), place[1] - 6, "chosen", "end" if right else "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'


def _number(value: float, step: float) -> str:
    """Zero is zero, whatever the sums left of it."""
    return "0" if abs(value) < step / 1e6 else f"{value:.4g}"


def _finite(point: tuple[float, float]) -> bool:
    return all(map(math.isfinite, point))

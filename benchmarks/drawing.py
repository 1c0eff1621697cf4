"""Horizontal bars as SVG: one group per work, lengths relative to the slowest bar of the group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

OURS, PEERS, BOUND = "#2563eb", "#9ca3af", "#dc2626"
LEFT, LONGEST, LINE, WIDTH = 190, 330, 20, 640


@dataclass(frozen=True)
class Bar:
    """`bound`: milliseconds that the machine allows at best, drawn as a tick."""

    label: str
    milliseconds: float
    ours: bool = False
    bound: float | None = None


def bars(groups: Mapping[str, Sequence[Bar]], form: str = "{:.2f} ms") -> str:
    """`form` writes the number of a bar, which is milliseconds unless it says otherwise."""
    lines: list[str] = []
    y = 10
    for title, group in groups.items():
        lines.append(text(10, y + 13, title, ' font-weight="bold"'))
        slowest = max(bar.milliseconds for bar in group)
        for bar in group:
            y += LINE
            lines += drawn(bar, LONGEST / slowest, y, form)
        y += LINE + 12
    style = 'font-family="system-ui, sans-serif" font-size="13"'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" {style}>'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>"]) + "\n"


def drawn(bar: Bar, scale: float, y: int, form: str) -> list[str]:
    width, colour = scale * bar.milliseconds, OURS if bar.ours else PEERS
    lines = [
        text(10, y + 13, bar.label),
        f'<rect x="{LEFT}" y="{y + 2}" width="{width:.1f}" height="14" rx="2" fill="{colour}"/>',
        text(LEFT + 6 + width, y + 13, form.format(bar.milliseconds)),
    ]
    if bar.bound:
        x = LEFT + scale * bar.bound
        lines.append(f'<rect x="{x:.1f}" y="{y + 1}" width="2" height="16" fill="{BOUND}"/>')
    return lines


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}"{style}>{escape(words)}</text>'

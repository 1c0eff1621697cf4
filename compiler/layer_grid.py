"""What each layer became, as a picture: a column per layer, a row per part, a stripe for everything done to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

PARTS = ("attention", "ffn")
BLOCK, DROPPED = "block", "dropped"
ACROSS = 16
"""Layers side by side; more go below."""
WIDE, STRIPE, NAMES, HEAD, GAP = 58, 17, 70, 16, 3
LETTERS = 11
LEAST_WIDTH = 480
"""For whole texts below the picture."""
COLOURS = (
    (re.compile(DROPPED), "#8c2d04"),
    (re.compile(r"decode|skip|depth"), "#fdae6b"),
    (re.compile(r"share|atom|bas[ie]s|rank"), "#c2a5cf"),
    (re.compile(r"\bint3\b"), "#4292c6"),
    (re.compile(r"\bint4\b"), "#6baed6"),
    (re.compile(r"\bint8\b"), "#9ecae1"),
    (re.compile(r"\bbf16\b"), "#deebf7"),
    (re.compile(r"rotat|hadamard"), "#a1d99b"),
)
OTHER, KEPT = "#d9d9d9", "none"


@dataclass(frozen=True)
class Grid:
    """`columns` name the layers; `cells` has the texts of (layer, part) in the order of the passes."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[str, ...]]

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], layers: int = 0) -> Grid:
        """From the "layers" of the ledger's rows; `layers` says how many the model had, 0 where that is not known."""
        found = [item for row in rows for item in row.get("layers", ())]
        names = _columns([str(item["layer"]) for item in found])
        parts = tuple(dict.fromkeys([*PARTS, *(str(i["part"]) for i in found if i["part"] != BLOCK)]))
        cells: dict[tuple[str, str], tuple[str, ...]] = {}
        for item in found:
            for part in PARTS if item["part"] == BLOCK else (str(item["part"]),):
                key = (names[str(item["layer"])], part)
                cells[key] = _with(cells.get(key, ()), _named(str(item["what"]), names))
        return Grid(_all(list(names.values()), layers), parts, cells)

    def svg(self) -> str:
        """The picture; an empty text when nothing became anything."""
        if not self.cells:
            return ""
        bands = [self.columns[i : i + ACROSS] for i in range(0, len(self.columns), ACROSS)]
        height = STRIPE * max(map(len, self.cells.values()))
        deep = HEAD + len(self.rows) * (height + GAP) + 2 * GAP
        parts = [line for i, band in enumerate(bands) for line in self._band(band, i * deep, height)]
        longer = dict.fromkeys(t for texts in self.cells.values() for t in texts if len(t) > LETTERS)
        parts += _legend(list(longer), deep * len(bands))
        size = (max(NAMES + WIDE * len(bands[0]), LEAST_WIDTH), deep * len(bands) + STRIPE * len(longer))
        head = f'<svg viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}" role="img" font-size="10">'
        return "\n".join([head, *parts, "</svg>"])

    def _band(self, band: Sequence[str], top: int, height: int) -> Iterator[str]:
        for i, column in enumerate(band):
            yield _text(NAMES + i * WIDE + WIDE / 2, top + 11, column, "currentColor", "middle")
        for number, part in enumerate(self.rows):
            y = top + HEAD + number * (height + GAP)
            yield _text(NAMES - 8, y + height / 2 + 4, part, "currentColor", "end")
            for i, column in enumerate(band):
                yield from _cell(NAMES + i * WIDE, y, height, self.cells.get((column, part), ()), f"{column} {part}")


def _with(texts: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Nothing more happens to what was dropped, and dropping hides what was done before."""
    if DROPPED in texts or text in texts:
        return texts
    return (text,) if text == DROPPED else (*texts, text)


def _named(text: str, names: Mapping[str, str]) -> str:
    """A text that ends with the path of a layer, such as "shares model.layers.3", with the name of its column."""
    head, space, path = text.rpartition(" ")
    number = re.fullmatch(r"[a-zA-Z_][\w.]*\.(\d+)", path)
    short = names.get(path) or (number[1] if number and all(name.isdigit() for name in names.values()) else path)
    return f"{head}{space}{short}"


def _columns(layers: Sequence[str]) -> dict[str, str]:
    """Numbers for layers that differ in one number of their path only, the paths themselves for others."""
    found = {layer: re.fullmatch(r"(|.*?\.)(\d+)(|\..*)", layer) for layer in layers}
    kinds = {(m[1], m[3]) for m in found.values() if m} - {("", "")}
    if all(found.values()) and len(kinds) <= 1:
        return {layer: m[2] for layer, m in found.items() if m}
    return {layer: layer for layer in layers}


def _all(names: Sequence[str], layers: int) -> tuple[str, ...]:
    """Numbered layers without gaps; others in the order they came."""
    if all(name.isdigit() for name in names):
        return tuple(map(str, range(max(layers, *(int(name) + 1 for name in names), 0))))
    return tuple(dict.fromkeys(names))


def _cell(x: int, y: int, height: int, texts: Sequence[str], where: str) -> Iterator[str]:
    """One stripe per text, together as high as the cell; an empty frame where nothing was done."""
    hint = escape(f"{where}: {', '.join(texts) or 'as it was'}")
    each = height / max(len(texts), 1)
    for i, text in enumerate(texts or [""]):
        colour = _colour(text)
        size = f'x="{x + 1}" y="{y + i * each:g}" width="{WIDE - 2}" height="{each:g}"'
        yield f'<rect {size} fill="{colour}" stroke="#8888" stroke-width="0.5"><title>{hint}</title></rect>'
        if text:
            short = text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"
            ink = "#fff" if text == DROPPED else "#000"
            yield _text(x + WIDE / 2, y + (i + 0.5) * each + 3, short, ink, "middle")


def _legend(texts: Sequence[str], top: int) -> Iterator[str]:
    """The whole of every text that is cut in its cell."""
    for i, text in enumerate(texts):
        y = top + i * STRIPE
        yield f'<rect x="{NAMES}" y="{y}" width="10" height="10" fill="{_colour(text)}"/>'
        yield _text(NAMES + 16, y + 9, text, "currentColor", "start")


def _colour(text: str) -> str:
    return next((colour for pattern, colour in COLOURS if pattern.search(text)), OTHER) if text else KEPT


def _text(x: float, y: float, text: str, ink: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{ink}">{escape(text)}</text>'

"""Micro-kernels that a page chooses from by measuring (nn-JIT.web, 2023): a lite space, and modules of all in it.

Engines compile a module again for the registers they have: 16 vectors on x86-64, 32 on Arm. So what is worth trying is
the shape of a tile and how its sums are kept; the layout of weights and rows is settled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from sylvester.codegen.formats import format_headers
from sylvester.codegen.isa import WASM, Isa
from sylvester.codegen.layout import Format, FormatName
from sylvester.codegen.prelude import STEADY_ROWS, prelude, render
from sylvester.codegen.space import PREFILL_ROWS, ROW_CLASSES, Candidate, Space

FORMATS: tuple[FormatName, ...] = ("f32", "q8", "q4", "q3")
"""Weight formats with micro-kernels to choose from."""
CLASSES = (*(rows for _, rows in ROW_CLASSES), PREFILL_ROWS)
"""Rows that stand for a class of them."""
FLOAT_TILES = (
    (1, 4, 1), (1, 8, 1), (1, 8, 4), (2, 4, 1), (2, 8, 4), (3, 4, 1), (3, 8, 1), (4, 2, 1), (4, 4, 1), (6, 2, 1),
    (6, 4, 1), (8, 2, 1),
)  # fmt: skip
"""Rows, vectors of 4 columns, and steps over k at once; the sums fit 16 registers, or 32."""
WHOLE_TILES = ((1, 2), (1, 4), (2, 2), (3, 1), (3, 2), (4, 1), (4, 2), (6, 1), (6, 2))
"""Rows and pairs of vectors; the two halves of a panel go together."""
DEFAULT = {"rows": 2, "pairs": 2, "words": 0}
"""The kernel of the module for several rows of whole numbers."""


def space(form: Format, isa: Isa, rows: int) -> Space:
    """The candidates for products of about `rows` rows; the first is the kernel of the module itself."""
    tried = _floats(rows) if form.name == "f32" else _whole(form, isa)
    return Space.of(module_name(form), *(choice for choice in tried if (choice["rows"] == 1) == (rows == 1)))


def _floats(rows: int) -> Iterator[dict[str, int]]:
    for height, vecs, steps in FLOAT_TILES:
        for whole in (1,) if rows <= STEADY_ROWS else (0, 1):
            yield {"rows": height, "vecs": vecs, "steps": steps, "whole": whole}


def _whole(form: Format, isa: Isa) -> Iterator[dict[str, int]]:
    both = form.name != "q8" and isa.name.startswith("relaxed")
    for (height, pairs), words in product(WHOLE_TILES, (0, 1) if both else (0,)):
        choice = {"rows": height, "pairs": pairs, "words": words}
        if choice != DEFAULT:
            yield choice


def every(form: Format, isa: Isa) -> tuple[Candidate, ...]:
    """The candidates of all problems, in the order of the functions c0, c1, ... of their module."""
    return tuple(dict.fromkeys(c for rows in CLASSES for c in space(form, isa, rows).candidates[1:]))


def module_name(form: Format) -> str:
    """Of the module that has the candidates."""
    return f"{form.name}-groups" if form.group else form.name


def module(form: Format, isa: Isa) -> str:
    """The translation unit of a format's candidates."""
    headers = [prelude(isa), *format_headers({form.name}, isa)]
    floats = [render("candidates_f32.h.in")] if form.name == "f32" else []
    candidates = every(form, isa)
    text = render(
        "candidates.c.in",
        TITLE=module_name(form),
        TILES="\n".join(dict.fromkeys(t for c in candidates for t in _tiles(form, c))),
        CANDIDATES="\n\n".join(_candidate(form, number, c) for number, c in enumerate(candidates)),
    )
    return "\n".join([*headers, *floats, text])


def _tile(c: Candidate, height: int) -> str:
    values = [value for name, value in c.parameters.items() if name not in ("rows", "whole")]
    return f"sv_tile_{'_'.join(map(str, [height, *values]))}"


def _tiles(form: Format, c: Candidate) -> Iterator[str]:
    """One function for each height of a block."""
    p = c.parameters
    for height in range(1, p["rows"] + 1):
        head = f"static SV_NOINLINE void {_tile(c, height)}(const sv_product *o"
        if form.name == "f32":
            body = f"sv_choice_columns(o, at, k, {height}, {p['vecs']}, {p['steps']});"
            yield f"{head}, int64_t at, int64_t k)\n{{\n    {body}\n}}"
            continue
        bits, wide = form.name[1:], f"SV_{form.name.upper()}_WIDE"
        kind = (
            f".bits = {bits}, .wide = {wide}, .grouped = {int(form.group > 0)}, .rows = {height}, "
            f".pairs = {p['pairs']}, .words = {p['words']}"
        )
        yield f"{head})\n{{\n    sv_q_columns(o, (sv_q_kind){{{kind}}});\n}}"


def _candidate(form: Format, number: int, c: Candidate) -> str:
    floats = form.name == "f32"
    given = "(o, at, deep)" if floats else "(o)"
    cases = " ".join(f"case {h}: {_tile(c, h)}{given}; break;" for h in range(1, c.parameters["rows"] + 1))
    blocks = f"SV_BLOCKS(o, {c.parameters['rows']}, SV_TILES_{number});"
    return f"""/* {c} */
#define SV_TILES_{number}(o) switch ((o)->m) {{ {cases} }}
SV_CANDIDATE({number})(const sv_product *o)
{{
    {_passes(c, blocks) if floats else blocks}
}}"""


def _passes(c: Candidate, blocks: str) -> str:
    """Float32 products of many rows and whole panels may take k in passes, as the kernel of the module does."""
    once = "1" if c.parameters["whole"] else "o->steady || o->cols < SV_PANEL"
    return f"""const int64_t k = o->k, depth = {once} ? k + !k : sv_depth(o->m, k);
    for (int64_t at = 0; at == 0 || at < k; at += depth) {{
        const int64_t deep = k - at < depth ? k - at : depth;
        {blocks}
    }}"""


def choices(formats: Iterable[FormatName], isa: Isa) -> list[str]:
    """C text through which the panels of these formats may get other micro-kernels; follows the headers of formats."""
    found = sorted(set(formats) & set(FORMATS)) if isa.architecture == WASM else []
    rounding = {name: "" if name == "f32" else ", 8, NULL" for name in found}
    classes = " + ".join(f"(m > {most})" for most, _ in ROW_CLASSES)
    texts = [render("panel_choice.h.in", FORMAT=name, ROUNDING=rounding[name]) for name in found]
    return [render("panel_choices.h.in", CLASSES=classes), *texts] if found else []

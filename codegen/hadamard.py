"""y = x H^T / sqrt(block) on the last axis in blocks: butterflies in registers, then products with Paley's bases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sylvester.codegen.paley import Core, core
from sylvester.codegen.prelude import render
from sylvester.compiler.hadamard import scheme_of

MOST = 1 << 17
"""The largest block: 512 KiB of floats, which stay in the level 2 cache."""


@dataclass(frozen=True)
class Step:
    """A base over parts of so many floats."""

    core: Core
    part: int


def hadamard_header(vectors: int | None = None) -> str:
    """`sv_hadamard_blocks` and its parts; `vectors` held in registers (4, 8 or 16) is what may be tuned."""
    if vectors not in (None, 4, 8, 16):
        raise ValueError(f"the Hadamard kernel takes 4, 8 or 16 vectors at once, got {vectors}")
    return render("hadamard.h.in", VECS=vectors or "(SV_ACC >= 24 ? 16 : 8)")


def hadamard(block: int, transposed: bool = False) -> tuple[str, str]:
    """Name and C text of the kernel over strided rows; it follows `row_header` and needs no scratch."""
    many = _many(block, transposed)
    name = many.replace("many", "rows")
    return name, render("hadamard.c.in", NAME=name, BLOCKS=many)


def row_header(block: int, transposed: bool = False) -> str:
    """The C text before calls over blocks of an order; equal texts may follow each other."""
    found = scheme_of(block)
    if not found.bases:
        return hadamard_header()
    steps = list(_steps(block, transposed))
    function = render(
        "hadamard_block.h.in",
        NAME=_many(block, transposed),
        ROOM=max(step.core.room for step in steps),
        BLOCK=block,
        BODY=_body(steps, block),
    )
    headers = render("hadamard_fourier.h.in") + render("hadamard_paley.h.in")
    return hadamard_header() + headers + "".join(step.core.text for step in steps) + function


def _body(steps: list[Step], block: int) -> str:
    """The innermost base with the butterflies, then the others in place, block by block."""
    first, *others = steps
    scale = f"{first.part}, {block**-0.5!r}f, room);"
    if not others:
        return f"sv_paley_blocks(y, x, {first.core.name}, count, y_step, x_step, {scale}"
    inner = first.part * first.core.order
    lines = [f"sv_paley_blocks(y, x, {first.core.name}, {block // inner}, {inner}, {inner}, {scale}"]
    for step in others:
        lines.append(f"for (int64_t at = 0; at < {block}; at += {step.part * step.core.order})")
        lines.append(f"    sv_paley_strips(y + at, y + at, {step.core.name}, {step.part}, 0, room);")
    body = "\n        ".join(lines)
    return f"for (; count > 0; count--, y += y_step, x += x_step) {{\n        {body}\n    }}"


def row_call(row: str, k: str, block: int, transposed: bool = False) -> str:
    """C statement that transforms the k floats at `row` in place."""
    return f"{_many(block, transposed)}({row}, {row}, {k} / {block}, {block}, {block}, {block});"


def _many(block: int, transposed: bool) -> str:
    """A transposed product has its own kernel where the matrix is not symmetric."""
    bases = scheme_of(block).bases
    turned = transposed and not all(b.second for b in bases)
    return f"sv_hadamard_many_{block}{'t' if turned else ''}" if bases else "sv_hadamard_many"


def _steps(block: int, transposed: bool) -> Iterator[Step]:
    """From the innermost base to the outermost."""
    found = scheme_of(block)
    part = 1 << found.k
    for base in reversed(found.bases):
        yield Step(core(base, part, transposed), part)
        part *= base.order

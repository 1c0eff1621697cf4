"""C text of the rotated, rounded products of training (compiler/halo_ops.py), for one instruction set."""

from __future__ import annotations

from sylvester.codegen.hadamard import hadamard_header
from sylvester.codegen.isa import Isa
from sylvester.codegen.prelude import prelude, render

BLOCK_ROWS = 48
"""Rows of A that one task multiplies."""


def text() -> str:
    """`sv_halo_rounded` for every instruction set, `sv_halo_mm` for those with dot products of bytes."""
    headers = [render(f"{part}.h.in") for part in ("qrow", "qtile")]
    kernels = [render("halo.h.in"), render("halo_rounded.c.in"), render("halo_mm.c.in", ROWS=BLOCK_ROWS)]
    return "\n".join([*headers, hadamard_header(), *kernels])


def source(isa: Isa) -> str:
    """The translation unit for an instruction set."""
    return prelude(isa) + text()

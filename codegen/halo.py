"""C text of the rotated, rounded products of training (compiler/halo_ops.py), for one instruction set."""

from __future__ import annotations

from sylvester.codegen.hadamard import hadamard_header
from sylvester.codegen.isa import Isa
from sylvester.codegen.prelude import prelude, render
from sylvester.compiler.halo_grouped import GROUP

BLOCK_ROWS = 64
"""Rows of A that one task multiplies, at most."""


def text() -> str:
    """`sv_halo_mm` for instruction sets with dot products of bytes, all else for every one."""
    headers = [render(f"{part}.h.in") for part in ("qrow", "qtile", "amx")]
    grouped = render("halo_grouped.c.in", GROUP=GROUP)
    kernels = [render("halo.h.in"), render("halo_rounded.c.in"), grouped, render("halo_mm.c.in")]
    return "\n".join([*headers, hadamard_header(), *kernels])


def source(isa: Isa) -> str:
    """The translation unit for an instruction set."""
    return prelude(isa) + text()

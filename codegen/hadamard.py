"""y = H x / sqrt(block) on the last axis in blocks of a power of two, by butterflies in registers."""

from __future__ import annotations

from sylvester.codegen.prelude import render

MOST = 1 << 15
"""The largest block: 128 KiB of floats, which stay in the level 2 cache."""


def hadamard_header(vectors: int | None = None) -> str:
    """`sv_hadamard_row(row, k, block)` and its parts; `vectors` held in registers (4, 8 or 16) is what may be tuned."""
    if vectors not in (None, 4, 8, 16):
        raise ValueError(f"the Hadamard kernel takes 4, 8 or 16 vectors at once, got {vectors}")
    return render("hadamard.h.in", VECS=vectors or "(SV_ACC >= 24 ? 16 : 8)")


def hadamard(name: str = "sv_hadamard") -> str:
    """C text of the kernel over strided rows; it follows the header and needs no scratch."""
    return render("hadamard.c.in", NAME=name)

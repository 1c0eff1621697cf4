"""Rotary position embedding (Su et al. 2021): rotate pairs of values by an angle per position."""

from __future__ import annotations

from sylvester.codegen.prelude import render


def rope_header() -> str:
    """Types shared by all instances; goes once before the first."""
    return render("rope.h.in")


def rope(
    name: str, head_dim: int, rotary_dim: int | None = None, *, interleaved: bool = False, half: bool = False
) -> str:
    """C text of one instance. Pairs are (p, p + rotary / 2), or (2p, 2p + 1) when interleaved; `half`: cos and sin hold
    one angle per pair instead of one per value. Values past `rotary_dim` are copied."""
    rotary = head_dim if rotary_dim is None else rotary_dim
    if rotary % 2 or rotary > head_dim:
        raise ValueError(f"rotary size must be even and at most the head size {head_dim}, got {rotary}")
    first, second = ("2 * p", "2 * p + 1") if interleaved else ("p", f"p + {rotary // 2}")
    angles = ("p", "p") if half else (first, second)
    places = {"FIRST": first, "SECOND": second, "FIRST_ANGLE": angles[0], "SECOND_ANGLE": angles[1]}
    return render("rope.c.in", NAME=name, D=head_dim, ROTARY=rotary, **places)

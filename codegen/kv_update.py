"""Write new rows into a key or value cache."""

from __future__ import annotations

from sylvester.codegen.prelude import render


def kv_update(name: str = "sv_kv_update") -> str:
    """C text of the kernel; it needs no scratch."""
    return render("kv_update.c.in", NAME=name)

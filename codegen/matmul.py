"""y = a b for batches of matrices that are both computed at run time."""

from __future__ import annotations

from sylvester.codegen.prelude import render


def matmul(name: str = "sv_matmul") -> str:
    """C text of one instance; `<name>_scratch(k)` is the scratch it needs per thread."""
    return render("matmul.c.in", NAME=name, EPILOGUE="")

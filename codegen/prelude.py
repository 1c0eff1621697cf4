"""The C text every artefact starts with: ISA macros, runtime, vectors, math and micro-kernels."""

from __future__ import annotations

from functools import cache
from importlib import resources
from string import Template

from sylvester.codegen.isa import WASM, Isa

STEADY_ROWS = 64
"""Rows of a product up to which a row has the same bits whatever rows come with it."""


@cache
def template(name: str) -> Template:
    """One file of codegen/templates as a `string.Template`."""
    return Template(resources.files("sylvester.codegen").joinpath("templates", name).read_text(encoding="utf-8"))


def render(name: str, **values: object) -> str:
    """Fill a template; a missing value is a KeyError."""
    return template(name).substitute({key: str(value) for key, value in values.items()})


def system(architecture: str) -> str:
    """Threads, and what this machine can run: all that text needs that has no kernels."""
    name = "wasm" if architecture == WASM else "posix"
    parts = ("runtime", f"wait_{name}", "team", f"threads_{name}", "dispatch")
    return "\n".join(render(f"{part}.h.in") for part in parts)


def prelude(isa: Isa) -> str:
    """Everything a translation unit for `isa` needs before its kernels."""
    rows = range(1, isa.gemm_rows + 1)
    gemm = render(
        "gemm.h.in",
        TILES="\n".join(f"SV_TILE({r})" for r in rows),
        TILE_NAMES=", ".join(f"sv_tile_{r}" for r in rows),
        STEADY=STEADY_ROWS,
        STEADY_TILES="\n".join(f"SV_STEADY_TILE({r})" for r in rows),
        STEADY_NAMES=", ".join(f"sv_steady_tile_{r}" for r in rows),
    )
    before = [render(f"{part}.h.in") for part in ("vector", "math", "norm")]
    after = [render(f"{part}.h.in") for part in ("pack", "conv2d")]
    return "\n".join([isa.defines(), system(isa.architecture), *before, gemm, *after])

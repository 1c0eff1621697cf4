"""The CPU instruction sets kernels are built for, as one table of differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sylvester.compiler.errors import Unsupported

FIELDS = {"SV_VL": "vector", "SV_ACC": "accumulators", "SV_MR": "gemm_rows"}
"""Macros of the kernel templates that the table itself holds."""


@dataclass(frozen=True)
class Isa:
    """One build variant; `level` is what `sv_isa_level()` must reach for it to be loaded."""

    name: str
    level: int
    march: str
    """The `-march` name in the spelling of gcc and clang."""
    vector: int
    """Floats in one vector register."""
    accumulators: int
    """Vector registers a micro-kernel may use for its output tile."""
    gemm_rows: int
    """Rows of the largest micro-kernel tile."""
    features: tuple[str, ...] = ()
    """Extensions beyond `march`, each switched on by `-m<name>`."""
    flags: tuple[str, ...] = ()
    architecture: str = "x86_64"
    zig: str = ""
    """The `-march` name in the spelling of zig, where it is not `march` and `features` with underscores."""
    formats: tuple[str, ...] = ()
    """Weight formats that are faster here than one level below; empty: every program is."""
    permission: bool = False
    """The operating system must be asked before the first instruction."""
    macros: tuple[tuple[str, int], ...] = ()
    """Tuned values of macros that the kernel templates have defaults for."""

    def tuned(self, macros: Mapping[str, int]) -> Isa:
        """The same variant with other values of macros; those of the table change the table."""
        fields = {FIELDS[name]: value for name, value in macros.items() if name in FIELDS}
        others = {name: value for name, value in macros.items() if name not in FIELDS}
        return replace(self, macros=tuple(sorted({**dict(self.macros), **others}.items())), **fields)  # type: ignore[arg-type]

    def defines(self) -> str:
        """The C macros the kernel templates read."""
        values = {**{name: getattr(self, field) for name, field in FIELDS.items()}, **dict(self.macros)}
        return "".join(f"#define {name} {value}\n" for name, value in values.items())

    def gains(self, formats: Iterable[str]) -> bool:
        """Whether a program with weights in these formats is faster here than one level below."""
        return not self.formats or not set(self.formats).isdisjoint(formats)


_VNNI = ("avx512vnni",)
_BF16 = (*_VNNI, "avx512bf16")
_AMX = (*_BF16, "amx-tile", "amx-int8", "amx-bf16")

# Few CPUs are so old that they run the scalar variant; every artefact pays for building it.
SCALAR = Isa("scalar", 0, "x86-64", vector=4, accumulators=12, gemm_rows=6, flags=("-Os",))
AVX2 = Isa("avx2", 1, "x86-64-v3", vector=8, accumulators=12, gemm_rows=6)
AVX512 = Isa("avx512", 2, "x86-64-v4", vector=16, accumulators=24, gemm_rows=12, flags=("-mprefer-vector-width=512",))
VNNI = replace(AVX512, name="vnni", level=3, features=_VNNI, formats=("q8", "q4", "q3"))
BF16 = replace(AVX512, name="bf16", level=4, features=_BF16, formats=("bf16",))
AMX = replace(AVX512, name="amx", level=5, features=_AMX, formats=("q8", "q4", "q3", "bf16"), permission=True)

NEON = Isa("neon", 0, "armv8-a", vector=4, accumulators=24, gemm_rows=6, architecture="aarch64", zig="generic")
DOTPROD = replace(
    NEON,
    name="dotprod",
    level=1,
    march="armv8.2-a+dotprod+fp16",
    zig="generic+v8_2a+dotprod+fullfp16",
    formats=("q8", "q4", "q3"),
)

WASM = "wasm32"
_SIMD128 = "generic+simd128+bulk_memory+sign_ext+nontrapping_fptoint+mutable_globals"

# Engines have 16 registers on x86-64 and move products about: a tile of 8 vectors leaves room for all its operands.
SIMD128 = Isa(
    "simd128", 0, "generic", vector=4, accumulators=8, gemm_rows=4, architecture=WASM, zig=_SIMD128,
    macros=(("SV_Q3_ROWS", 2), ("SV_Q4_ROWS", 2), ("SV_Q8_GROUPED_ROWS", 2), ("SV_Q8_ROWS", 2)), flags=("-O2",),
)  # fmt: skip
RELAXED = replace(SIMD128, name="relaxed", level=1, zig=f"{_SIMD128}+relaxed_simd")
THREADED = tuple(replace(isa, name=f"{isa.name}-threads", zig=f"{isa.zig}+atomics") for isa in (SIMD128, RELAXED))

ISAS = (SCALAR, AVX2, AVX512, VNNI, BF16, AMX, NEON, DOTPROD, SIMD128, RELAXED, *THREADED)


def of(architecture: str) -> tuple[Isa, ...]:
    """The variants of an architecture by level; the first runs on every CPU of it."""
    found = tuple(isa for isa in ISAS if isa.architecture == architecture)
    if not found:
        known = sorted({isa.architecture for isa in ISAS} - {WASM})
        raise Unsupported(f"no CPU variants for architecture {architecture!r}", hint=f"there are some for {known}")
    return found


def variants(formats: Iterable[str], architecture: str, names: Iterable[str] = ()) -> tuple[Isa, ...]:
    """What an artefact with weights in these formats carries: the named variants, else all those it gains from.

    The first is always the one that every CPU runs: it tells which of the others this CPU has.
    """
    known, formats, names = of(architecture), set(formats), set(names)
    if unknown := sorted(names - {isa.name for isa in known}):
        raise Unsupported(
            f"no CPU variant named {unknown[0]!r} for {architecture}",
            hint=f"variants are {[isa.name for isa in known]}",
        )
    return tuple(i for i in known if i is known[0] or (i.name in names if names else i.gains(formats)))

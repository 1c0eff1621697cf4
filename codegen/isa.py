"""The CPU instruction sets kernels are built for, as one table of differences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """One build variant; `level` is what `sv_isa_level()` must reach for it to be loaded."""

    name: str
    level: int
    march: str
    """The `-march` name in the spelling of gcc and clang; zig replaces dashes by underscores."""
    vector: int
    """Floats in one vector register."""
    accumulators: int
    """Vector registers a micro-kernel may use for its output tile."""
    gemm_rows: int
    """Rows of the largest micro-kernel tile."""
    flags: tuple[str, ...] = ()

    def defines(self) -> str:
        """The C macros the kernel templates read."""
        values = {"SV_VL": self.vector, "SV_ACC": self.accumulators, "SV_MR": self.gemm_rows}
        return "".join(f"#define {name} {value}\n" for name, value in values.items())


SCALAR = Isa("scalar", 0, "x86-64", vector=4, accumulators=12, gemm_rows=6)
AVX2 = Isa("avx2", 1, "x86-64-v3", vector=8, accumulators=12, gemm_rows=6)
AVX512 = Isa("avx512", 2, "x86-64-v4", vector=16, accumulators=24, gemm_rows=12, flags=("-mprefer-vector-width=512",))

ISAS = (SCALAR, AVX2, AVX512)

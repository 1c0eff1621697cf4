"""Write new rows into a key or value cache, which holds float32, bfloat16 or records of small numbers."""

from __future__ import annotations

from sylvester.codegen.attention import RECORDS
from sylvester.codegen.prelude import render
from sylvester.codegen.scalar import C_TYPES

_COPIES: dict[str, str] = {
    "f32": "memcpy(dst, src, (size_t)d * sizeof(float));",
    # The nearest bfloat16, ties to even; a NaN stays one.
    "bf16": """#pragma omp simd
        for (int64_t j = 0; j < d; j++) {
            uint32_t bits = (uint32_t)sv_bits(src[j]), nearest = bits + 0x7fff + (bits >> 16 & 1);
            dst[j] = (uint16_t)(src[j] != src[j] ? bits >> 16 | 0x40 : nearest >> 16);
        }""",
}


def kv_update(name: str = "sv_kv_update", cache: str = "f32") -> str:
    """C text of the kernel and of `<name>_past`, which reads the position from memory; they need no scratch.

    Before one that writes records (q8, q4) goes `attention.records_header`.
    """
    if cache in RECORDS:
        bits = RECORDS[cache]
        copy, width = f"sv_record_{bits}(dst, src, d);", f"sv_record_bytes_{bits}(d)"
        return render("kv_update.c.in", NAME=name, KV="uint8_t", COPY=copy, WIDTH=width)
    return render("kv_update.c.in", NAME=name, KV=C_TYPES[cache], COPY=_COPIES[cache], WIDTH="d")

"""softmax(q k^T scale + mask) v: tiled attention with grouped heads, causal limits, windows and masks."""

from __future__ import annotations

from typing import Literal

from sylvester.codegen.prelude import render

MaskKind = Literal["none", "float", "bool"]

_MASKS: dict[str, str] = {
    "none": "(void)batch, (void)head;",
    "float": """const int64_t *by = a->mask_stride;
    const float *mask = (const float *)a->mask + batch * by[0] + head * by[1] + i * by[2] + from * by[3];
    for (int64_t j = 0; j < n; j++) s[j] += mask[j * by[3]];""",
    "bool": """const int64_t *by = a->mask_stride;
    const uint8_t *mask = (const uint8_t *)a->mask + batch * by[0] + head * by[1] + i * by[2] + from * by[3];
    for (int64_t j = 0; j < n; j++) s[j] = mask[j * by[3]] ? s[j] : -INFINITY;""",
}


def attention_header() -> str:
    """Types and helpers shared by all instances; goes once before the first."""
    return render("attention.h.in")


def attention(name: str, head_dim: int, value_dim: int, mask: MaskKind = "none") -> str:
    """C text of one instance; `<name>_scratch` is the scratch it needs per thread."""
    return render("attention.c.in", NAME=name, D=head_dim, DV=value_dim, MASK=_MASKS[mask])

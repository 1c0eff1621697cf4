"""softmax(q k^T scale + mask) v: tiled attention with grouped heads, causal limits, windows and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sylvester.codegen.prelude import render
from sylvester.codegen.scalar import C_TYPES

MaskKind = Literal["none", "float", "bool"]

CACHE_TYPES = ("f32", "bf16")
"""Scalar types of keys and values; bf16 is widened as it is read."""
_MASKS: dict[str, str] = {
    "none": "(void)batch, (void)head;",
    "float": """const int64_t *by = a->mask_stride;
    const float *mask = (const float *)a->mask + batch * by[0] + head * by[1] + i * by[2] + from * by[3];
    for (int64_t j = 0; j < n; j++) s[j] += mask[j * by[3]] * SV_LOG2E;""",
    "bool": """const int64_t *by = a->mask_stride;
    const uint8_t *mask = (const uint8_t *)a->mask + batch * by[0] + head * by[1] + i * by[2] + from * by[3];
    for (int64_t j = 0; j < n; j++) s[j] = mask[j * by[3]] ? s[j] : -INFINITY;""",
}
SPLIT_ROWS = 512
"""Rows times parts of the keys that a lowering leaves room for."""


@dataclass(frozen=True)
class Tuning:
    """What a tuner may vary; the defaults are good for head sizes of 32 to 128."""

    blocks: int = 24
    """Row blocks in the largest tile."""
    keys: int = 256
    """Keys per step of the running maximum, a multiple of 32."""
    few: int = 8
    """Rows up to which keys and values are not packed; at most 8."""
    split: int = 256
    """Fewest keys of a part when threads share the keys of a tile."""

    def __post_init__(self) -> None:
        if self.keys % 32 or self.few > 8 or min(self.blocks, self.keys, self.split) < 1 or self.few < 0:
            raise ValueError(f"attention needs keys in multiples of 32 and at most 8 few rows, got {self}")


def attention_header(tuning: Tuning | None = None) -> str:
    """Types and helpers shared by all instances; goes once before the first, and after the format bf16 if any."""
    choice = tuning or Tuning()
    shared = render("attention.h.in", BLOCKS=choice.blocks, KEYS=choice.keys, FEW=choice.few, SPLIT=choice.split)
    return shared + render("attention_lanes.h.in") + render("attention_bf16.h.in")


def attention(
    name: str, head_dim: int, value_dim: int, mask: MaskKind = "none", cache: str = "f32", products: str = "f32"
) -> str:
    """C text of one instance over k and v of dtype `cache`; `<name>_scratch` is the scratch it needs per thread.

    With `products` "bf16" operands are rounded where the instruction set multiplies bfloat16 pairs and a tile has more
    rows than few; elsewhere products stay in float32.
    """
    values = {"NAME": name, "D": head_dim, "DV": value_dim, "KV": C_TYPES[cache], "MASK": _MASKS[mask]}
    values["MASKED"] = int(mask != "none")
    wide, short = (render(f"attention_{kind}.c.in", **values) for kind in ("f32", "bf16"))
    many = f"#if SV_BF16_DOT\n{short}#else\n{wide}#endif" if products == "bf16" else wide
    before = [render(f"attention_{part}.c.in", **values) for part in ("sizes", "few")]
    return "\n".join([*before, many, render("attention.c.in", **values)])


def part_floats(value_dim: int) -> int:
    """Floats of shared memory with which a call may split the keys among threads."""
    return SPLIT_ROWS * (value_dim + 2)

"""softmax(q k^T scale + mask) v: tiled attention with grouped heads, causal limits, windows and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sylvester.codegen.prelude import render
from sylvester.codegen.scalar import C_TYPES
from sylvester.compiler.attention_operands import LISTED

MaskKind = Literal["none", "float", "bool"]

CACHE_TYPES = ("f32", "bf16")
"""Scalar types of keys and values; bf16 is widened as it is read."""
RECORDS = {"q8": 8, "q4": 4}
"""Bits of the numbers of quantised caches."""
_MASKS: dict[str, str] = {
    "none": "(void)batch, (void)head;",
    "float": """const int64_t *by = a->mask_stride;
    const float *mask = (const float *)a->mask + batch * by[0] + head * by[1] + i * by[2] + from * by[3];
    for (int64_t j = 0; j < n; j++) s[j] += mask[j * by[3]] * SV_LOG2E;""",
    "bool": """const int64_t *by = a->mask_stride;
    const uint8_t *mask = (const uint8_t *)a->mask + batch * by[0] + head * by[1] + i * by[2] + from * by[3];
    for (int64_t j = 0; j < n; j++) s[j] = mask[j * by[3]] ? s[j] : -INFINITY;""",
}
STEADY_QUERIES = 16
"""Queries of a call over caches up to which each has the bits it would have alone."""
SHARED_PARTS = 4
"""Parts of the keys, shared and others, that a lowering leaves room for where rows of a batch share keys."""
SPLIT_ROWS = 2048
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
    """Types and helpers shared by all instances; goes once before the first, and after the formats bf16 and q8."""
    choice = tuning or Tuning()
    shared = render(
        "attention.h.in", BLOCKS=choice.blocks, KEYS=choice.keys, FEW=choice.few, SPLIT=choice.split,
        STEADY=STEADY_QUERIES, LISTED=LISTED,
    )  # fmt: skip
    return shared + "".join(render(f"attention_{part}.h.in") for part in ("lanes", "bf16", "int8"))


def attention(
    name: str, head_dim: int, value_dim: int, mask: MaskKind = "none", cache: str = "f32", products: str = "f32"
) -> str:
    """C text of one instance over k and v of dtype `cache`; `<name>_scratch` is the scratch it needs per thread.

    Over records (q8, q4) the strides of k and v count bytes; `records_header` goes before, and products are float32.
    With `products` "bf16" operands are rounded where the instruction set multiplies bfloat16 pairs and a tile has more
    rows than few, with "int8" where it multiplies bytes four at a time; elsewhere products stay in float32.
    """
    values: dict[str, object] = {"NAME": name, "D": head_dim, "DV": value_dim, "MASK": _MASKS[mask]}
    values |= {"MASKED": int(mask != "none"), "MORE": 0}

    def text(*parts: str, weights: str = "softmax") -> str:
        return "\n".join(render(f"attention{part}.c.in", **values, WEIGHTS=weights) for part in parts)

    if cache in RECORDS:
        if value_dim != head_dim or products != "f32":
            found = f"{head_dim} and {value_dim} features, {products} products"
            raise ValueError(f"attention over records takes keys and values alike and float32 products, got {found}")
        values["BITS"] = RECORDS[cache]
        values |= {"SIZE": 1, "KEY_ROW": f"{name}_bytes", "VALUE_ROW": f"{name}_bytes"}
        values |= {"KEYS": "u->values", "VALUES": f"keys + SV_ATT_KEYS * {name}_bytes"}
        return text("_sizes", "_records", "_records_few", "_f32", "_block", "_tree", "")
    values["KV"] = C_TYPES[cache]
    values |= {"SIZE": f"sizeof({values['KV']})", "KEY_ROW": head_dim, "VALUE_ROW": value_dim}
    values |= {"KEYS": "u->keys", "VALUES": "(char *)u->values"}
    many = text("_pack", "_f32", "_block")
    if products == "bf16":
        many = f"#if SV_BF16_DOT\n{text('_bf16', '_block')}#else\n{many}#endif"
    if products == "int8":
        values["MORE"] = f"SV_ATT_INT8_FLOATS({head_dim}, {name}_wide)"
        low = text("_int8_pack", "_int8", "_block", weights="weights")
        many = f"#if defined(SV_Q_DOT)\n{low}#else\n{many}#endif"
    return "\n".join([text("_sizes", "_few"), many, text("_tree", "")])


def records_header() -> str:
    """What writing and reading records takes; goes once before the first kernel that does."""
    return render("records.h.in")


def part_floats(value_dim: int) -> int:
    """Floats of shared memory with which a call may split the keys among threads."""
    return SPLIT_ROWS * (value_dim + 2)


def shared_floats(value_dim: int) -> int:
    """More of them for every head of a batch whose rows share keys."""
    return SHARED_PARTS * STEADY_QUERIES * (value_dim + 2)

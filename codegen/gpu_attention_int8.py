"""Attention of int8 queries and keys on GPUs: two launches that pack keys and values, and one over what they write.

Float8 weights and values need sm_89 or later; earlier GPUs take float16 ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from sylvester.codegen.gpu_architectures import SHARED, stages_in_shared
from sylvester.codegen.gpu_attention import (
    KEY_STRIDES,
    POINTERS,
    QUERY_STRIDES,
    SCALARS,
    Form,
    Tiles,
    block,
    launched,
    mask_bytes,
    mask_pointer,
    mask_strides,
)
from sylvester.codegen.gpu_kernel import Constant, Kernel

VALUES = {"fp8": ("*fp8e4nv", 448.0), "f16": ("*fp16", 1.0)}
"""Packed values: their type, and the largest that they are scaled to."""
PARTS, PACKED_ROWS, ROOM = 16, 64, 128
"""Programs that summarise the keys of a head, rows that one packs, and what packed keys are a multiple of."""
PACKING = Tiles(0, PACKED_ROWS, 4, 2)


@dataclass(frozen=True)
class Sizes:
    """Elements of the memory between the launches, in the order of their arguments."""

    parts: int
    keys8: int
    key_scales: int
    values8: int
    channels: int


def summary(form: Form) -> Kernel:
    """Means and largest sizes of keys and values, in parts; over `(PARTS, batch * kv_heads)` programs."""
    arguments = {"parts": "*fp32", **_given(form), **dict.fromkeys(KEY_STRIDES, "i32")}
    return launched("attention_int8", "summaries", arguments, _packing(form), PACKING, ("parts", "k", "v"))


def packing(form: Form, values: str) -> Kernel:
    """Keys and values as they are multiplied; over `packing_grid` programs. `values` are "fp8" or "f16"."""
    pointer, largest = VALUES[values]
    arguments = {
        "keys8": "*i8", "key_scales": "*fp32", "values8": pointer, "channels": "*fp32", "parts": "*fp32",
        **_given(form), "room": "i32", **dict.fromkeys(KEY_STRIDES, "i32"),
    }  # fmt: skip
    aligned = ("keys8", "key_scales", "values8", "channels", "parts", "k", "v", "room")
    return launched("attention_int8", "pack", arguments, {**_packing(form), "LARGEST": largest}, PACKING, aligned)


def _given(form: Form) -> dict[str, str | None]:
    pointers = {"k": POINTERS[form.k], "v": POINTERS[form.v], "past": "*i64" if form.past else None}
    return {**pointers, **dict.fromkeys(("kv_heads", "rows", "keys"), "i32")}


def _packing(form: Form) -> dict[str, Constant]:
    return {
        "D": form.d, "DV": form.dv, "BLOCK_D": block(form.d), "BLOCK_DV": block(form.dv), "N": PACKED_ROWS,
        "PARTS": PARTS, "PAST": form.past,
    }  # fmt: skip


def kernel(form: Form, values: str, tiles: Tiles, aligned: tuple[str, ...] = ()) -> Kernel:
    """y from q and what `packing` wrote; the form's products are not read. `aligned` as for attention of floats."""
    if form.tree or form.shared or form.listed:
        raise ValueError("int8 attention takes no tree of queries, shared keys or listed blocks: use one of floats")
    arguments = {
        "y": POINTERS[form.y], "q": POINTERS[form.q], "keys8": "*i8", "key_scales": "*fp32",
        "values8": VALUES[values][0], "channels": "*fp32", "mask": mask_pointer(form),
        "past": "*i64" if form.past else None, **dict.fromkeys(("kv_heads", "rows", "keys", "room", "offset"), "i32"),
        **dict.fromkeys(("y_batch", "y_head", "y_row", *QUERY_STRIDES), "i32"), **mask_strides(form), **SCALARS,
    }  # fmt: skip
    fixed: dict[str, Constant] = {
        "D": form.d, "DV": form.dv, "BLOCK_D": block(form.d), "BLOCK_DV": block(form.dv), "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys, "GROUP": form.group, "CAUSAL": form.causal, "WINDOWED": form.windowed,
        "CAPPED": form.capped, "MASK": form.mask, "PAST": form.past,
    }  # fmt: skip
    aligned = ("keys8", "key_scales", "values8", "channels", "room", *aligned)
    return launched("attention_int8", "attention_int8", arguments, fixed, tiles, aligned)


def room(keys: int) -> int:
    """Packed rows of so many keys."""
    return -(-keys // ROOM) * ROOM


def sizes(form: Form, batch: int, kv_heads: int, keys: int) -> Sizes:
    groups, d, dv = batch * kv_heads, block(form.d), block(form.dv)
    rows = groups * room(keys)
    return Sizes(groups * PARTS * (d + 3 * dv), rows * d, rows, rows * dv, groups * (d + 2 * dv))


def packing_grid(batch: int, kv_heads: int, keys: int) -> tuple[int, int]:
    return room(keys) // PACKED_ROWS, batch * kv_heads


def space(form: Form, values: str, arch: str) -> list[Tiles]:
    """Tiles that fit in the shared memory of an architecture; the first is the default."""
    found = [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (64, 128, 8, 3), (64, 32, 4, 3), (32, 32, 4, 1)]
    if max(form.d, form.dv) <= 64:
        found = [(128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 32, 4, 2)]
    return [tiles for size in found if _shared_bytes(form, values, tiles := Tiles(*size), arch) <= SHARED[arch]]


def _shared_bytes(form: Form, values: str, tiles: Tiles, arch: str) -> int:
    stage = tiles.keys * (block(form.d) + block(form.dv) * (1 if values == "fp8" else 2))
    return tiles.rows * block(form.d) + stage * stages_in_shared(tiles.stages, arch) * 5 // 4 + mask_bytes(form, tiles)

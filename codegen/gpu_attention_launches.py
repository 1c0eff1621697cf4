"""The launches of one attention on a GPU: for few queries in parts of the keys, for many in tiles of floats or int8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sylvester.codegen import gpu_attention, gpu_attention_int8
from sylvester.codegen.gpu_architectures import has_float8, smallest
from sylvester.codegen.gpu_attention import Form, Tiles
from sylvester.codegen.gpu_attention_int8 import PACKED_ROWS, PARTS, ROOM
from sylvester.codegen.gpu_lowering import NO_LIMIT, Candidate, Given, GpuLowering, When, over
from sylvester.codegen.gpu_matmul_space import PROCESSORS
from sylvester.codegen.index import Index, index
from sylvester.codegen.lazy import Pointer

FEW = 16
"""Rows of a tile for few queries: queries times the heads that share a key."""
MANY_KEYS = 1024
"""From so many on, few queries read them in parts: joining these is a launch more."""
STEADY = 16
"""Queries that one kernel reads where each must have the bits that it has alone."""


@dataclass(frozen=True)
class Call:
    """An attention and the arguments of its kernels; `heads` are key heads, or all where blocks of keys are listed."""

    form: Form
    given: Mapping[str, Given]
    y: str
    batch: Index
    heads: Index
    rows: Index
    keys: Index
    int8: bool = False
    apart: bool = False
    """Whether up to `STEADY` queries are computed apart."""

    @property
    def groups(self) -> Index:
        """Key heads of the batch."""
        return self.batch * self.heads


def launch(lowering: GpuLowering, call: Call) -> None:
    few = max(_few(call.form), STEADY if lowering.steady else 0)
    for when, queries in _ranges(call, few):
        if call.apart and queries <= STEADY:
            _apart(lowering, call, when)
            continue
        reason = _why_floats(call, queries, few) if call.int8 else ""
        if reason:
            lowering.notes[f"attention_int8 multiplies bfloat16 on GPUs {reason}"] = None
        if call.int8 and not reason:
            _int8(lowering, call, when)
        else:
            _floats(lowering, call, when, queries)


def _apart(lowering: GpuLowering, call: Call, when: When | None) -> None:
    """A program for every query: tokens have the bits of single ones, in a tree or not."""
    form = replace(call.form, tree=False, apart=STEADY)
    if call.int8:
        lowering.notes["attention_int8 multiplies bfloat16 on GPUs where trees of drafts are verified"] = None

    def candidate(tiles: Tiles) -> Candidate:
        return Candidate(gpu_attention.kernel(form, tiles), (call.rows * call.groups, index(1)))

    options = gpu_attention.space(form, 1, smallest(lowering.archs))
    lowering.tuned(options, candidate, call.given, (call.y,), when)


def _why_floats(call: Call, queries: int, few: int) -> str:
    """Why whole numbers are not multiplied, or nothing."""
    if call.form.tree or call.form.shared or call.form.listed:
        return "over trees of queries, shared keys and listed blocks, which its kernels do not take"
    if queries <= few:
        return f"for up to {queries} queries: packing the keys would read them more often"
    return ""


def _ranges(call: Call, few: int) -> Iterator[tuple[When | None, int]]:
    """Numbers of queries with kernels of their own, and how many these are cut up for."""
    if call.rows.constant is not None:
        yield None, call.rows.constant
        return
    if not call.form.listed:
        yield (call.rows, 1, few), few
    yield (call.rows, 1 if call.form.listed else few + 1, NO_LIMIT), gpu_attention.FEW_ROWS + 1


def _few(form: Form) -> int:
    return max(1, FEW // form.rows_together)


def _floats(lowering: GpuLowering, call: Call, when: When | None, queries: int) -> None:
    splits = 1 if lowering.steady else _splits(call, queries)
    given, written = dict(call.given), [call.y]
    if splits > 1:
        parts, tops = (
            lowering.buffer("arena", (call.groups, index(queries * call.form.group * splits * n)), "f32")
            for n in (call.form.dv, 2)
        )
        places = {"part": Pointer(parts.name, index(0)), "tops": Pointer(tops.name, index(0))}
        given, written = {**given, **places, "y": places["part"]}, [parts.name, tops.name]

    def candidate(tiles: Tiles) -> Candidate:
        programs = over(call.rows * call.form.rows_together, tiles.rows) * call.groups
        return Candidate(gpu_attention.kernel(call.form, tiles, splits), (programs, index(splits)))

    options = gpu_attention.space(call.form, queries, smallest(lowering.archs))
    lowering.tuned(options, candidate, given, tuple(written), when)
    if splits > 1:
        grid = (call.groups * call.rows * call.form.group,)
        joined = {**given, "y": call.given["y"]}
        lowering.launch(gpu_attention.joining(call.form, splits), grid, joined, (call.y,), when)


def _splits(call: Call, queries: int) -> int:
    """Parts of the keys, of which a cache has room for many."""
    keys = call.keys.constant or 0
    if call.form.listed or keys < MANY_KEYS:
        return 1
    return gpu_attention.splits_for(
        call.form, call.batch.constant or 1, call.heads.constant or 1, queries, keys, PROCESSORS
    )


def _int8(lowering: GpuLowering, call: Call, when: When | None) -> None:
    """Keys and values are packed, then attended over (SageAttention2)."""
    form, groups = call.form, call.groups
    values: Literal["fp8", "f16"] = "fp8" if all(map(has_float8, lowering.archs)) else "f16"
    room, d, dv = over(call.keys, ROOM) * ROOM, gpu_attention.block(form.d), gpu_attention.block(form.dv)
    sizes = {
        "parts": (PARTS * index(d + 3 * dv), "f32"), "keys8": (room * d, "i8"), "key_scales": (room, "f32"),
        "values8": (room * dv, values), "channels": (index(d + 2 * dv), "f32"),
    }  # fmt: skip
    buffers = {name: lowering.buffer("arena", (groups, size), dtype).name for name, (size, dtype) in sizes.items()}
    places = {name: Pointer(buffers[name], index(0), dtype) for name, (_, dtype) in sizes.items()}
    given = {**call.given, **places, "room": room}
    parts, packed = buffers["parts"], tuple(buffer for name, buffer in buffers.items() if name != "parts")
    lowering.launch(gpu_attention_int8.summary(form), (index(PARTS), groups), given, (parts,), when)
    lowering.launch(gpu_attention_int8.packing(form, values), (room // PACKED_ROWS, groups), given, packed, when)

    def candidate(tiles: Tiles) -> Candidate:
        made = gpu_attention_int8.kernel(form, values, tiles)
        return Candidate(made, (over(call.rows * form.group, tiles.rows) * groups,))

    options = gpu_attention_int8.space(form, values, smallest(lowering.archs))
    lowering.tuned(options, candidate, given, (call.y,), when)

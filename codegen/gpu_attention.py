"""Attention on GPUs: kernels, how many programs run, and what can be tuned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sylvester.codegen.gpu_architectures import SHARED, stages_in_shared
from sylvester.codegen.gpu_kernel import Constant, Kernel, text
from sylvester.compiler.attention_operands import LISTED

MaskKind = Literal["none", "bool", "float"]
Products = Literal["f32", "bf16", "f16"]
POINTERS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "q8": "*u8", "q4": "*u8"}
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "q8": 2, "q4": 3}
"""Of a number in shared memory, about; records are widened there."""
QUERY_STRIDES = ("q_batch", "q_head", "q_row")
KEY_STRIDES = ("k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row")
SCALARS = {"scale": "fp32", "softcap": "fp32", "window": "i32"}
FEW = {
    64: [(64, 4, 3), (128, 8, 3), (128, 4, 2), (32, 4, 3), (64, 2, 3), (32, 2, 2)],
    128: [(64, 8, 3), (32, 4, 3), (64, 4, 3), (64, 8, 2), (128, 8, 2), (32, 4, 2), (16, 4, 2)],
    256: [(32, 8, 2), (32, 8, 3), (32, 4, 2), (64, 8, 2), (16, 4, 2)],
}
"""For few rows, by the width of heads: keys of a tile, warps and stages. Those with few spilled registers are first."""
MANY = {
    64: [(128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 3)],
    128: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 32, 4, 2)],
    256: [(64, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)],
}
EXACT = {
    64: [(128, 32, 8, 2), (64, 32, 4, 2)],
    128: [(32, 32, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)],
    256: [(32, 32, 8, 2), (16, 32, 4, 2), (32, 16, 4, 2)],
}
"""For many rows, of products of 16 bits and of float32, rows as well."""
LISTS = [(64, LISTED, 4, 3), (64, LISTED, 8, 2), (64, LISTED, 4, 2), (32, LISTED, 4, 2), (16, LISTED, 4, 1)]
"""Where blocks of keys are listed."""
LAST = [(32, 32, 4, 1), (16, 16, 4, 1)]
FEW_ROWS = 64
"""Queries times the heads that share a key, up to which the keys are split among programs."""
MOST_SPLITS, KEYS_OF_A_SPLIT = 64, 128


@dataclass(frozen=True)
class Form:
    """What is fixed when an attention is compiled; the head sizes are any, `group` heads share a key head.

    `tree`: the queries are a tree of tokens, of which `ancestry` finds the ancestors. `shared`: some keys are common to
    the batch. `apart`: up to so many queries are computed each by itself, over the text that ends in it, of a tree or
    not; 0 is not. `listed`: blocks of 64 queries see listed blocks of 64 keys; `kv_heads` are then all heads.

    `k` and `v` are float types or records "q8", "q4" (compiler/cache_ops.py). `products` are what tensor cores
    multiply: "f32" as three products of tf32, which is about as exact as float32.
    """

    d: int
    dv: int
    group: int = 1
    y: str = "f32"
    q: str = "f32"
    k: str = "f32"
    v: str = "f32"
    mask: MaskKind = "none"
    mask_type: str = "f32"
    causal: bool = True
    windowed: bool = False
    capped: bool = False
    past: bool = False
    tree: bool = False
    apart: int = 0
    shared: bool = False
    listed: bool = False
    products: Products = "f32"

    @property
    def rows_together(self) -> int:
        """Rows of a query that are neighbours in a tile."""
        return 1 if self.listed else self.group


@dataclass(frozen=True)
class Tiles:
    """Rows of queries and keys of a tile, and how Triton schedules it."""

    rows: int
    keys: int
    warps: int
    stages: int


def kernel(form: Form, tiles: Tiles, splits: int = 1, aligned: tuple[str, ...] = ()) -> Kernel:
    """y of one launch, or with `splits` > 1 (a power of two) the parts that `joining` takes.

    `aligned`: the arguments, strides too, that are multiples of 16.
    """
    _require(form, tiles, splits)
    split = splits > 1
    arguments = {
        "y": "*fp32" if split else POINTERS[form.y], "tops": "*fp32" if split else None, "q": POINTERS[form.q],
        "k": POINTERS[form.k], "v": POINTERS[form.v], "mask": mask_pointer(form), "past": "*i64" if form.past else None,
        "tree": "*u8" if form.tree else None, "depths": "*i64" if form.tree or form.apart else None,
        "shared": "*i64" if form.shared else None, "lists": "*i64" if form.listed else None,
        **dict.fromkeys(("kv_heads", "rows", "keys", "offset"), "i32"),
        **dict.fromkeys(("y_batch", "y_head", "y_row"), None if split else "i32"),
        **dict.fromkeys((*QUERY_STRIDES, *KEY_STRIDES), "i32"), **mask_strides(form),
        **dict.fromkeys(("list_batch", "list_head", "most"), "i32" if form.listed else None), **SCALARS,
    }  # fmt: skip
    return launched("attention", "attention", arguments, _constants(form, tiles, splits), tiles, aligned)


def _require(form: Form, tiles: Tiles, splits: int) -> None:
    if (form.k in ("q8", "q4") or form.v in ("q8", "q4")) and form.k != form.v:
        raise ValueError(f"keys are {form.k} and values {form.v}, expected records of one kind")
    if form.tree and (form.mask != "none" or not form.past):
        raise ValueError("a tree of queries needs `past` and takes no mask")
    bare = form.mask == "none" and not form.tree and not form.listed and splits == 1
    if form.apart and not (bare and form.past and form.causal):
        raise ValueError("queries that are computed apart need `past`, are causal, and take no mask, lists or splits")
    if form.listed and (form.past or splits > 1 or tiles.keys != LISTED or LISTED % tiles.rows):
        raise ValueError(f"listed blocks need no `past`, no splits and tiles of {LISTED} keys, got {tiles}, {splits}")


def launched(
    module: str,
    function: str,
    arguments: Mapping[str, str | None],
    constants: Mapping[str, Constant],
    tiles: Tiles,
    aligned: tuple[str, ...],
) -> Kernel:
    """A kernel whose arguments without a type are absent: constants that it does not read."""
    types = {name: given for name, given in arguments.items() if given is not None}
    absent = {name: 0 for name, given in arguments.items() if given is None}
    kept = tuple(name for name in aligned if name in types)
    return Kernel(text(module), function, types, {**constants, **absent}, kept, tiles.warps, tiles.stages)


def mask_pointer(form: Form) -> str | None:
    return None if form.mask == "none" else "*u8" if form.mask == "bool" else POINTERS[form.mask_type]


def mask_strides(form: Form) -> dict[str, str | None]:
    names = ("mask_batch", "mask_head", "mask_row", "mask_key")
    return dict.fromkeys(names, None if form.mask == "none" else "i32")


def _constants(form: Form, tiles: Tiles, splits: int) -> dict[str, Constant]:
    return {
        "D": form.d, "DV": form.dv, "BLOCK_D": block(form.d), "BLOCK_DV": block(form.dv), "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys, "GROUP": form.rows_together, "SPLITS": splits, "CAUSAL": form.causal,
        "WINDOWED": form.windowed, "CAPPED": form.capped, "MASK": form.mask, "PAST": form.past,
        "PRODUCTS": form.products, "STORED": form.k if form.k in ("q8", "q4") else "plain",
        "PRECISION": "tf32x3" if form.products == "f32" else "tf32", "TREE": form.tree,
        "SHARED": form.shared, "LISTED": form.group if form.listed else 0, "APART": form.apart,
    }  # fmt: skip


def ancestry(tokens: int) -> Kernel:
    """The ancestors of tokens, bytes [rows, rows], from their depths; a program for so many, or a few more."""
    types = {"tree": "*u8", "depths": "*i64", "rows": "i32"}
    return Kernel(text("attention"), "ancestors", types, {"BLOCK": block(tokens)}, warps=1)


def joining(form: Form, splits: int) -> Kernel:
    """The rows of y [batch, heads, queries, dv] from the parts of `kernel`."""
    names = ("kv_heads", "rows", "y_batch", "y_head", "y_row")
    types = {"y": POINTERS[form.y], "part": "*fp32", "tops": "*fp32", **dict.fromkeys(names, "i32")}
    fixed: dict[str, Constant] = {"DV": form.dv, "BLOCK_DV": block(form.dv), "GROUP": form.group, "SPLITS": splits}
    return Kernel(text("attention"), "joined", types, fixed, ("part", "tops"), warps=4)


def grid(form: Form, tiles: Tiles, splits: int, batch: int, kv_heads: int, rows: int) -> tuple[int, int]:
    blocks = rows if form.apart else -(-rows * form.rows_together // tiles.rows)
    return blocks * batch * kv_heads, splits


def joining_grid(form: Form, batch: int, kv_heads: int, rows: int) -> tuple[int]:
    return (batch * kv_heads * rows * form.group,)


def part_sizes(form: Form, splits: int, batch: int, kv_heads: int, rows: int) -> tuple[int, int]:
    """Floats of the parts, and of their tops, between the two launches of `splits` > 1."""
    places = batch * kv_heads * rows * form.group * splits
    return places * form.dv, places * 2


def block(n: int) -> int:
    """The power of two, 16 or more, that holds n."""
    return max(16, 1 << (n - 1).bit_length())


def splits_for(form: Form, batch: int, kv_heads: int, rows: int, keys: int, processors: int) -> int:
    """Parts of at most `keys` keys that keep all multiprocessors busy: 1 for many rows."""
    packed = rows * form.group
    if packed > FEW_ROWS:
        return 1
    programs, splits = batch * kv_heads, 1
    while splits < MOST_SPLITS and programs * splits < 2 * processors and keys >= 2 * splits * KEYS_OF_A_SPLIT:
        splits *= 2
    return splits


def space(form: Form, rows: int, arch: str) -> list[Tiles]:
    """Tiles for `rows` queries that fit in the shared memory of an architecture; the first is the default."""
    return [tiles for tiles in _candidates(form, rows) if _shared_bytes(form, tiles, arch) <= SHARED[arch]]


def _candidates(form: Form, rows: int) -> Iterator[Tiles]:
    packed, width = rows * form.rows_together, min(256, max(64, block(max(form.d, form.dv))))
    if form.listed:
        yield from (Tiles(*size) for size in LISTS)
        return
    if packed <= FEW_ROWS:
        yield from (Tiles(block(packed), *size) for size in FEW[width])
    else:
        yield from (Tiles(*size) for size in (EXACT if form.products == "f32" else MANY)[width])
    yield from (Tiles(*size) for size in LAST)


def _shared_bytes(form: Form, tiles: Tiles, arch: str) -> int:
    """About what a program keeps in shared memory: queries, keys and values of the stages under way, and a mask."""
    three = form.products == "f32"
    queries = tiles.rows * block(form.d) * BYTES[form.products]
    keys = tiles.keys * (block(form.d) + block(form.dv)) * BYTES[form.k]
    held = keys * stages_in_shared(tiles.stages, arch)
    return queries * (2 if three else 1) + held + (keys // 2 if three else 0) + mask_bytes(form, tiles)


def mask_bytes(form: Form, tiles: Tiles) -> int:
    """Shared memory through which the mask of a tile comes to the threads that need it."""
    return 0 if form.mask == "none" else tiles.rows * tiles.keys * 4

"""Attention over tensors, caches and records: calls of the kernel family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sylvester.codegen import attention as attention_family
from sylvester.codegen.costs import attention_costs
from sylvester.codegen.families import unit_last
from sylvester.codegen.index import Index, index, product
from sylvester.codegen.layout import FormatName
from sylvester.codegen.lazy import Arithmetic, Buffer, Extern, Lazy, Pointer, Shape, Strided, as_strided, of_buffer
from sylvester.codegen.lowering import Fact, Lower, Lowering, lowers
from sylvester.codegen.prelude import render
from sylvester.compiler.attention_operands import LISTED
from sylvester.compiler.errors import Unsupported

aten, dialect = torch.ops.aten, torch.ops.sylvester
NAMED: dict[Arithmetic, str] = {"f32": "", "bf16": "_short", "int8": "_bytes"}
"""Part of the name of a kernel by the arithmetic of its products."""
FORMATS: dict[Arithmetic, tuple[FormatName, ...]] = {"f32": (), "bf16": ("bf16",), "int8": ("q8",)}
"""Weight formats that bring the instruction sets, and the C text, of these products."""


@lowers(dialect.attention.default, bf16=True)
def attention(
    lowering: Lowering,
    fact: Fact,
    q: Lazy,
    k: Lazy,
    v: Lazy,
    mask: Lazy | None,
    past: Lazy | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float = 0.0,
    *,
    depths: Lazy | None = None,
    shared: Lazy | None = None,
    blocks: Lazy | None = None,
    products: Arithmetic = "f32",
    records: str = "",
) -> Lazy:
    kind: attention_family.MaskKind = "none" if mask is None else "bool" if mask.dtype == "b8" else "float"
    head_dim, value_dim = q.shape[-1].constant, fact.shape[-1].constant
    if head_dim is None or value_dim is None:
        raise Unsupported("attention with a symbolic head size has no lowering", hint="make the feature size static")
    if k.dtype != v.dtype or k.dtype not in (("u8",) if records else attention_family.CACHE_TYPES):
        raise Unsupported(f"attention over keys of dtype {k.dtype} and values of dtype {v.dtype} has no lowering")
    name = f"sv_attention{NAMED[products]}_{head_dim}_{value_dim}_{kind}"
    stored = records or k.dtype
    name += "" if stored == "f32" else f"_{stored}"
    name += "" if blocks is None else "_listed"
    q, k, v = repeated(q, *fact.shape[:2]), *(repeated(x, fact.shape[0]) for x in (k, v))
    if k.shape[1] != v.shape[1]:
        k, v = (repeated(x, *fact.shape[:2]) for x in (k, v))
    views = [unit_last(lowering, x) for x in (q, k, v)]
    covering = None if mask is None else mask_view(lowering, mask, (*q.shape[:3], k.shape[2]))
    position = None if past is None else lowering.contiguous(past)
    extra = listed(lowering, fact, blocks) if blocks else (_number(lowering, shared), _number(lowering, depths))
    y, place = token_major(lowering, fact)
    flops, traffic = attention_costs(q, k, v, past=past is not None, causal=causal)
    outer = [s for view in ((place, *views)) for s in view.strides[:3]]
    strides = [*outer, *(covering.strides if covering else [index(0)] * 4)]
    family = attention_family.attention(name, head_dim, value_dim, mask=kind, cache=stored, products=products)
    part = None if blocks else _part(lowering, fact.shape, value_dim, shared is not None)
    lowering.extern(
        Extern(
            f"{name}_call",
            family + render(f"attention_{'blocks' if blocks else 'call'}.c.in", NAME=name),
            (
                Pointer(y.name, index(0)),
                *(Pointer(w.buffer, w.offset, d) for w, d in zip(views, ("f32", k.dtype, v.dtype), strict=True)),
                None if covering is None else Pointer(covering.buffer, covering.offset, "void"),
                None if position is None else Pointer(position.name, index(0), "i64"),
                None if part is None else Pointer(part.name, index(0)),
                index(0) if part is None else part.shape[0],
                q.shape[0],
                q.shape[1],
                k.shape[1],
                q.shape[2],
                k.shape[2],
                *strides,
                f"{float(scale)!r}f",
                index(int(causal)),
                index(window),
                f"{float(softcap)!r}f",
                *extra,
            ),
            writes=(y.name, *([part.name] if part else [])),
            reads=tuple(w.buffer for w in (*views, *([covering] if covering else [])))
            + ((position.name,) if position else ())
            + tuple(x.buffer for x in extra if isinstance(x, Pointer)),
            work=product(q.shape[:3]) * k.shape[2] * head_dim * 2,
            scratch=(f"{name}_scratch", ()),
            flops=flops,
            bytes=traffic,
            arithmetic=products,
            formats=FORMATS[products],
            problem=(
                "attention",
                f"{stored}/{'causal' if causal else 'full'}",
                (q.shape[2], k.shape[2], q.shape[0] * q.shape[1], q.shape[0] * k.shape[1], index(head_dim)),
            ),
        )
    )
    dim = fact.shape[3]
    return Lazy(fact.shape, fact.dtype, lambda i: of_buffer(y).load([i[0], i[2], i[1] * dim + i[3]]))


@lowers(dialect.attention_bf16.default, bf16=True)
def attention_bf16(lowering: Lowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    """Products of bfloat16 pairs where the instruction set has them; tuned as the float32 one, which has its tiles."""
    return attention(lowering, fact, *operands, products="bf16", **optional)


@lowers(dialect.attention_int8.default, bf16=True)
def attention_int8(lowering: Lowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    """Products of bytes where the instruction set multiplies four at a time; tuned as the float32 one."""
    return attention(lowering, fact, *operands, products="int8", **optional)


@lowers(dialect.attention_q.default)
def attention_q(lowering: Lowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    *given, bits = operands
    return attention(lowering, fact, *given, records=f"q{bits}", **optional)


def _number(lowering: Lowering, given: Lazy | None) -> Pointer | None:
    """How many keys all rows of the batch share, or how deep each query is."""
    return None if given is None else Pointer(lowering.contiguous(given).name, index(0), "i64")


def listed(lowering: Lowering, fact: Fact, blocks: Lazy) -> tuple[Pointer | Index, ...]:
    """Lists of blocks of keys, how long they are, and their strides over batch, head and block of queries."""
    if blocks.dtype != "i64":
        raise Unsupported(f"attention over blocks listed as {blocks.dtype} has no lowering", hint="give int64")
    count = (fact.shape[2] + LISTED - 1) // LISTED
    lists = mask_view(lowering, blocks, (*fact.shape[:2], count, blocks.shape[-1]))
    if lists.strides[3] != index(1):
        stored = lowering.realize(Lazy(blocks.shape, blocks.dtype, blocks.at))
        lists = mask_view(lowering, stored, (*fact.shape[:2], count, blocks.shape[-1]))
    return Pointer(lists.buffer, lists.offset, "i64"), blocks.shape[-1], *lists.strides[:3]


def _part(lowering: Lowering, shape: Shape, value_dim: int, shared: bool) -> Buffer | None:
    """Memory for the results of parts of the keys, unless there are too many rows to split them."""
    rows = product(shape[:3]).constant
    if rows is not None and 2 * rows > attention_family.SPLIT_ROWS and not shared:
        return None
    floats = index(attention_family.part_floats(value_dim))
    if shared:
        floats = floats + shape[0] * shape[1] * attention_family.shared_floats(value_dim)
    return lowering.buffer("arena", (floats,), "f32")


@lowers(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(
    lowering: Lowering,
    fact: Fact,
    q: Lazy,
    k: Lazy,
    v: Lazy,
    mask: Lazy | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    compute: Lower = attention,
) -> Lazy:
    """Attention that no pass has raised, over q [..., queries, d] with any number of leading axes."""
    width = q.shape[-1].constant
    if width is None or dropout or len(fact.shape) > 4:
        raise Unsupported(
            f"attention over {len(fact.shape)} axes, head size {width}, dropout {dropout} has no lowering"
        )
    q, k, v = (x if len(x.shape) == 4 else _as_four(x) for x in (q, k, v))
    wide = Fact(_four(fact.shape), fact.dtype)
    if mask is not None and len(fact.shape) < 4 and len(mask.shape) > 2:
        mask = _as_four(mask)
    y: Lazy = compute(lowering, wide, q, k, v, mask, None, width**-0.5 if scale is None else scale, causal, 0)
    if len(fact.shape) == 4:
        return y
    return Lazy(fact.shape, fact.dtype, lambda i: y.load(_pad_indices(i)))


def _four(shape: Shape) -> Shape:
    """[tokens, d] or [batch, tokens, d] with the missing axes as 1."""
    return (*shape[:-2], *[index(1)] * (4 - len(shape)), *shape[-2:])


def _pad_indices(i: Sequence[Index]) -> list[Index]:
    return [*i[:-2], *[index(0)] * (4 - len(i)), *i[-2:]]


def _as_four(x: Lazy) -> Lazy:
    lead = len(x.shape) - 2
    return Lazy(_four(x.shape), x.dtype, lambda i: x.load([*i[:lead], *i[-2:]]))


def token_major(lowering: Lowering, fact: Fact) -> tuple[Buffer, Strided]:
    """The result is stored [batch, token, head, feature], which is how the output projection reads it."""
    batch, heads, tokens, dim = fact.shape
    y = lowering.buffer("arena", (batch, tokens, heads * dim), fact.dtype)
    return y, Strided(y.name, index(0), (tokens * heads * dim, dim, heads * dim, index(1)))


def repeated(x: Lazy, *leading: Index) -> Lazy:
    """x with its first axes broadcast."""
    return Lazy((*leading, *x.shape[len(leading) :]), x.dtype, x.at)


def mask_view(lowering: Lowering, mask: Lazy, shape: Shape) -> Strided:
    """The mask broadcast to [batch, heads, queries, keys] through zero strides."""
    view = as_strided(Lazy(shape, mask.dtype, mask.at))
    if view is None:
        stored = lowering.realize(mask)
        view = as_strided(Lazy(shape, mask.dtype, stored.at))
    assert view is not None
    return view

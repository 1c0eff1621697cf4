"""Attention and the caches as launches on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sylvester.codegen import dialect as loops
from sylvester.codegen import gpu_attention, gpu_caches
from sylvester.codegen.attention import STEADY_QUERIES
from sylvester.codegen.attention_calls import listed, mask_view, repeated, scaled_dot_product_attention, token_major
from sylvester.codegen.dialect import writable
from sylvester.codegen.families import unit_last
from sylvester.codegen.gpu_attention import Form, Products
from sylvester.codegen.gpu_attention_launches import Call, launch
from sylvester.codegen.gpu_lowering import NO_LIMIT, Given, GpuLowering, gpu_lowers, over
from sylvester.codegen.index import Index, index
from sylvester.codegen.lazy import Buffer, Lazy, Pointer, Shape, Strided, of_buffer
from sylvester.codegen.lowering import Fact
from sylvester.compiler.errors import Unsupported

aten, dialect = torch.ops.aten, torch.ops.sylvester


@gpu_lowers(dialect.attention.default)
def attention(
    lowering: GpuLowering, fact: Fact, q: Lazy, k: Lazy, v: Lazy, mask: Lazy | None, past: Lazy | None, scale: float,
    causal: bool, window: int, softcap: float = 0.0, *, depths: Lazy | None = None, shared: Lazy | None = None,
    blocks: Lazy | None = None, products: Products = "f32", records: str = "", int8: bool = False,
) -> Lazy:  # fmt: skip
    batch, heads = fact.shape[:2]
    q, k, v = repeated(q, batch, heads), repeated(k, batch), repeated(v, batch)
    if k.shape[1] != v.shape[1]:
        k, v = repeated(k, batch, heads), repeated(v, batch, heads)
    form = _form(fact, q, k, mask, causal, window, softcap, past, products, records)
    form = replace(form, tree=depths is not None, shared=shared is not None, listed=blocks is not None)
    y, place = token_major(lowering, fact)
    given: dict[str, Given] = {
        "y": Pointer(y.name, index(0)), "kv_heads": k.shape[1] if blocks is None else heads, "rows": q.shape[2],
        "keys": k.shape[2], "offset": index(0), "scale": float(scale), "softcap": float(softcap),
        "window": index(window), **_strides("y", place),
    }  # fmt: skip
    for name, x in zip("qkv", (q, k, v), strict=True):
        view = unit_last(lowering, x)
        given |= {name: Pointer(view.buffer, view.offset, x.dtype), **_strides(name, view)}
    given |= {name: _number(lowering, x) for name, x in (("past", past), ("shared", shared)) if x is not None}
    given |= {} if mask is None else _mask(lowering, mask, (*q.shape[:3], k.shape[2]))
    apart = lowering.trees and form.past and form.causal and form.mask == "none" and not form.listed
    given |= {} if depths is None else _tree(lowering, depths, form, q.shape[2], apart)
    given |= {"depths": _in_line(lowering)} if apart and depths is None else {}
    given |= {} if blocks is None else _lists(lowering, fact, blocks)
    key_heads = k.shape[1] if blocks is None else heads
    launch(lowering, Call(form, given, y.name, batch, key_heads, q.shape[2], k.shape[2], int8, apart))
    dim = fact.shape[3]
    return Lazy(fact.shape, fact.dtype, lambda i: of_buffer(y).load([i[0], i[2], i[1] * dim + i[3]]))


def _number(lowering: GpuLowering, x: Lazy) -> Pointer:
    return Pointer(lowering.kept(x).name, index(0), "i64")


def _mask(lowering: GpuLowering, mask: Lazy, shape: Shape) -> dict[str, Given]:
    view = mask_view(lowering, mask, shape)
    place: dict[str, Given] = {"mask": Pointer(view.buffer, view.offset, mask.dtype), "mask_key": view.strides[3]}
    return {**place, **_strides("mask", view)}


def _in_line(lowering: GpuLowering) -> Pointer:
    """The depths of tokens that follow each other."""
    return Pointer(lowering.constant(torch.arange(STEADY_QUERIES), f"depths.{STEADY_QUERIES}"), index(0), "i64")


def _tree(lowering: GpuLowering, depths: Lazy, form: Form, rows: Index, apart: bool) -> dict[str, Given]:
    """The ancestors of every query, which a launch before finds unless queries are computed apart."""
    if form.mask != "none" or not form.past or (lowering.trees and not apart):
        raise Unsupported(
            "cuda has no kernel for a tree of queries with a mask, without `past` or that see later ones",
            hint="leave 'tree' out of draft",
        )
    found = lowering.buffer("arena", (rows, rows), "u8")
    given: dict[str, Given] = {"tree": Pointer(found.name, index(0), "u8"), "depths": _number(lowering, depths)}
    ancestry = gpu_attention.ancestry(STEADY_QUERIES)
    when = (rows, STEADY_QUERIES + 1, NO_LIMIT) if apart else None
    lowering.launch(ancestry, (over(rows, STEADY_QUERIES),), {**given, "rows": rows}, (found.name,), when)
    return given


def _lists(lowering: GpuLowering, fact: Fact, blocks: Lazy) -> dict[str, Given]:
    place, most, batch, head, _ = listed(lowering, fact, blocks)
    return {"lists": place, "most": most, "list_batch": batch, "list_head": head}


def _form(
    fact: Fact, q: Lazy, k: Lazy, mask: Lazy | None, causal: bool, window: int, softcap: float, past: Lazy | None,
    products: Products, records: str,
) -> Form:  # fmt: skip
    d, dv, group = q.shape[-1].constant, fact.shape[-1].constant, _group(q.shape[1], k.shape[1])
    if d is None or dv is None or group is None:
        raise Unsupported("attention with a symbolic head size or number of heads has no lowering on cuda")
    held = records or k.dtype
    kind: gpu_attention.MaskKind = "none" if mask is None else "bool" if mask.dtype == "b8" else "float"
    return Form(
        d, dv, group, k=held, v=held, mask=kind, causal=causal, windowed=window > 0, capped=softcap > 0,
        past=past is not None, products=products,
    )  # fmt: skip


def _group(heads: Index, shared: Index) -> int | None:
    both = heads.constant, shared.constant
    return None if both[0] is None or both[1] is None else both[0] // both[1]


def _strides(name: str, view: Strided) -> Mapping[str, Index]:
    last = ("batch", "head", "row")
    return {f"{name}_{part}": stride for part, stride in zip(last, view.strides, strict=False)}


@gpu_lowers(dialect.attention_bf16.default)
def attention_bf16(lowering: GpuLowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    return attention(lowering, fact, *operands, products="bf16", **optional)


@gpu_lowers(dialect.attention_int8.default)
def attention_int8(lowering: GpuLowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    """In bfloat16 where its kernels do not fit, which is closer to float32."""
    return attention(lowering, fact, *operands, products="bf16", int8=True, **optional)


@gpu_lowers(dialect.attention_q.default)
def attention_q(lowering: GpuLowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    *given, bits = operands
    return attention(lowering, fact, *given, records=f"q{bits}", **optional)


@gpu_lowers(aten.scaled_dot_product_attention.default)
def of_framework(lowering: GpuLowering, fact: Fact, *operands: Any, **optional: Any) -> Lazy:
    return scaled_dot_product_attention(lowering, fact, *operands, compute=attention, **optional)


@gpu_lowers(dialect.kv_update.default)
def kv_update(lowering: GpuLowering, fact: Fact, cache: Lazy, new: Lazy, past: Lazy) -> Lazy:
    if cache.dtype == "f32":
        return loops.kv_update(lowering, fact, cache, new, past)
    return _update(lowering, writable(lowering, cache), new, past, cache.dtype)


@gpu_lowers(dialect.kv_update_q.default)
def kv_update_q(lowering: GpuLowering, fact: Fact, cache: Lazy, new: Lazy, past: Lazy, bits: int) -> Lazy:
    return _update(lowering, writable(lowering, cache), new, past, f"q{bits}")


def _update(lowering: GpuLowering, buffer: Buffer, new: Lazy, past: Lazy, kind: str) -> Lazy:
    rows, (batch, heads, tokens, features) = unit_last(lowering, new), new.shape
    if features.constant is None:
        raise Unsupported("a cache with a symbolic head size has no lowering on cuda")
    _, held, keys, width = buffer.shape
    given: dict[str, Given] = {
        "cache": Pointer(buffer.name, index(0), buffer.dtype), "x": Pointer(rows.buffer, rows.offset),
        "past": _number(lowering, past), "total": batch * heads * tokens,
        "heads": heads, "rows": tokens, "keys": keys, "cache_batch": held * keys * width, "cache_head": keys * width,
        "cache_row": width, **_strides("x", rows),
    }  # fmt: skip
    grid = (over(batch * heads * tokens, gpu_caches.ROWS),)
    lowering.launch(gpu_caches.kv_update(features.constant, "f32", kind), grid, given, writes=(buffer.name,))
    return of_buffer(buffer)

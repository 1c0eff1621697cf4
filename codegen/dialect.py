"""Dialect ops without a kernel family: gated activations, rotary positions, cache updates."""

from __future__ import annotations

import torch

from sylvester.codegen import kv_update as kv_update_family
from sylvester.codegen.aten_activations import gelu_name
from sylvester.codegen.aten_indexing import loaded
from sylvester.codegen.elementwise import call, choose, is_test, pointwise, value_of
from sylvester.codegen.families import unit_last
from sylvester.codegen.index import Index, index, product, sum_of
from sylvester.codegen.lazy import Buffer, Extern, Indices, Lazy, Pointer, Store, of_buffer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.reads import loads
from sylvester.codegen.scalar import BYTES, Expr, cast

dialect = torch.ops.sylvester


@lowers(dialect.swiglu.default)
def swiglu(_: Lowering, fact: Fact, gate: Lazy, up: Lazy) -> Lazy:
    return pointwise(fact, lambda g, u: call("mul", call("silu", g), u), gate, up)


@lowers(dialect.geglu.default)
def geglu(_: Lowering, fact: Fact, gate: Lazy, up: Lazy, approximate: str) -> Lazy:
    return pointwise(fact, lambda g, u: call("mul", call(gelu_name(approximate), g), u), gate, up)


@lowers(dialect.rope.default)
def rope(_: Lowering, fact: Fact, x: Lazy, cos: Lazy, sin: Lazy, interleaved: bool) -> Lazy:
    """Feature f of pair p: x[f] cos[f] + sign(p) x[partner] sin[f], with sign -1 for the first of a pair."""
    rotary = cos.shape[-1]
    half, features = rotary // 2, fact.shape[-1]

    def turned(indices: Indices) -> Expr:
        *outer, feature = indices
        batch, _, token = outer
        table = (batch, token, feature)[3 - len(cos.shape) :]
        second = feature % 2 if interleaved else feature // half
        partner = feature + 1 - 2 * second if interleaved else feature % half + (1 - second) * half
        signed = call("mul", sign_of(second), x.load([*outer, partner]))
        return call("add", call("mul", x.load(indices), cos.at(table)), call("mul", signed, sin.at(table)))

    if rotary == features:
        return Lazy(fact.shape, fact.dtype, turned)

    def partial(indices: Indices) -> Expr:
        inside = is_test("lt", value_of(indices[-1]), value_of(rotary))
        return choose(inside, turned([*indices[:-1], indices[-1] % rotary]), x.load(indices))

    return Lazy(fact.shape, fact.dtype, partial)


def sign_of(second: Index) -> Expr:
    """-1.0 for 0, 1.0 for 1."""
    return cast(value_of(2 * second - 1), "f32")


@lowers(dialect.kv_update.default, bf16=True)
def kv_update(lowering: Lowering, fact: Fact, cache: Lazy, new: Lazy, past: Lazy) -> Lazy:
    """A state buffer is updated in place, anything else copied; positions are checked against the capacity."""
    buffer = writable(lowering, cache)
    if buffer.dtype == "bf16":
        return _rounded_update(lowering, buffer, new, past, "bf16")
    if any(load.buffer == buffer.name for load in loads(new.probe[1])):  # rows would be read after they are written
        new = of_buffer(_copied(lowering, new))
    capacity, tokens = buffer.shape[2], new.shape[2]
    first = loaded(past.load([]), capacity - tokens + 1)

    def place(i: Indices) -> Index:
        """The remainder keeps rows inside the buffer when there are more than it holds, which the check reports."""
        return buffer.offset([i[0], i[1], sum_of([first, i[2] % capacity]), i[3]])

    lowering.plan.steps.append(Store(buffer.name, new.shape, buffer.dtype, new.load, place))
    return of_buffer(buffer)


@lowers(dialect.kv_update_q.default)
def kv_update_q(lowering: Lowering, fact: Fact, cache: Lazy, new: Lazy, past: Lazy, bits: int) -> Lazy:
    return _rounded_update(lowering, writable(lowering, cache), new, past, f"q{bits}")


def _rounded_update(lowering: Lowering, buffer: Buffer, new: Lazy, past: Lazy, kind: str) -> Lazy:
    """float32 rows into a cache of bfloat16 or of records."""
    rows, position, (batch, heads, tokens, features) = unit_last(lowering, new), lowering.contiguous(past), new.shape
    name = f"sv_kv_update_{kind}"
    lowering.extern(
        Extern(
            f"{name}_past",
            kv_update_family.kv_update(name, cache=kind),
            (
                Pointer(buffer.name, index(0), buffer.dtype),
                Pointer(rows.buffer, rows.offset),
                Pointer(position.name, index(0), "i64"),
                *(batch, heads, tokens, features, buffer.shape[2], *rows.strides[:3]),
            ),
            writes=(buffer.name,),
            reads=(rows.buffer, position.name),
            work=product(new.shape),
            flops=index(0),
            bytes=product(new.shape) * BYTES["f32"] + product(new.shape[:3]) * buffer.shape[3] * BYTES[buffer.dtype],
        )
    )
    return of_buffer(buffer)


def writable(lowering: Lowering, cache: Lazy) -> Buffer:
    found = lowering.whole(cache)
    if found is not None and found.kind == "state" and found.shape == cache.shape:
        return found
    return _copied(lowering, cache)


def _copied(lowering: Lowering, x: Lazy) -> Buffer:
    buffer = lowering.buffer("arena", x.shape, x.dtype)
    lowering.plan.steps.append(Store(buffer.name, x.shape, x.dtype, x.load, buffer.offset))
    return buffer

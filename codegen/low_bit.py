"""Low-bit weights as tensors: what an embedding reads when it shares the weight of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sylvester.codegen import bfloat16, quantized
from sylvester.codegen.elementwise import call, value_of
from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Buffer, Indices, Lazy
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.codegen.scalar import Constant, Expr, Load, cast
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.quantized_ops import group_size

dialect = torch.ops.sylvester
Element = Callable[[Indices], Expr]


@lowers(dialect.dequantize_w8.default)
def dequantize_w8(lowering: Lowering, fact: Fact, weight: Lazy, scales: Lazy) -> Lazy:
    """int8 weights times their scales, from the panels of a linear layer or as they are."""
    (buffer, group), k = _stored(lowering, weight), fact.shape[1]
    if group is None:
        return _product(fact, lambda i: cast(weight.load(i), "f32"), _plain_scale(k, scales))

    def number(i: Indices) -> Expr:
        return _centred(Load(buffer.name, quantized.place_q8(i[0], i[1], k, group), "u8"), 128)

    def scale(i: Indices) -> Expr:
        place = quantized.scale_place_q8(i[0], i[1], k, group)
        return _half(buffer, place) if group else _single(buffer, place)

    return _product(fact, number, scale)


@lowers(dialect.dequantize_w4.default)
def dequantize_w4(lowering: Lowering, fact: Fact, weight: Lazy, scales: Lazy) -> Lazy:
    """int4 weights times their scales, from the panels of a linear layer or as they are."""
    (buffer, group), k = _stored(lowering, weight), fact.shape[1]
    if group is None:
        return _product(
            fact,
            lambda i: _centred(_field(weight.load([i[0], i[1] // 2]), i[1] % 2 * 4, 4), 8),
            _plain_scale(k, scales),
        )

    def number(i: Indices) -> Expr:
        place, shift = quantized.place_q4(i[0], i[1], k, group)
        return _centred(_field(Load(buffer.name, place, "u8"), shift, 4), 8)

    return _product(fact, number, lambda i: _half(buffer, quantized.scale_place_q4(i[0], i[1], k, group)))


@lowers(dialect.dequantize_w3.default)
def dequantize_w3(lowering: Lowering, fact: Fact, weight: Lazy, scales: Lazy) -> Lazy:
    """int3 weights times their scales, from the panels of a linear layer or as they are."""
    (buffer, group), k = _stored(lowering, weight), fact.shape[1]
    if group is None:
        return _product(
            fact,
            lambda i: _three([(weight.load([i[0], at]), place) for at, place in _planes(i[1], k)]),
            _plain_scale(k, scales),
        )

    def number(i: Indices) -> Expr:
        return _three([(Load(buffer.name, at, "u8"), place) for at, place in quantized.place_q3(i[0], i[1], k, group)])

    return _product(fact, number, lambda i: _half(buffer, quantized.scale_place_q3(i[0], i[1], k, group)))


@lowers(dialect.widen_bf16.default, bf16=True)
def widen_bf16(lowering: Lowering, fact: Fact, weight: Lazy) -> Lazy:
    """bfloat16 weights as float32, from the panels of a linear layer or as they are."""
    (buffer, group), k = _stored(lowering, weight), fact.shape[-1]
    if group is None:
        return Lazy(fact.shape, "f32", lambda i: _widened(weight.load(i)))
    return Lazy(fact.shape, "f32", lambda i: _half(buffer, bfloat16.offset_bf16(i[0], i[1], k) * 2))


def _stored(lowering: Lowering, weight: Lazy) -> tuple[Buffer, int | None]:
    """The buffer of a stored weight and the group size of its panels; None when it is not in panels."""
    element = weight.probe[1]
    if not isinstance(element, Load):
        raise Unsupported("a low-bit weight must be a stored tensor, found one computed at run time")
    buffer = lowering.plan.buffers[element.buffer]
    return buffer, buffer.layout.format.group if buffer.layout and buffer.packed else None


def _plain_scale(k: Index, scales: Lazy) -> Element:
    """The scale of an element of a weight that is not in panels."""
    groups = scales.shape[1].constant
    if k.constant is None or groups is None:
        raise Unsupported("low-bit weights have static shapes")
    size = group_size(k.constant, groups)
    return lambda i: scales.load([i[0], i[1] // size])


def _product(fact: Fact, number: Element, scale: Element) -> Lazy:
    return Lazy(fact.shape, "f32", lambda i: call("mul", number(i), scale(i)))


def _centred(stored: Expr, zero: int) -> Expr:
    """A number stored with `zero` added."""
    return call("sub", cast(stored, "f32"), Constant(float(zero), "f32"))


def _field(byte: Expr, shift: Index, bits: int) -> Expr:
    """So many bits of a byte from a place up."""
    return call("and", call("shr", cast(byte, "i64"), value_of(shift)), Constant((1 << bits) - 1, "i64"))


def _planes(column: Index, k: Index) -> tuple[tuple[Index, Index], ...]:
    """Byte of a row and place in it of each of the three bits of a number that is not in panels."""
    low, high = (column // 4, column % 4 * 2), (k // 4 + column // 8, column % 8)
    return low, (low[0], low[1] + 1), high


def _three(bits: Sequence[tuple[Expr, Index]]) -> Expr:
    """The int3 number whose bits, the lowest first, are in these bytes at these places."""
    low, middle, high = (call("mul", _field(*bit, 1), Constant(1 << n, "i64")) for n, bit in enumerate(bits))
    return _centred(call("or", call("or", low, middle), high), 4)


def _half(buffer: Buffer, place: Index) -> Expr:
    """The bfloat16 whose bytes start at `place`."""
    return call("bf16_bytes", *(Load(buffer.name, place + n, "u8") for n in range(2)), dtype="f32")


def _single(buffer: Buffer, place: Index) -> Expr:
    """The float32 whose bytes start at `place`."""
    return call("f32_bytes", *(Load(buffer.name, place + n, "u8") for n in range(4)), dtype="f32")


def _widened(half: Expr) -> Expr:
    """A bfloat16 element, which C holds as an integer."""
    bits = cast(half, "i64")
    low, high = call("and", bits, Constant(255, "i64")), call("shr", bits, Constant(8, "i64"))
    return call("bf16_bytes", low, high, dtype="f32")

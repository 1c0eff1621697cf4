"""Rotary positions, as RotaryEmbedding where both features of a pair turn by the same angle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.views import END, cut
from sylvester.compiler.program import Program, binding, is_weight, value

aten = torch.ops.aten
ROTARY_OPSET = 23
ALIKE = {
    aten.cos.default, aten.sin.default, aten.neg.default, aten.to.dtype, aten.unsqueeze.default, aten.squeeze.dim,
    aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor, aten.clone.default, aten.slice.Tensor, aten.expand.default,
    aten.index_select.default, aten.select.int,
}  # fmt: skip
"""Ops that keep pairs equal along the last axis when all their operands of that width have such."""


@translates(torch.ops.sylvester.rope.default)
def rope(b: Builder, fact: Tensor, x: Operand, cos: Operand, sin: Operand, interleaved: bool) -> ir.Value:
    rotary = cos.width()
    both = all(paired(b.program, t.node, rotary, interleaved) for t in (cos, sin))
    if b.opset >= ROTARY_OPSET and both:
        halves = [_half(b, t, x, rotary, interleaved) for t in (cos, sin)]
        return b.call(
            "RotaryEmbedding", x.value, *halves, interleaved=int(interleaved) or None,
            rotary_embedding_dim=rotary if rotary < x.width() else None,
        )  # fmt: skip
    return _written_out(b, x, cos, sin, rotary, interleaved)


def _half(b: Builder, t: Operand, x: Operand, rotary: int, interleaved: bool) -> ir.Value:
    """Angles [batch, tokens, rotary / 2]."""
    axes = (
        (b.ints(0), b.ints(END), b.ints(-1), b.ints(2)) if interleaved else (b.ints(0), b.ints(rotary // 2), b.ints(-1))
    )
    half = b.call("Slice", t.value, *axes)
    half = b.call("Unsqueeze", half, b.ints(0)) if t.rank == 2 else half
    sizes = b.call("Concat", b.size(x.shape[0]), b.ints(1, 1), axis=0)
    return b.call("Expand", half, sizes)


def _written_out(b: Builder, x: Operand, cos: Operand, sin: Operand, rotary: int, interleaved: bool) -> ir.Value:
    """head * cos + turned * sin, with what lies behind the rotary part passed through."""
    cosines, sines = (b.call("Unsqueeze", t.value, b.ints(-3)) for t in (cos, sin))
    whole = rotary == x.width()
    head = x.value if whole else cut(b, x.value, -1, 0, rotary)
    y = b.call("Add", b.call("Mul", head, cosines), b.call("Mul", _turned(b, head, x, rotary, interleaved), sines))
    return y if whole else b.call("Concat", y, cut(b, x.value, -1, rotary, END), axis=-1)


def _turned(b: Builder, head: ir.Value, x: Operand, rotary: int, interleaved: bool) -> ir.Value:
    if not interleaved:
        first, second = cut(b, head, -1, 0, rotary // 2), cut(b, head, -1, rotary // 2, END)
        return b.call("Concat", b.call("Neg", second), first, axis=-1)
    even, odd = cut(b, head, -1, 0, END, 2), cut(b, head, -1, 1, END, 2)
    pairs = [b.call("Unsqueeze", t, b.ints(-1)) for t in (b.call("Neg", odd), even)]
    return b.reshape(b.call("Concat", *pairs, axis=-1), [*x.shape[:-1], rotary])


def paired(program: Program, node: fx.Node, width: int, interleaved: bool) -> bool:
    """Whether features i and i + width / 2 are equal, or 2i and 2i + 1, as the graph shows."""
    fact: Tensor = value(node)
    if fact.dim() == 0 or fact.shape[-1] != width:
        return fact.dim() == 0 or fact.shape[-1] == 1
    if is_weight(node):
        return _equal_halves(program.weights[binding(node).key], interleaved)
    if node.target is aten.cat.default and not interleaved:
        parts: Sequence[Any] = node.args[0]  # type: ignore[assignment]
        last = node.args[1] if len(node.args) > 1 else 0
        return len(parts) == 2 and parts[0] is parts[1] and last in (-1, fact.dim() - 1)
    if node.target is aten.repeat_interleave.self_int and interleaved:
        return bool(node.args[1] == 2)
    if node.target not in ALIKE:
        return False
    return all(paired(program, n, width, interleaved) for n in node.all_input_nodes if isinstance(value(n), Tensor))


def _equal_halves(table: Tensor, interleaved: bool) -> bool:
    first, second = (table[..., ::2], table[..., 1::2]) if interleaved else table.chunk(2, -1)
    return torch.equal(first, second)

"""Linear layers and tables in few bits: DequantizeLinear and MatMulInteger, or onnxruntime's MatMulNBits.

Whole numbers are those of the program: only how they are packed differs. Weights of 3 bits are stored in 4. Against
weights with groups no op of ONNX takes rows of whole numbers: rows of 8 bits are given as floats, which onnxruntime
rounds by blocks; those of 4 bits, and with a step, are rounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.backends.onnx.products import only_rows, with_bias
from sylvester.backends.onnx.weights import PLAIN, TRANSPOSED, Form
from sylvester.compiler.packing import packed4, unpacked3, unpacked4
from sylvester.compiler.quantized_ops import group_size
from sylvester.compiler.quantized_rows import LARGEST

dialect = torch.ops.sylvester
LINEARS: dict[Any, int] = {dialect.linear_w8.default: 8, dialect.linear_w4.default: 4, dialect.linear_w3.default: 3}
WIDENED = {dialect.dequantize_w8.default: 8, dialect.dequantize_w4.default: 4, dialect.dequantize_w3.default: 3}
BLOCKS_OPSET = 21
WHOLE_ROW = 128
"""Columns of a block of MatMulNBits where a scale is for a whole row."""
SMALLEST = 1e-30
"""Stands for the scale of a row of zeros, whose numbers are zeros with any scale."""


@dataclass(frozen=True)
class Packed:
    """A weight [n, k] of whole numbers with a scale per `group` columns."""

    numbers: Operand
    scales: Operand
    bits: int

    @property
    def n(self) -> int:
        return self.numbers.width(0)

    @property
    def k(self) -> int:
        width = self.numbers.width(1)
        return {8: width, 4: width * 2, 3: width * 8 // 3}[self.bits]

    @property
    def groups(self) -> int:
        return self.scales.width(1)

    @property
    def group(self) -> int:
        return group_size(self.k, self.groups)

    def unpacked(self, stored: Tensor) -> Tensor:
        """int8 [n, k]."""
        return stored if self.bits == 8 else unpacked4(stored) if self.bits == 4 else unpacked3(stored)

    @property
    def block(self) -> int:
        """Columns of a block of MatMulNBits."""
        return self.group if self.groups > 1 else WHOLE_ROW

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)

    def in_blocks(self, rows: int) -> bool:
        """Whether MatMulNBits alone computes a layer with rows of so many bits."""
        return rows >= 8 and not (self.groups == 1 and self.bits == 8 and rows != 16)

    @property
    def type_bits(self) -> int:
        return 8 if self.bits == 8 else 4


@translates(dialect.linear_bf16.default)
def linear_bf16(b: Builder, fact: Tensor, x: Operand, weight: Operand, bias: Operand | None = None) -> ir.Value:
    """The weight is bfloat16 in the file; rows of x are not rounded."""
    alone = only_rows(b, weight)
    stored = b.weight(weight.key, TRANSPOSED if alone else PLAIN)
    wide = b.cast(stored, torch.bfloat16, fact.dtype)
    turned = wide if alone else b.call("Transpose", wide, perm=[1, 0])
    return with_bias(b, b.call("MatMul", x.value, turned), bias, fact.dtype)


@translates(dialect.widen_bf16.default)
def widen_bf16(b: Builder, fact: Tensor, weight: Operand) -> ir.Value:
    return b.cast(weight.value, torch.bfloat16, fact.dtype)


def _linear(bits: int) -> Any:
    def translate(
        b: Builder, fact: Tensor, x: Operand, numbers: Operand, scales: Operand, bias: Operand | None = None,
        rows: int = 8, step: Operand | None = None,
    ) -> ir.Value:  # fmt: skip
        weight = Packed(numbers, scales, bits)
        if not weight.in_blocks(max(rows, 8)):
            return with_bias(b, _of_integers(b, x, weight, rows, step), bias, fact.dtype)
        b.exact_rows |= rows == 16
        coarse = step is not None or rows < 8
        given = b.call("Mul", *rounded(b, x.value, rows, step)) if coarse else x.value
        if b.contrib:
            return _nbits(b, given, weight, bias, rows)
        return with_bias(b, b.call("MatMul", given, _matrix(b, weight)), bias, fact.dtype)

    return translate


for target, bits in LINEARS.items():
    translates(target)(_linear(bits))


def _of_integers(b: Builder, x: Operand, weight: Packed, rows: int, step: Operand | None) -> ir.Value:
    """Rows of x rounded to whole numbers, products of integers, one scale per row and column."""
    whole, scale = rounded(b, x.value, rows, step)
    matrix = b.weight(weight.numbers.key, TRANSPOSED)
    total = b.call("MatMulInteger", b.call("Cast", whole, to=ir.DataType.INT8), matrix)
    columns = b.weight(weight.scales.key, Form("row", lambda t: t.float().reshape(-1)))
    return b.call("Mul", b.call("Mul", b.call("Cast", total, to=ir.DataType.FLOAT), scale), columns)


def rounded(b: Builder, x: ir.Value, bits: int, step: Operand | None) -> tuple[ir.Value, ir.Value]:
    """Whole numbers of x, as floats, and their scale: [..., 1], or the step [1]."""
    largest = b.number(LARGEST[bits], torch.float32)
    if step is None:
        most = b.call("ReduceMax", b.call("Abs", x), b.ints(-1), keepdims=1)
        scale = b.call("Max", b.call("Div", most, largest), b.number(SMALLEST, torch.float32))
        return b.call("Round", b.call("Div", x, scale)), scale
    safe = b.call("Max", step.value, b.number(SMALLEST, torch.float32))
    whole = b.call("Clip", b.call("Round", b.call("Div", x, safe)), b.call("Neg", largest), largest)
    return whole, b.call("Max", step.value, b.number(0, torch.float32))


def _nbits(b: Builder, x: ir.Value, weight: Packed, bias: Operand | None, rows: int) -> ir.Value:
    numbers, scales = block_forms(weight)
    stored = b.weight(weight.numbers.key, numbers), b.weight(weight.scales.key, scales)
    return matmul_nbits(b, x, weight, *stored, bias, rows, weight.n)


def block_forms(weight: Packed) -> tuple[Form, Form]:
    """Numbers and scales as MatMulNBits reads them: unsigned, [n, blocks, bytes] and [n, blocks]."""
    block, blocks = weight.block, weight.blocks

    def packed(stored: Tensor) -> Tensor:
        whole = weight.unpacked(stored)
        filled = torch.nn.functional.pad(whole, (0, blocks * block - weight.k))
        found = packed4(filled) if weight.type_bits == 4 else (filled.to(torch.int16) + 128).to(torch.uint8)
        return found.reshape(weight.n, blocks, -1)

    spread = Form(f"blocks{block}", lambda t: t.float().expand(-1, blocks) if t.shape[1] == 1 else t.float())
    return Form(f"blocks{block}", packed), spread


def matmul_nbits(
    b: Builder,
    x: ir.Value,
    weight: Packed,
    numbers: ir.Value,
    scales: ir.Value,
    bias: Operand | None,
    rows: int,
    n: int,
) -> ir.Value:
    """x W^T + bias; rows of x in int8 by blocks for `rows` of at most 8 bits, else float."""
    shift = None if bias is None else b.read(bias, torch.float32)
    return b.extra(
        "MatMulNBits", x, numbers, scales, None, None, shift, K=weight.k, N=n, bits=weight.type_bits,
        block_size=weight.block, accuracy_level=4 if rows <= 8 else 1,
    )  # fmt: skip


def _matrix(b: Builder, weight: Packed) -> ir.Value:
    """The float weight [k, n]: from the form of a table where it is one as well."""
    if not only_rows(b, weight.numbers):
        return b.call("Transpose", widened(b, weight), perm=[1, 0])
    return _dequantized(b, weight, 0)


def widened(b: Builder, weight: Packed) -> ir.Value:
    """The float weight [n, k]."""
    return _dequantized(b, weight, 1)


def _dequantized(b: Builder, weight: Packed, axis: int) -> ir.Value:
    """DequantizeLinear of [k, n] with scales along axis 0, or [n, k] along axis 1."""

    def turn(t: Tensor) -> Tensor:
        return (t.t() if axis == 0 else t).contiguous()

    side = "columns" if axis == 0 else "rows"
    form = Form(f"numbers.{side}", lambda t: turn(weight.unpacked(t)), int4=weight.type_bits == 4)
    if weight.groups == 1:
        if weight.type_bits == 4:
            b.require_opset(BLOCKS_OPSET, "weights of 4 bits")
        scales = b.weight(weight.scales.key, Form("row", lambda t: t.float().reshape(-1)))
        return b.call("DequantizeLinear", b.weight(weight.numbers.key, form), scales, axis=1 - axis)
    b.require_opset(BLOCKS_OPSET, "weights with scales of groups")
    scales = b.weight(weight.scales.key, Form(f"scales.{side}", lambda t: turn(t.float())))
    return b.call(
        "DequantizeLinear", b.weight(weight.numbers.key, form), scales, axis=axis, block_size=weight.group
    )  # fmt: skip


def _widened(bits: int) -> Any:
    return lambda b, fact, numbers, scales: widened(b, Packed(numbers, scales, bits))


for target, bits in WIDENED.items():
    translates(target)(_widened(bits))


@translates(torch.ops.aten.embedding.default)
def embedding(b: Builder, fact: Tensor, table: Operand, indices: Operand, *_: Any) -> ir.Value:
    """Of a table in few bits, only the rows that are looked up are widened."""
    target, args = table.node.target, [b.operand(n) for n in table.node.all_input_nodes]
    if target is dialect.widen_bf16.default:
        return b.cast(b.call("Gather", args[0].value, indices.value, axis=0), torch.bfloat16, fact.dtype)
    if target in WIDENED and args[0].is_weight:
        return _rows(b, fact, Packed(args[0], args[1], WIDENED[target]), indices)
    return b.call("Gather", table.value, indices.value, axis=0)


def _rows(b: Builder, fact: Tensor, table: Packed, indices: Operand) -> ir.Value:
    if b.contrib and table.groups > 1 and table.k % table.group == 0:
        return _gathered_blocks(b, table, indices)
    numbers = _gathered_numbers(b, fact, table, indices)
    scales = b.call("Gather", b.weight(table.scales.key, Form("float", Tensor.float)), indices.value, axis=0)
    if table.groups == 1:
        return b.call("Mul", numbers, scales)
    if table.k % table.group:
        return _uneven(b, numbers, scales, table, fact.shape)
    blocks = b.reshape(numbers, [*fact.shape[:-1], table.groups, table.group], fact.shape)
    return b.reshape(b.call("Mul", blocks, b.call("Unsqueeze", scales, b.ints(-1))), fact.shape)


def _uneven(b: Builder, numbers: ir.Value, scales: ir.Value, table: Packed, shape: Sequence[Any]) -> ir.Value:
    """The last group is shorter: every column looks its scale up."""
    of = b.ints(*(column // table.group for column in range(table.k)))
    return b.call("Mul", numbers, b.call("Gather", scales, of, axis=-1))


def _gathered_blocks(b: Builder, table: Packed, indices: Operand) -> ir.Value:
    """From the bytes that MatMulNBits reads too, if a layer does."""
    bits = table.type_bits

    def packed(stored: Tensor) -> Tensor:
        whole = table.unpacked(stored)
        return packed4(whole) if bits == 4 else (whole.to(torch.int16) + 128).to(torch.uint8)

    numbers = b.weight(table.numbers.key, Form("table", packed))
    scales = b.weight(table.scales.key, Form(f"blocks{table.group}", Tensor.float))
    return b.extra(
        "GatherBlockQuantized", numbers, indices.value, scales, gather_axis=0, quantize_axis=1,
        block_size=table.group, bits=bits,
    )  # fmt: skip


def _gathered_numbers(b: Builder, fact: Tensor, table: Packed, indices: Operand) -> ir.Value:
    """Rows of whole numbers as floats; those of 4 bits are taken out of bytes that hold the even column low."""
    if table.type_bits == 8:
        rows = b.call("Gather", b.weight(table.numbers.key, PLAIN), indices.value, axis=0)
        return b.cast(rows, torch.int8, torch.float32)
    form = Form("table", lambda t: packed4(table.unpacked(t)) ^ 0x88)
    rows = b.call("Gather", b.weight(table.numbers.key, form), indices.value, axis=0)
    low = b.call("BitwiseAnd", rows, b.number(15, torch.uint8))
    high = b.call("BitShift", rows, b.number(4, torch.uint8), direction="RIGHT")
    pairs = b.call("Concat", *(b.call("Unsqueeze", t, b.ints(-1)) for t in (low, high)), axis=-1)
    whole = b.call(
        "Cast", b.call("BitwiseXor", b.reshape(pairs, fact.shape), b.number(8, torch.uint8)), to=ir.DataType.FLOAT
    )
    return b.call("Sub", whole, b.number(8, torch.float32))

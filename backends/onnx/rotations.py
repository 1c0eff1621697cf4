"""The Hadamard transform as products with small matrices of signs."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.compiler import hadamard as matrices

LARGEST = 128
"""Order up to which one matrix is faster than two."""


@translates(torch.ops.sylvester.hadamard.default)
def hadamard(b: Builder, fact: Tensor, x: Operand, block: int, transposed: bool = False) -> ir.Value:
    """Rows of [..., blocks, block] times H^T, or H, over sqrt(block)."""
    if block == 1:
        return x.value
    matrix = matrices.matrix(block).float() * block**-0.5
    name = b.store.put(f"hadamard.{block}.{'t' if transposed else 'n'}", matrix if transposed else matrix.t())
    rows = b.reshape(x.value, [*x.shape[:-1], x.width() // block, block], x.shape)
    return b.reshape(b.call("MatMul", rows, b.stored(name)), fact.shape)

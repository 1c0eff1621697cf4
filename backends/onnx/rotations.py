"""The Hadamard transform as products with matrices of signs: one, or two smaller ones where that is faster."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates
from sylvester.compiler import hadamard as matrices

WHOLE, INNER = 128, 32
"""The largest order that one matrix is faster for in onnxruntime, and the order of the inner of two."""


@translates(torch.ops.sylvester.hadamard.default)
def hadamard(b: Builder, fact: Tensor, x: Operand, block: int, transposed: bool = False) -> ir.Value:
    """Blocks of x as [outer, inner]: y = A x B^T for H = A (x) B, over sqrt(block)."""
    if block == 1:
        return x.value
    whole = matrices.matrix(block).float() * block**-0.5
    whole = whole.t() if transposed else whole
    kind = "t" if transposed else "n"
    inner = min(2 ** matrices.scheme_of(block).k, INNER) if block > WHOLE else block
    count = x.width() // block
    if inner in (1, block):
        rows = b.reshape(x.value, [*x.shape[:-1], count, block], x.shape)
        right = b.stored(b.store.put(f"hadamard.{block}.{kind}", whole.t()))
        return b.reshape(b.call("MatMul", rows, right), fact.shape)
    outer = whole[::inner, ::inner]
    names = (f"hadamard.{block}.outer.{kind}", f"hadamard.{inner}")
    signs = matrices.matrix(inner).float()
    left, right = (b.stored(b.store.put(n, t)) for n, t in zip(names, (outer, signs.t()), strict=True))
    rows = b.reshape(x.value, [*x.shape[:-1], count, block // inner, inner], x.shape)
    return b.reshape(b.call("MatMul", left, b.call("MatMul", rows, right)), fact.shape)

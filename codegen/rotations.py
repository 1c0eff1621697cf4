"""Rotations of the features that a kernel family computes: the Hadamard transform."""

from __future__ import annotations

from dataclasses import replace

import torch

from sylvester.codegen.hadamard import MOST, row_header
from sylvester.codegen.hadamard import hadamard as kernel
from sylvester.codegen.index import index, product
from sylvester.codegen.lazy import Extern, Lazy, Pointer, RowNorm, of_buffer
from sylvester.codegen.linears import row_pointer
from sylvester.codegen.lowering import Fact, Lowering, lowers
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.hadamard import scheme_of


@lowers(torch.ops.sylvester.hadamard.default)
def hadamard(lowering: Lowering, fact: Fact, x: Lazy, block: int, transposed: bool = False) -> Lazy:
    """Rows are read through their stride; a block of 1 is the identity."""
    if block > MOST:
        raise Unsupported(f"a hadamard block of {block} has no lowering, at most {MOST}", hint="use smaller blocks")
    if block == 1:
        return x
    y = lowering.buffer("arena", fact.shape, fact.dtype)
    rows, stride = row_pointer(lowering, x)
    count, k = product(fact.shape[:-1]), fact.shape[-1]
    flops = product(fact.shape) * (scheme_of(block).additions + 1)
    name, text = kernel(block, transposed)
    lowering.extern(
        Extern(
            name,
            row_header(block, transposed) + text,
            (Pointer(y.name, index(0)), rows, count, k, index(block), k, stride),
            writes=(y.name,),
            reads=(rows.buffer,),
            work=flops,
            flops=flops,
        )
    )
    before = x.norm or RowNorm("none", x)
    both = None if before.hadamard else replace(before, hadamard=block, transposed=transposed)
    return replace(of_buffer(y), norm=both)

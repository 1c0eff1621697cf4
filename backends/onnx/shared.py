"""A matrix that is a sum of atoms: onnxruntime makes it once where everything in it is stored."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from sylvester.backends.onnx.builder import Builder, Operand, translates


@translates(torch.ops.sylvester.combine.default)
def combine(
    b: Builder, fact: Tensor, atoms: Operand, coefficients: Operand, left: Operand | None = None,
    right: Operand | None = None, resident: bool = False,
) -> ir.Value:  # fmt: skip
    count, rows, columns = atoms.shape
    flat = b.reshape(atoms.value, [count, rows * columns])
    total = b.reshape(b.call("MatMul", coefficients.value, flat), [rows, columns])
    if left is None or right is None:
        return total
    return b.call("Add", total, b.call("MatMul", left.value, right.value))

"""Sizes of traced tensors (integers or torch symbols) as index polynomials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from sylvester.codegen.index import Index, Size, atom, index, product, sum_of
from sylvester.compiler.errors import Unsupported

DTYPES = {
    torch.float32: "f32", torch.float64: "f64", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8", torch.bfloat16: "bf16",
}  # fmt: skip


SHORT = {torch.float16: "f16", torch.float8_e4m3fn: "fp8"}
"""Types of stored weights that some targets read."""


def dtype_of(dtype: torch.dtype, known: Mapping[torch.dtype, str] = DTYPES) -> str:
    if dtype not in known:
        raise Unsupported(f"dtype {dtype} has no lowering", hint=f"supported are {[str(d) for d in known]}")
    return known[dtype]


def size(n: Any) -> Index:
    """One size as a polynomial: a number, a SymInt, or an index already."""
    if isinstance(n, Index):
        return n
    return from_sympy(n.node.expr) if isinstance(n, torch.SymInt) else index(int(n))


def shape_of(tensor: Tensor) -> tuple[Index, ...]:
    return tuple(size(n) for n in tensor.shape)


def per_axis(value: Any, rank: int, fallback: tuple[int, ...] = ()) -> tuple[int, ...]:
    """A geometry argument (one number for all axes, a list, or an empty list for the fallback) as a number per axis."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not numbers:
        return fallback
    return tuple(int(n) for n in (numbers * rank if len(numbers) == 1 else numbers))


def from_sympy(expression: Any) -> Index:
    if isinstance(expression, sympy.Integer):
        return index(int(expression))
    if isinstance(expression, sympy.Symbol):
        return atom(Size(str(expression)))
    parts = [from_sympy(a) for a in expression.args]
    if isinstance(expression, sympy.Add):
        return sum_of(parts)
    if isinstance(expression, sympy.Mul):
        return product(parts)
    if (
        isinstance(expression, sympy.Pow)
        and isinstance(expression.args[1], sympy.Integer)
        and int(expression.args[1]) > 0
    ):
        return product([parts[0]] * int(expression.args[1]))
    if isinstance(expression, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(expression, (Mod, PythonMod)):
        return parts[0] % parts[1]
    raise Unsupported(
        f"size expression {expression} has no lowering", hint="make that dimension static with `dynamic=`"
    )

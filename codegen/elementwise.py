"""The vocabulary of elementwise lowerings: broadcast, promote and combine scalars of lazy tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Indices, Lazy
from sylvester.codegen.lowering import Fact, element
from sylvester.codegen.scalar import FLOATS, Call, Constant, Expr, IndexValue, cast

Operand = Lazy | Index | float | int


def kind_of(operand: Any) -> str:
    """The dtype an operand brings to a promotion; numbers are weaker than tensors of their kind."""
    if isinstance(operand, Lazy):
        return operand.dtype
    if isinstance(operand, bool):
        return "b8"
    return "f32" if isinstance(operand, float) else "i64"


def pointwise(fact: Fact, compute: Callable[..., Expr], *operands: Operand, dtype: str | None = None) -> Lazy:
    """compute(scalars...) at every index; the operands are broadcast and cast to `dtype` (the result's by default)."""
    wanted = dtype or fact.dtype

    def load(indices: Indices) -> Expr:
        return compute(*(cast(element(o, indices, kind_of(o)), wanted) for o in operands))

    return Lazy(fact.shape, fact.dtype, load)


def call(function: str, *arguments: Expr, dtype: str = "") -> Call:
    return Call(function, arguments, dtype or arguments[0].dtype)


def scaled(x: Expr, alpha: float | int) -> Expr:
    return x if alpha == 1 else call("mul", x, Constant(alpha, x.dtype))


def clamped(x: Expr, low: float | int | None, high: float | int | None) -> Expr:
    """min(max(x, low), high); NaN stays NaN."""
    highest, lowest = extremes(x.dtype)
    x = x if low is None else call(highest, x, Constant(low, x.dtype))
    return x if high is None else call(lowest, x, Constant(high, x.dtype))


def extremes(dtype: str) -> tuple[str, str]:
    """Names of the maximum and the minimum of two scalars."""
    return ("fmax", "fmin") if dtype in FLOATS else ("max", "min")


def is_test(function: str, x: Expr, y: Expr) -> Call:
    """A comparison by its name: eq, ne, lt, le, gt, ge."""
    return call(function, x, y, dtype="b8")


def choose(condition: Expr, yes: Expr, no: Expr) -> Call:
    return call("where", condition, yes, no, dtype=yes.dtype)


def value_of(position: Index) -> Expr:
    """An index as a number."""
    known = position.constant
    return IndexValue(position) if known is None else Constant(known, "i64")

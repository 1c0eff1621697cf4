"""Scalar and index expressions of a loop body as TVM expressions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tvm import tirx

from sylvester.codegen.index import Atom, Index, Loaded, Quotient, Remainder, nonnegative, product, within
from sylvester.codegen.lazy import Buffer
from sylvester.codegen.reads import loads
from sylvester.codegen.region import Refused
from sylvester.codegen.scalar import COSTLY, Call, Constant, Expr, IndexValue, Load, common
from sylvester.codegen.tvm_math import FUNCTIONS as MATH
from sylvester.codegen.tvm_math import is_nan, nearest

Value = Any
MEMORY = {
    "f32": "float32",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "b8": "uint8",
}
"""The types of what buffers hold; a truth value is `bool` once it is read."""
COMPARISONS: dict[str, Callable[[Value, Value], Value]] = {
    "eq": lambda x, y: x.equal(y), "ne": lambda x, y: tirx.NE(x, y), "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip
PLAIN: dict[str, Callable[..., Value]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": tirx.div,
    "neg": lambda x: -x, "bitnot": tirx.bitwise_not, "shr": lambda x, y: x >> y,
    "sqrt": tirx.sqrt, "log": tirx.log, "log2": tirx.log2, "log10": tirx.log10, "sin": tirx.sin, "cos": tirx.cos,
    "pow": tirx.pow, "abs": tirx.abs, "iabs": tirx.abs, "floor": tirx.floor, "ceil": tirx.ceil, "trunc": tirx.trunc,
    "round": nearest, "isnan": is_nan, "rsqrt": lambda x: tirx.const(1.0, "float32") / tirx.sqrt(x),
}  # fmt: skip
LOGICAL = {"and": tirx.And, "or": tirx.Or, "xor": tirx.NE}
BITS = {"and": tirx.bitwise_and, "or": tirx.bitwise_or, "xor": tirx.bitwise_xor}
CHOICES: dict[str, Callable[[Value, Value], Value]] = {
    "max": lambda x, y: tirx.Select(x > y, x, y),
    "min": lambda x, y: tirx.Select(x < y, x, y),
    "fmax": lambda x, y: tirx.Select(tirx.any(x > y, is_nan(x)), x, y),
    "fmin": lambda x, y: tirx.Select(tirx.any(x < y, is_nan(x)), x, y),
}


def constant(value: int) -> Value:
    """An index."""
    return tirx.IntImm("int64", value)


def typed(dtype: str) -> str:
    """The type of a value in an expression."""
    if dtype not in MEMORY:
        raise Refused(f"{dtype} values")
    return "bool" if dtype == "b8" else MEMORY[dtype]


class Scalars(ABC):
    """Translates expressions; a value that is used more than once is bound to a name in `statements`."""

    def __init__(self, buffers: Mapping[str, Buffer]) -> None:
        self.buffers = buffers
        self.atoms: dict[Atom, Value] = {}
        """Loop variables by name and extent, and sizes."""
        self.statements: list[Value] = []
        self._in_branch = False

    @abstractmethod
    def read(self, load: Load) -> Value:
        """The element of a buffer, as memory holds it."""

    @contextmanager
    def block(self) -> Iterator[list[Value]]:
        """Statements of their own for what is translated inside."""
        before, self.statements = self.statements, []
        yield self.statements
        self.statements = before

    def keep(self, value: Value, dtype: str = "float32") -> Value:
        if self._in_branch:
            return value
        name = tirx.Var("v", dtype)
        self.statements.append(tirx.Bind(name, value))
        return name

    def index(self, value: Index) -> Value:
        total = constant(0)
        for monomial, coefficient in value.terms:
            term = constant(coefficient)
            for a in monomial:
                term = term * self._atom(a)
            total = total + term
        return total

    def _atom(self, a: Atom) -> Value:
        if isinstance(a, Loaded):
            raise Refused("positions read from memory")
        if not isinstance(a, (Quotient, Remainder)):
            return self.atoms[a]
        top, bottom = self.index(a.top), self.index(a.bottom)
        if nonnegative(a.top):
            return tirx.truncdiv(top, bottom) if isinstance(a, Quotient) else tirx.truncmod(top, bottom)
        return tirx.floordiv(top, bottom) if isinstance(a, Quotient) else tirx.floormod(top, bottom)

    def value(self, element: Expr) -> Value:
        if isinstance(element, Load):
            read = self.read(element)
            return tirx.NE(read, tirx.const(0, "uint8")) if element.dtype == "b8" else read
        if isinstance(element, Constant):
            return tirx.const(element.value, typed(element.dtype))
        if isinstance(element, IndexValue):
            return tirx.Cast(typed(element.dtype), self.index(element.index))
        return self._call(element)

    def stored(self, value: Value, dtype: str) -> Value:
        """A value as memory holds it."""
        return tirx.Cast("uint8", value) if dtype == "b8" else value

    def _call(self, call: Call) -> Value:
        if call.function == "where":
            return self._where(call)
        if call.function == "cast":
            return self._as(call.arguments[0], call.dtype)
        if call.function == "not":
            return tirx.Not(self._as(call.arguments[0], "b8"))
        dtype = common(*(a.dtype for a in call.arguments))
        operands = [self._as(a, dtype) for a in call.arguments]
        if call.function in COMPARISONS:
            return COMPARISONS[call.function](*operands)
        if call.function in LOGICAL:
            return (LOGICAL if dtype == "b8" else BITS)[call.function](*operands)
        return self._computed(call.function, operands, dtype)

    def _computed(self, function: str, operands: list[Value], dtype: str) -> Value:
        if function in PLAIN:
            return PLAIN[function](*operands)
        operands = [self.keep(o, typed(dtype)) for o in operands]
        if function in CHOICES:
            return CHOICES[function](*operands)
        if function not in MATH or dtype != "f32":
            raise Refused(f"the function {function} of {dtype}")
        return MATH[function](operands[0], self.keep)

    def _as(self, element: Expr, dtype: str) -> Value:
        value = self.value(element)
        if element.dtype == dtype:
            return value
        if dtype == "b8":
            return tirx.NE(value, tirx.const(0, typed(element.dtype)))
        return tirx.Cast(typed(dtype), value)

    def _where(self, call: Call) -> Value:
        """Both sides are computed, or only one where the other must not be read."""
        condition = self._as(call.arguments[0], "b8")
        if not guarded(call, self.buffers):
            return tirx.Select(condition, *(self._as(a, call.dtype) for a in call.arguments[1:]))
        if any(costly(a) for a in call.arguments[1:]):
            raise Refused("long expressions in a branch of `where`")
        outside, self._in_branch = self._in_branch, True
        sides = [self._as(a, call.dtype) for a in call.arguments[1:]]
        self._in_branch = outside
        return tirx.if_then_else(condition, *sides)


def guarded(element: Expr, buffers: Mapping[str, Buffer]) -> bool:
    """Whether a `where` keeps a read from going outside its buffer."""
    if not isinstance(element, Call):
        return False
    if element.function == "where":
        read = [load for side in element.arguments[1:] for load in loads(side)]
        if not all(within(load.offset, product(buffers[load.buffer].shape)) for load in read):
            return True
    return any(guarded(a, buffers) for a in element.arguments)


def costly(element: Expr) -> bool:
    if not isinstance(element, Call):
        return False
    return element.function in COSTLY or any(costly(a) for a in element.arguments)

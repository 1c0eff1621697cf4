"""Scalar expressions of a loop body: loads, constants, indices as values, and calls of named scalar functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from sylvester.codegen.index import Atom, Index

C_TYPES = {
    "f32": "float",
    "f64": "double",
    "i64": "int64_t",
    "i32": "int32_t",
    "i8": "int8_t",
    "u8": "uint8_t",
    "b8": "uint8_t",
    "bf16": "uint16_t",
}
BYTES = {"f32": 4, "f64": 8, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "b8": 1, "bf16": 2, "f16": 2, "fp8": 1}
FLOATS = ("f32", "f64")


@dataclass(frozen=True)
class Load:
    buffer: str
    offset: Index
    dtype: str

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        return self.offset.atoms

    @property
    def operations(self) -> int:
        return 1

    def substitute(self, values: Mapping[Atom, Index]) -> Load:
        return Load(self.buffer, self.offset.substitute(values), self.dtype)


@dataclass(frozen=True)
class Constant:
    value: float | int
    dtype: str
    atoms: frozenset[Atom] = frozenset()
    operations: int = 0

    def substitute(self, values: Mapping[Atom, Index]) -> Constant:
        return self


@dataclass(frozen=True)
class IndexValue:
    """An index as a number (what `arange` yields)."""

    index: Index
    dtype: str = "i64"
    operations: int = 0

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        return self.index.atoms

    def substitute(self, values: Mapping[Atom, Index]) -> IndexValue:
        return IndexValue(self.index.substitute(values), self.dtype)


@dataclass(frozen=True)
class Call:
    """A scalar function by its name in `FUNCTIONS`; `cast` and `where` are among them."""

    function: str
    arguments: tuple[Expr, ...]
    dtype: str

    @cached_property
    def atoms(self) -> frozenset[Atom]:
        return frozenset().union(*(a.atoms for a in self.arguments))

    @cached_property
    def operations(self) -> int:
        return COSTLY.get(self.function, 1) + sum(a.operations for a in self.arguments)

    def substitute(self, values: Mapping[Atom, Index]) -> Call:
        return Call(self.function, tuple(a.substitute(values) for a in self.arguments), self.dtype)


Expr = Load | Constant | IndexValue | Call

COSTLY = dict.fromkeys(
    (
        "exp",
        "log",
        "tanh",
        "erf",
        "sin",
        "cos",
        "pow",
        "sigmoid",
        "gelu",
        "gelu_tanh",
        "silu",
        "log1p",
        "expm1",
        "softplus",
    ),
    12,
)

FUNCTIONS: dict[str, str] = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})", "neg": "(-{0})",
    "eq": "({0} == {1})", "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})",
    "gt": "({0} > {1})", "ge": "({0} >= {1})",
    "and": "({0} & {1})", "or": "({0} | {1})", "xor": "({0} ^ {1})", "not": "(!{0})", "bitnot": "(~{0})",
    "where": "({0} ? {1} : {2})", "max": "({0} > {1} ? {0} : {1})", "min": "({0} < {1} ? {0} : {1})",
    "fmax": "sv_max({0}, {1})", "fmin": "sv_min({0}, {1})",
    "exp": "sv_exp({0})", "log": "sv_log({0})", "tanh": "sv_tanh({0})", "erf": "sv_erf({0})",
    "sigmoid": "sv_sigmoid({0})", "silu": "sv_silu({0})", "softplus": "sv_softplus({0})",
    "gelu": "sv_gelu({0})", "gelu_tanh": "sv_gelu_tanh({0})", "log1p": "sv_log1p({0})", "expm1": "sv_expm1({0})",
    "sqrt": "sqrtf({0})", "rsqrt": "sv_rsqrt({0})", "sin": "sinf({0})", "cos": "cosf({0})",
    "pow": "sv_pow({0}, {1})", "log2": "log2f({0})", "log10": "log10f({0})", "atan2": "atan2f({0}, {1})",
    "abs": "fabsf({0})", "floor": "floorf({0})", "ceil": "ceilf({0})", "round": "rintf({0})", "trunc": "truncf({0})",
    "iabs": "llabs({0})",
    "idiv": "sv_floor_div({0}, sv_divisor(t, {1}))", "imod": "sv_floor_mod({0}, sv_divisor(t, {1}))",
    "itrunc": "({0} / sv_divisor(t, {1}))", "rem": "({0} % sv_divisor(t, {1}))",
    "ipow": "sv_power({0}, {1})", "fmod": "fmodf({0}, {1})", "remainder": "sv_remainder({0}, {1})",
    "floor_quotient": "sv_floor_quotient({0}, {1})", "trunc_quotient": "truncf({0} / {1})",
    "isnan": "({0} != {0})", "shr": "({0} >> {1})",
    "bf16_bytes": "sv_bf16_bytes({0}, {1})", "f32_bytes": "sv_f32_bytes({0}, {1}, {2}, {3})",
}  # fmt: skip


def cast(value: Expr, dtype: str) -> Expr:
    """`value` as `dtype`; constants are converted now."""
    if value.dtype == dtype:
        return value
    if isinstance(value, Constant):
        number = float(value.value) if dtype in FLOATS else int(value.value != 0) if dtype == "b8" else int(value.value)
        return Constant(number, dtype)
    return Call("cast", (value,), dtype)


def common(*dtypes: str) -> str:
    """The dtype an operation on operands of these dtypes is computed in."""
    order = ("f64", "f32", "i64", "i32", "u8", "i8", "b8")
    return min(dtypes, key=order.index)


def c_number(constant: Constant) -> str:
    value = constant.value
    if constant.dtype not in FLOATS:
        return f"INT64_C({int(value)})" if abs(int(value)) > 2**31 - 1 else str(int(value))
    if value != value:
        return "NAN"
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    return f"{float(value)!r}f" if constant.dtype == "f32" else repr(float(value))


def c_expression(value: Expr, load: Callable[[Load], str], position: Callable[[Index], str]) -> str:
    """The expression in C; `load` renders memory reads, `position` index values."""
    if isinstance(value, Load):
        return load(value)
    if isinstance(value, Constant):
        return c_number(value)
    if isinstance(value, IndexValue):
        return f"(({C_TYPES[value.dtype]})({position(value.index)}))"
    arguments = [c_expression(a, load, position) for a in value.arguments]
    if value.function == "cast":
        source = value.arguments[0].dtype
        return (
            f"({arguments[0]} != 0)"
            if value.dtype == "b8" and source != "b8"
            else f"(({C_TYPES[value.dtype]}){arguments[0]})"
        )
    text = FUNCTIONS[value.function].format(*arguments)
    return f"(({C_TYPES[value.dtype]}){text})" if value.dtype in ("u8", "i8") else text  # C computes in int

"""Scalar and index expressions of a loop body as Triton text, for blocks of rows times elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sylvester.codegen.index import Atom, Index, Loaded, Quotient, Remainder, Var, nonnegative, product, within
from sylvester.codegen.lazy import Buffer
from sylvester.codegen.region import Refused
from sylvester.codegen.scalar import FLOATS, Call, Constant, Expr, IndexValue, Load, common

TYPES = {
    "f32": "float32", "f64": "float64", "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8", "b8": "int1",
}  # fmt: skip
"""Of values; memory holds truth values as bytes."""
POINTERS = {
    "f32": "*fp32", "f64": "*fp64", "i64": "*i64", "i32": "*i32", "i8": "*i8", "u8": "*u8", "b8": "*u8",
    "bf16": "*bf16", "f16": "*fp16", "fp8": "*fp8e4nv",
}  # fmt: skip
PLAIN = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})", "neg": "(-{0})",
    "eq": "({0} == {1})", "ne": "({0} != {1})", "lt": "({0} < {1})", "le": "({0} <= {1})",
    "gt": "({0} > {1})", "ge": "({0} >= {1})", "and": "({0} & {1})", "or": "({0} | {1})", "xor": "({0} ^ {1})",
    "bitnot": "(~{0})", "shr": "({0} >> {1})", "isnan": "({0} != {0})",
    "max": "tl.where({0} > {1}, {0}, {1})", "min": "tl.where({0} < {1}, {0}, {1})",
    "fmax": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "fmin": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "exp": "tl.exp({0})", "log": "tl.log({0})", "tanh": "tanh({0})", "erf": "tl.erf({0})",
    "sigmoid": "logistic({0})", "silu": "silu({0})", "softplus": "softplus({0})", "gelu": "gelu({0})",
    "gelu_tanh": "gelu_tanh({0})", "log1p": "log1p({0})", "expm1": "expm1({0})", "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "(1.0 / tl.sqrt_rn({0}))", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "pow": "power({0}, {1})",
    "ipow": "whole_power({0}, {1})", "atan2": "atan2({0}, {1})",
    "log2": "tl.log2({0})", "log10": "(tl.log2({0}) * 0.3010299956639812)", "abs": "tl.abs({0})",
    "iabs": "tl.abs({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})", "round": "rounded({0})",
    "trunc": "truncated({0})", "fmod": "fmod({0}, {1})", "remainder": "remainder({0}, {1})",
    "floor_quotient": "tl.floor({0} / {1})", "trunc_quotient": "truncated({0} / {1})",
}  # fmt: skip
DIVISIONS = {
    "idiv": "floor_div({0}, {1})", "imod": "floor_mod({0}, {1})", "itrunc": "({0} // {1})", "rem": "({0} % {1})",
}  # fmt: skip


@dataclass
class Scalars:
    """Translates expressions. A value has the shape [R, 1], [1, B] or [R, B], or is a number, as its atoms say.

    `rows` and `lanes` are the masks of the elements that exist, `full` is a zero of the whole shape.
    """

    buffers: dict[str, Buffer]
    lines: list[str] = field(default_factory=list)
    pointers: dict[str, str] = field(default_factory=dict)
    sizes: dict[Atom, str] = field(default_factory=dict)
    atoms: dict[Atom, str] = field(default_factory=dict)
    """Loop variables."""
    lanes: set[Var] = field(default_factory=set)
    """Those that differ between the columns of a block."""
    known: Callable[[Load], str | None] = lambda _: None
    """What holds the value of a read already."""
    depth: int = 1
    names: int = 0
    checks: bool = False
    """Whether something is reported in `error`."""
    _conditions: list[str] = field(default_factory=list)

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def pointer(self, buffer: str) -> str:
        if self.buffers[buffer].dtype not in POINTERS:
            raise Refused(f"{self.buffers[buffer].dtype} values")
        return self.pointers.setdefault(buffer, f"p{len(self.pointers)}")

    def index(self, value: Index) -> str:
        terms = []
        for monomial, coefficient in value.terms:
            factors = [self._atom(a) for a in monomial]
            terms.append(" * ".join(factors if factors and coefficient == 1 else [str(coefficient), *factors]))
        return " + ".join(terms) or "0"

    def _atom(self, a: Atom) -> str:
        if isinstance(a, Loaded):
            return self._loaded(a)
        if isinstance(a, Var):
            return self.atoms[a]
        if not isinstance(a, (Quotient, Remainder)):
            return self.sizes.setdefault(a, f"n{len(self.sizes)}")
        top, bottom = self.index(a.top), self.index(a.bottom)
        if nonnegative(a.top):
            return f"(({top}) {'//' if isinstance(a, Quotient) else '%'} ({bottom}))"
        return f"{'floor_div' if isinstance(a, Quotient) else 'floor_mod'}({top}, {bottom})"

    def _loaded(self, a: Loaded) -> str:
        """A position read from memory, reported where it is out of range."""
        text = self.value(a.expression)
        if a.limit is None:
            return f"({text})"
        self.checks = True
        return self.keep(
            f"checked({text} + full, {self.index(a.limit)}, {self._mask(IndexValue(_of(a)), whole=True)}, error)"
        )

    def keep(self, text: str) -> str:
        self.names += 1
        self.line(f"v{self.names} = {text}")
        return f"v{self.names}"

    def value(self, element: Expr) -> str:
        if isinstance(element, Load):
            return self._load(element)
        if isinstance(element, Constant):
            return number(element)
        if isinstance(element, IndexValue):
            return f"({self.index(element.index)}).to(tl.{TYPES[element.dtype]})" if element.atoms else _whole(element)
        if element.function == "where":
            return self._where(element)
        return self._call(element)

    def _load(self, load: Load) -> str:
        held = self.known(load)
        if held is not None:
            return held
        place = f"{self.pointer(load.buffer)} + ({self.index(load.offset)})"
        inside = within(load.offset, product(self.buffers[load.buffer].shape))
        text = self.keep(f"tl.load({place}{self._masked(load, guarded=not inside)})")
        return self.keep(f"{text} != 0") if load.dtype == "b8" else text

    def _masked(self, load: Load, *, guarded: bool) -> str:
        other = "0.0" if load.dtype == "fp8" else "0"  # whole numbers are not converted to float8
        if guarded and self._conditions:
            return f" + full, {self._mask(load, whole=True)}, other={other}"
        mask = self._mask(load)
        return f", {mask}, other={other}" if mask else ""

    def _mask(self, element: Expr, *, whole: bool = False) -> str:
        """Which elements of a value exist; `whole`: where all conditions around it hold."""
        loops = {a for a in element.atoms if isinstance(a, Var)}
        parts = ["rows"] if loops - self.lanes or whole else []
        parts += ["lanes"] if loops & self.lanes or whole else []
        return " & ".join([*parts, *(self._conditions if whole else [])])

    def _where(self, call: Call) -> str:
        """Both sides are computed; what a side reads outside of its buffer is not read where the other is taken."""
        condition = self.keep(self.as_type(call.arguments[0], "b8"))
        sides = []
        for side, holds in zip(call.arguments[1:], (condition, f"(~{condition})"), strict=True):
            with self._under(holds):
                sides.append(self.as_type(side, call.dtype))
        return self.keep(f"tl.where({condition}, {sides[0]}, {sides[1]})")

    @contextmanager
    def _under(self, condition: str) -> Iterator[None]:
        self._conditions.append(condition)
        yield
        self._conditions.pop()

    def _call(self, call: Call) -> str:
        if call.function == "cast":
            return self.as_type(call.arguments[0], call.dtype)
        if call.function == "not":
            return f"({self.as_type(call.arguments[0], 'b8')} == 0)"
        dtype = common(*(a.dtype for a in call.arguments))
        operands = [self.as_type(a, dtype) for a in call.arguments]
        if call.function in DIVISIONS:
            self.checks = True
            bottom = self.keep(f"divisor({operands[1]} + full, {self._mask(call, whole=True)}, error)")
            return self.keep(DIVISIONS[call.function].format(operands[0], bottom))
        if call.function not in PLAIN:
            raise Refused(f"the function {call.function}")
        return self.keep(PLAIN[call.function].format(*operands))

    def as_type(self, element: Expr, dtype: str) -> str:
        if isinstance(element, Constant):
            return number(Constant(element.value, dtype))
        text = self.value(element)
        if element.dtype == dtype:
            return text
        if dtype not in TYPES:
            raise Refused(f"{dtype} values")
        return f"({text} != 0)" if dtype == "b8" else f"({text}).to(tl.{TYPES[dtype]})"


def number(constant: Constant) -> str:
    """As a tensor of its type: plain numbers of Python would take the type of what they meet."""
    value = constant.value
    if constant.dtype not in FLOATS:
        return f"tl.full([1, 1], {int(value)}, tl.{TYPES[constant.dtype]})"
    text = repr(float(value)) if abs(float(value)) < float("inf") else f'float("{float(value)}")'
    return f"tl.full([1, 1], {text}, tl.{TYPES[constant.dtype]})"


def _whole(value: IndexValue) -> str:
    return f"tl.full([1, 1], {value.index.constant or 0}, tl.{TYPES[value.dtype]})"


def _of(a: Atom) -> Index:
    return Index((((a,), 1),))

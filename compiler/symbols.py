"""Symbolic sizes of a Program: list them with hints and ranges, write them as text, make them anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.utils._sympy.value_ranges import ValueRanges

from sylvester.compiler.cost import hint
from sylvester.compiler.errors import InvalidProgram
from sylvester.compiler.program import Program, value

LARGEST = 2**31
TRACED_LOWEST = 2
"""torch.export starts every symbol at 2; programs still serve size 1."""


@dataclass(frozen=True)
class Symbol:
    """A size that is open until run time: its example value and its range; `most` None is without bound."""

    name: str
    hint: int
    least: int = 1
    most: int | None = None


def symbols_of(program: Program) -> tuple[Symbol, ...]:
    """The symbols in the shapes of inputs and state, by name."""
    found: dict[str, Symbol] = {}
    for size in _sizes(program):
        environment = size.node.shape_env
        for symbol in size.node.expr.free_symbols:
            if symbol.name not in found:
                found[symbol.name] = _describe(symbol, size, environment)
    return tuple(found[name] for name in sorted(found))


def _sizes(program: Program) -> Iterator[torch.SymInt]:
    shapes: list[Iterable[Any]] = [slot.shape for slot in program.state.values()]
    for entry in program.entries.values():
        shapes += [value(n).shape for n in entry.placeholders() if isinstance(value(n), Tensor)]
    return (n for shape in shapes for n in shape if isinstance(n, torch.SymInt))


def _describe(symbol: sympy.Symbol, size: torch.SymInt, environment: ShapeEnv) -> Symbol:
    bounds = environment.var_to_range[symbol]
    least = 1 if bounds.lower <= TRACED_LOWEST else int(bounds.lower)
    most = int(bounds.upper) if bounds.upper.is_finite and bounds.upper < LARGEST else None
    return Symbol(symbol.name, hint(environment.create_symintnode(symbol, hint=None)), least, most)


def size_text(size: int | torch.SymInt) -> int | str:
    """A size as a number or an expression such as "2*s0 + 1"."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    number = size.node.maybe_as_int()
    if number is not None:
        return int(number)
    if any(not isinstance(part, sympy.Symbol | sympy.Integer | sympy.Add | sympy.Mul) for part in _parts(size)):
        raise InvalidProgram(f"the size {size} of an input or state is not linear in its symbols")
    return str(size.node.expr)


def _parts(size: torch.SymInt) -> Iterator[sympy.Basic]:
    return iter(sympy.preorder_traversal(size.node.expr))


def fresh_symbols(symbols: Iterable[Symbol]) -> tuple[FakeTensorMode, dict[str, torch.SymInt]]:
    """A new fake mode whose shape environment knows these symbols under their names."""
    environment = ShapeEnv(specialize_zero_one=True, duck_shape=False)
    made: dict[str, torch.SymInt] = {}
    for symbol in symbols:
        number = symbol.name.lstrip("s")
        if number.isdigit():
            # torch numbers symbols by a hash of their source; the stored number keeps names stable across a reload.
            environment._generate_unique_id = lambda _, number=number: int(number)  # type: ignore[method-assign, misc]
        bounds = ValueRanges(max(symbol.least, TRACED_LOWEST), sympy.oo if symbol.most is None else symbol.most)
        constraint = StrictMinMaxConstraint(warn_only=False, vr=bounds)
        source = ConstantSource(f"size_{symbol.name}")
        expression = environment.create_symbol(symbol.hint, source, DimDynamic.DYNAMIC, constraint)
        size = environment.create_symintnode(expression, hint=symbol.hint, source=source)
        made[symbol.name] = cast(torch.SymInt, size)
    return FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True), made

"""Dimensions such as "2*s0 + 1": evaluate them from symbol values, and solve them for one symbol."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache

from sylvester.compiler.errors import ArtefactError

Size = int | str

OPERATORS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
FUNCTIONS: dict[str, Callable[..., int]] = {"Max": max, "Min": min, "Mod": operator.mod, "FloorDiv": operator.floordiv}


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """The number a dimension stands for."""
    if isinstance(size, int):
        return size
    return values[size] if size in values else _eval(_tree(size), values, size)


@cache
def symbols(size: Size) -> frozenset[str]:
    """Names of the symbols a dimension depends on."""
    if isinstance(size, int):
        return frozenset()
    called = {n.func.id for n in ast.walk(_tree(size)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return frozenset(n.id for n in ast.walk(_tree(size)) if isinstance(n, ast.Name)) - called


def solve(size: str, name: str, found: int) -> int | None:
    """The value of `name` that makes a dimension linear in it equal `found`; None when there is none."""
    zero = evaluate(size, {name: 0})
    slope = evaluate(size, {name: 1}) - zero
    if slope == 0 or (found - zero) % slope:
        return None
    value = (found - zero) // slope
    return value if evaluate(size, {name: value}) == found else None


@cache
def _tree(size: str) -> ast.expr:
    try:
        return ast.parse(size, mode="eval").body
    except SyntaxError as error:
        raise ArtefactError(
            f"{size!r} is not a dimension", hint="the manifest was edited; compile the model again"
        ) from error


def _eval(node: ast.expr, values: Mapping[str, int], text: str) -> int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_eval(operand, values, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_eval(left, values, text), _eval(right, values, text))
        case ast.Call(func=ast.Name(id=name), args=args) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_eval(a, values, text) for a in args))
        case _:
            raise ArtefactError(f"cannot evaluate the dimension {text!r} with {dict(values)}")

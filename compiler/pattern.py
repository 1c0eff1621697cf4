"""The left side of a rule as a term: an ordinary torch function traced to the normal form of models."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sylvester.compiler.forms import COMMUTATIVE, form
from sylvester.compiler.ops import LIBRARY, NAMESPACE, Example, sample

LIBRARY.define("either(Tensor[] forms) -> Tensor")
LIBRARY.impl("either", lambda forms: forms[0], "CompositeImplicitAutograd")
EITHER = getattr(torch.ops, NAMESPACE).either.default


def either(*forms: Tensor) -> Tensor:
    """In a `before`: any of these spellings. A parameter that occurs only in others is None in the match."""
    result: Tensor = EITHER(list(forms))
    return result


def optional(present: Tensor, absent: Tensor) -> Tensor:
    """In a `before`: a part that may be missing, such as a scale or a bias."""
    return either(present, absent)


COMMON = {-1, 0, 1}


@dataclass(frozen=True)
class Var:
    """Binds a node that holds a tensor."""

    name: str


@dataclass(frozen=True)
class Literal:
    """Binds a number or string written in the graph."""

    name: str
    kind: type


@dataclass(frozen=True, eq=False)
class Call:
    """A call of `target`; the same object twice must match the same node."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Either:
    forms: tuple[Any, ...]


@dataclass(frozen=True)
class Pattern:
    """`size` counts the calls of the smallest spelling that tell it from other arithmetic."""

    root: Any
    names: tuple[str, ...]
    size: int
    depth: int

    def targets(self) -> set[Any]:
        """Ops that can stand at the root."""
        return {call.target for call in _tops(self.root)}


def compile_pattern(before: Callable[..., Tensor], example: Example) -> Pattern:
    """Trace `before` on its example. A tensor parameter becomes a `Var`; a number or string is found by its value."""
    names = tuple(inspect.signature(before).parameters)
    graph = trace(before, example)
    bound = dict(zip(names, example, strict=True))
    if common := [name for name, x in bound.items() if type(x) is int and x in COMMON]:
        raise ValueError(f"the examples of {common} are found in any graph; use integers other than {sorted(COMMON)}")
    literals = {(type(value), value): name for name, value in bound.items() if _is_literal(value)}
    tensors = [name for name, value in zip(names, sample(example), strict=True) if isinstance(value, Tensor)]
    terms: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), map(Var, tensors), strict=True))
    for node in graph.nodes:
        if node.op == "call_function":
            terms[node] = _term(node, terms, literals)
    (output,) = graph.output_node().all_input_nodes
    root = terms[output]
    _require_used(root, before, set(tensors) | set(literals.values()))
    return Pattern(root, names, _size(root), _depth(root))


def trace(function: Callable[..., Tensor], example: Example) -> fx.Graph:
    """The graph of a function over the tensors of its example; other arguments are constants."""
    arguments = sample(example)
    tensors = [x for x in arguments if isinstance(x, Tensor)]

    def closed(*given: Tensor) -> Tensor:
        supply = iter(given)
        return function(*(next(supply) if isinstance(x, Tensor) else x for x in arguments))

    with torch.no_grad():
        return make_fx(closed, pre_dispatch=True, tracing_mode="fake")(*tensors).graph


def _is_literal(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _term(node: fx.Node, terms: dict[fx.Node, Any], literals: dict[tuple[type, Any], str]) -> Any:
    if node.target is EITHER:
        return Either(tuple(terms[form] for form in node.args[0]))  # type: ignore[index, union-attr]

    def operand(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return terms[x]
        if isinstance(x, (list, tuple)):
            return tuple(operand(y) for y in x)
        key = (type(x), x) if _is_literal(x) else None
        return Literal(literals[key], type(x)) if key in literals else x

    target, args = form(node)
    return Call(target, tuple(operand(x) for x in args))


def _tops(term: Any) -> Iterator[Call]:
    if isinstance(term, Either):
        for form_ in term.forms:
            yield from _tops(form_)
    elif isinstance(term, Call):
        yield term


def _size(term: Any) -> int:
    if isinstance(term, Either):
        return min(_size(form_) for form_ in term.forms)
    if isinstance(term, tuple):
        return sum(_size(x) for x in term)
    return telling(term) + _size(term.args) if isinstance(term, Call) else 0


def _depth(term: Any) -> int:
    """Calls on the longest way from the root to a parameter."""
    below = max((_depth(child) for child in _children(term)), default=0)
    return below + 1 if isinstance(term, Call) else below


def telling(call: Call) -> int:
    """Sums and products are everywhere: they say nothing about how near a match is."""
    return 0 if call.target in COMMUTATIVE else 1


def _require_used(root: Any, before: Callable[..., Tensor], names: set[str]) -> None:
    if missing := names - set(_names(root)):
        where = getattr(before, "__qualname__", before)
        raise ValueError(f"{where}: {sorted(missing)} cannot be found in the traced pattern; use them as they are")


def _names(term: Any) -> Iterator[str]:
    if isinstance(term, (Var, Literal)):
        yield term.name
    for child in _children(term):
        yield from _names(child)


def _children(term: Any) -> tuple[Any, ...]:
    if isinstance(term, Either):
        return term.forms
    if isinstance(term, Call):
        return term.args
    return term if isinstance(term, tuple) else ()


def pattern_of(rule: Any) -> Pattern:
    """The pattern of a rule class, traced on first use."""
    return _pattern_of(rule)


@functools.cache
def _pattern_of(rule: Any) -> Pattern:
    return compile_pattern(rule.before, rule.example)

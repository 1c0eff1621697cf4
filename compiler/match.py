"""Match a term against a graph by backtracking: commutative operands, alternative spellings, ops looked through."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from sylvester.compiler.changes import Refusal
from sylvester.compiler.forms import COMMUTATIVE, Forms, target_of
from sylvester.compiler.pattern import Call, Either, Literal, Pattern, Var, telling
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import value

CLOSE = 1e-6  # relative; the same constant is often written with different precision


@dataclass(frozen=True)
class Match:
    """`bound` maps parameters to nodes or literals, None for a part that is absent; `body` holds the nodes that go."""

    root: fx.Node
    bound: Mapping[str, Any]
    body: frozenset[fx.Node]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def fact(self, name: str) -> Tensor:
        """Shape and dtype of the node bound to a parameter."""
        fact: Tensor = value(self.bound[name])
        return fact


@dataclass
class Near:
    """The attempt that got furthest: how many telling calls matched, and what was expected where it stopped."""

    matched: int = -1
    expected: object = ""
    found: object = None

    def stop(self, state: State, expected: object, found: object) -> None:
        if state.telling > self.matched:
            self.matched, self.expected, self.found = state.telling, expected, found

    def refusal(self) -> Refusal:
        wanted = self.expected if isinstance(self.expected, str) else f"expected {op_name(self.expected)}"
        at = self.found if isinstance(self.found, fx.Node) else None
        return Refusal(f"{wanted}, found {_kind(self.found)}", at)


@dataclass(frozen=True)
class State:
    """Bindings so far; extended by copying, so that a failed branch leaves nothing behind."""

    bound: dict[str, Any] = field(default_factory=dict)
    calls: dict[Call, fx.Node] = field(default_factory=dict)
    telling: int = 0

    def bind(self, name: str, x: Any) -> State:
        return State({**self.bound, name: x}, self.calls, self.telling)

    def enter(self, call: Call, node: fx.Node) -> State:
        return State(self.bound, {**self.calls, call: node}, self.telling + telling(call))


class Matcher:
    """Matches one pattern; `transparent` targets are looked through wherever another op or a tensor is expected.

    Inner values must not be used outside the pattern unless they are `free`.
    """

    def __init__(self, pattern: Pattern, transparent: tuple[Any, ...] = (), free: bool = False) -> None:
        self.pattern = pattern
        self.transparent = transparent
        self.free = free
        self.near = Near()
        self.forms = Forms()

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """The first match at `node`; a refusal for a near miss; None when the node is something else."""
        self.near = Near()
        outside = None
        for state in self._term(self.pattern.root, node, State()):
            outside = None if self.free else _used_outside(node, state)
            if outside is None:
                bound = {name: state.bound.get(name) for name in self.pattern.names}
                return Match(node, bound, frozenset(state.calls.values()))
        if outside is not None:
            return Refusal("an inner value is also used outside the pattern", outside)
        return self.near.refusal() if 2 * self.near.matched > self.pattern.size else None

    def _term(self, term: Any, x: Any, state: State) -> Iterator[State]:
        if isinstance(term, Either):
            for spelling in term.forms:
                yield from self._term(spelling, x, state)
        elif isinstance(term, Call):
            yield from self._call(term, x, state)
        elif isinstance(term, Var):
            yield from self._var(term, x, state)
        elif isinstance(term, tuple):
            yield from self._sequence(term, x, state)
        elif isinstance(term, Literal):
            yield from self._literal(term, x, state)
        elif term is x or _same_constant(term, x) or (self.transparent and _are_dtypes(term, x)):
            yield state
        else:
            self.near.stop(state, f"expected the constant {term}", x)

    def _call(self, term: Call, x: Any, state: State) -> Iterator[State]:
        if not isinstance(x, fx.Node):
            return
        if term in state.calls:
            if state.calls[term] is x:
                yield state
            return
        if target_of(x) is term.target:
            yield from self._operands(term, self.forms[x][1], state.enter(term, x))
        elif self._seen_through(x):
            yield from self._call(term, x.args[0], state)
        else:
            self.near.stop(state, term.target, x)

    def _seen_through(self, x: fx.Node) -> bool:
        """A transparent op between floats; a cast from or to integers changes what a value is."""
        return x.target in self.transparent and all(value(n).is_floating_point() for n in (x, cast(fx.Node, x.args[0])))

    def _operands(self, term: Call, args: tuple[Any, ...], state: State) -> Iterator[State]:
        yield from self._sequence(term.args, args, state)
        if term.target in COMMUTATIVE:
            yield from self._sequence(term.args, (args[1], args[0], *args[2:]), state)

    def _sequence(self, terms: tuple[Any, ...], xs: Any, state: State) -> Iterator[State]:
        if not isinstance(xs, (list, tuple)) or len(xs) != len(terms):
            self.near.stop(state, f"expected {len(terms)} arguments", xs)
        elif not terms:
            yield state
        else:
            for after_first in self._term(terms[0], xs[0], state):
                yield from self._sequence(terms[1:], xs[1:], after_first)

    def _var(self, term: Var, x: Any, state: State) -> Iterator[State]:
        while isinstance(x, fx.Node) and self._seen_through(x):
            x = x.args[0]
        if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor):
            self.near.stop(state, f"expected a tensor for {term.name}", x)
        elif state.bound.get(term.name, x) is not x:
            self.near.stop(state, f"{term.name} stands for two values", x)
        else:
            yield state.bind(term.name, x)

    def _literal(self, term: Literal, x: Any, state: State) -> Iterator[State]:
        kinds = (int, float) if term.kind is float else (term.kind,)
        if type(x) not in kinds:
            self.near.stop(state, f"expected a literal for {term.name}", x)
        elif not _same_constant(state.bound.get(term.name, x), x):
            self.near.stop(state, f"{term.name} stands for two values", x)
        else:
            yield state.bind(term.name, x)


def _same_constant(expected: Any, found: Any) -> bool:
    if isinstance(found, (fx.Node, list, tuple)) or isinstance(expected, bool) != isinstance(found, bool):
        return False
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(expected, found, rel_tol=CLOSE)
    return bool(expected == found)


def _are_dtypes(term: Any, x: Any) -> bool:
    """Two type arguments, of which one may be left to its default."""
    kinds = {type(term), type(x)}
    return torch.dtype in kinds and kinds <= {torch.dtype, type(None)}


def _used_outside(root: fx.Node, state: State) -> fx.Node | None:
    """An inner node that something else needs as well."""
    body = set(state.calls.values())
    inside = body | {u for n in body for u in _seen_through(n, body)}
    return next((n for n in body if n is not root and any(u not in inside for u in n.users)), None)


def _seen_through(node: fx.Node, body: set[fx.Node]) -> Iterator[fx.Node]:
    """Users of `node` between it and the body, such as casts that the match looked through."""
    for user in node.users:
        if user not in body and user.users and all(u in body for u in user.users):
            yield user


def _kind(x: Any) -> str:
    """What was found, without node names, so that equal reasons are equal."""
    if not isinstance(x, fx.Node):
        return f"{len(x)} arguments" if isinstance(x, (list, tuple)) else repr(x)
    return op_name(x.target) if x.op == "call_function" else f"a {x.op}"

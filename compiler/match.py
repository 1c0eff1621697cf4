"""Match a term against a graph by backtracking: commutative operands, alternative spellings, ops looked through."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler.changes import Refusal
from sylvester.compiler.forms import COMMUTATIVE, Form, form
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
    """The attempt that got furthest: how many telling calls matched, and what stopped it."""

    matched: int = 0
    refusal: Refusal | None = None

    def stop(self, state: State, reason: str, at: object) -> None:
        matched = sum(map(telling, state.calls))
        if matched > self.matched or self.refusal is None:
            self.matched = matched
            self.refusal = Refusal(reason, at if isinstance(at, fx.Node) else None)


@dataclass(frozen=True)
class State:
    """Bindings so far; extended by copying, so that a failed branch leaves nothing behind."""

    bound: dict[str, Any] = field(default_factory=dict)
    calls: dict[Call, fx.Node] = field(default_factory=dict)

    def bind(self, name: str, x: Any) -> State:
        return State({**self.bound, name: x}, self.calls)

    def enter(self, call: Call, node: fx.Node) -> State:
        return State(self.bound, {**self.calls, call: node})


class Matcher:
    """Matches one pattern; `transparent` targets are looked through wherever another op or a tensor is expected."""

    def __init__(self, pattern: Pattern, transparent: tuple[Any, ...] = ()) -> None:
        self.pattern = pattern
        self.transparent = transparent
        self.near = Near()
        self.forms: dict[fx.Node, Form] = {}

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """The first match at `node`; a refusal for a near miss; None when the node is something else."""
        self.near, self.forms = Near(), {}
        for state in self._term(self.pattern.root, node, State()):
            if outside := _used_outside(node, state):
                self.near.stop(state, "an inner value is also used outside the pattern", outside)
                continue
            bound = {name: state.bound.get(name) for name in self.pattern.names}
            return Match(node, bound, frozenset(state.calls.values()))
        return self.near.refusal if 2 * self.near.matched > self.pattern.size else None

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
        elif term is x or _same_constant(term, x) or (self.transparent and isinstance(term, torch.dtype | None)):
            yield state
        else:
            self.near.stop(state, f"expected the constant {term}, found {_kind(x)}", x)

    def _call(self, term: Call, x: Any, state: State) -> Iterator[State]:
        if not isinstance(x, fx.Node):
            return
        if term in state.calls:
            if state.calls[term] is x:
                yield state
            return
        if x.op == "call_function" and self._form(x)[0] is term.target:
            yield from self._operands(term, self._form(x)[1], state.enter(term, x))
        elif x.target in self.transparent:
            yield from self._call(term, x.args[0], state)
        else:
            self.near.stop(state, f"expected {op_name(term.target)}, found {_kind(x)}", x)

    def _operands(self, term: Call, args: tuple[Any, ...], state: State) -> Iterator[State]:
        yield from self._sequence(term.args, args, state)
        if term.target in COMMUTATIVE:
            yield from self._sequence(term.args, (args[1], args[0], *args[2:]), state)

    def _sequence(self, terms: tuple[Any, ...], xs: Any, state: State) -> Iterator[State]:
        if not isinstance(xs, (list, tuple)) or len(xs) != len(terms):
            self.near.stop(state, f"expected {len(terms)} arguments, found {_kind(xs)}", xs)
        elif not terms:
            yield state
        else:
            for after_first in self._term(terms[0], xs[0], state):
                yield from self._sequence(terms[1:], xs[1:], after_first)

    def _var(self, term: Var, x: Any, state: State) -> Iterator[State]:
        while isinstance(x, fx.Node) and x.target in self.transparent:
            x = x.args[0]
        if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor):
            self.near.stop(state, f"expected a tensor for {term.name}, found {_kind(x)}", x)
        elif state.bound.get(term.name, x) is not x:
            self.near.stop(state, f"{term.name} stands for two different values", x)
        else:
            yield state.bind(term.name, x)

    def _literal(self, term: Literal, x: Any, state: State) -> Iterator[State]:
        kinds = (int, float) if term.kind is float else (term.kind,)
        if type(x) not in kinds:
            self.near.stop(state, f"expected a literal for {term.name}, found {_kind(x)}", x)
        elif not _same_constant(state.bound.get(term.name, x), x):
            self.near.stop(state, f"{term.name} stands for two different values", x)
        else:
            yield state.bind(term.name, x)

    def _form(self, node: fx.Node) -> Form:
        if node not in self.forms:
            self.forms[node] = form(node)
        return self.forms[node]


def _same_constant(expected: Any, found: Any) -> bool:
    if isinstance(found, (fx.Node, list, tuple)) or isinstance(expected, bool) != isinstance(found, bool):
        return False
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(expected, found, rel_tol=CLOSE)
    return bool(expected == found)


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

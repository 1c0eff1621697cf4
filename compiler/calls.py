"""Calls as terms: what a node computes, written over other nodes, with arguments in one normal form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from sylvester.compiler.program import ORIGIN, Entry, fake_empty, value

PLACEMENT = ("layout", "device", "pin_memory")
ABSENT = object()


@dataclass(frozen=True)
class Call:
    """A term: `args` may hold nodes, literals and further calls. A given `fact` saves running the op for it."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fact: Tensor | None = None


Result = fx.Node | Call | int | None
"""What a rule answers: an equal node, an equal call, the number a size is, or nothing to do."""

Rule = Callable[[fx.Node], Result]


@dataclass(frozen=True)
class Parameter:
    """One argument of an op; `default` is ABSENT when it must be given."""

    name: str
    default: Any
    keyword_only: bool


@functools.cache
def parameters(target: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The declared arguments of a torch op; empty for Python functions."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    return tuple(
        Parameter(a.name, a.default_value if a.has_default_value() else ABSENT, a.kwarg_only) for a in schema.arguments
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an op call by name, defaults filled in."""
    declared = parameters(node.target)
    given = {p.name: p.default for p in declared if p.default is not ABSENT}
    return {**given, **{p.name: a for p, a in zip(declared, node.args, strict=False)}, **node.kwargs}


def normal(call: Call) -> Call:
    """Positional where the op allows it, without defaults at the end, without where to place the result on the host."""
    declared = parameters(call.target)
    if not declared:
        return call
    args, kwargs = list(call.args), dict(call.kwargs)
    ordered = [p for p in declared if not p.keyword_only]
    named = [i for i, p in enumerate(ordered) if p.name in kwargs]
    for p in ordered[len(args) : max(named, default=-1) + 1]:
        args.append(kwargs.pop(p.name, p.default))
    while args and _is_default(ordered[len(args) - 1], args[-1]):
        args.pop()
    keep = {p.name: kwargs[p.name] for p in declared if p.name in kwargs and not _implied(p, kwargs[p.name])}
    return Call(call.target, tuple(args), keep)


def _is_default(parameter: Parameter, found: Any) -> bool:
    return type(found) is type(parameter.default) and bool(found == parameter.default)


def _implied(parameter: Parameter, found: Any) -> bool:
    placement = parameter.name in PLACEMENT and found in (torch.strided, torch.device("cpu"), False)
    return placement or _is_default(parameter, found)


def emit(entry: Entry, term: Any, before: fx.Node, made_by: str) -> Any:
    """Insert the calls inside `term`, each with its fact; returns the node, list or literal that stands for it."""
    if isinstance(term, Call):
        args = emit(entry, term.args, before, made_by)
        kwargs = {k: emit(entry, v, before, made_by) for k, v in term.kwargs.items()}
        if term.fact is None:
            return entry.emit(term.target, *args, before=before, made_by=made_by, **kwargs)
        with entry.graph.inserting_before(before):
            node = entry.graph.call_function(term.target, args, kwargs)
        made = {"made_by": (*before.meta.get("made_by", ()), made_by), "val": term.fact}
        node.meta = {k: before.meta[k] for k in ORIGIN if k in before.meta} | made
        return node
    if isinstance(term, (list, tuple)):
        return type(term)(emit(entry, t, before, made_by) for t in term) if _has_call(term) else term
    return term


def _has_call(term: Any) -> bool:
    if isinstance(term, (list, tuple)):
        return any(_has_call(t) for t in term)
    return isinstance(term, Call)


def retarget(entry: Entry, node: fx.Node, call: Call, made_by: str) -> None:
    """Let `node` compute its value by `call`: users and tensor fact stay."""
    args = emit(entry, tuple(call.args), node, made_by)
    node.target, node.args, node.kwargs = call.target, args, dict(call.kwargs)
    if made_by not in node.meta.get("made_by", ()):
        node.meta["made_by"] = (*node.meta.get("made_by", ()), made_by)


def known(size: int | torch.SymInt) -> int | torch.SymInt:
    """A size as a number where it is one."""
    return int(size.node.expr) if isinstance(size, torch.SymInt) and size.node.expr.is_number else size


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal at every size: the same number or the same expression."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return a is b or bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and a == b


def same_sizes(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def tensor(node: object) -> Tensor | None:
    """The tensor fact of an argument, or None when it is a literal, a size or a tuple."""
    fact = node.meta.get("val") if isinstance(node, fx.Node) else None
    return fact if isinstance(fact, Tensor) else None


def same_fact(a: object, b: object) -> bool:
    """Both are tensors of one dtype and one shape."""
    x, y = tensor(a), tensor(b)
    return x is not None and y is not None and x.dtype == y.dtype and same_sizes(x.shape, y.shape)


def size_of(node: fx.Node, dim: int) -> int | Call:
    """A size as an argument: a number, or the call that reads it."""
    size = value(node).shape[dim]
    return Call(torch.ops.aten.sym_size.int, (node, dim)) if isinstance(size, torch.SymInt) else size


def resized(fact: Tensor, sizes: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """The fact with other sizes or another type; itself when they are the same."""
    if fact.dtype == dtype and same_sizes(tuple(fact.shape), tuple(sizes)):
        return fact
    return fake_empty(cast(FakeTensor, fact).fake_mode, sizes, dtype)

"""An entry's graph -> a plan: every op becomes a lazy tensor, loop steps, or a call of a kernel family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sylvester.codegen.index import Index, Size, index
from sylvester.codegen.lazy import (
    Buffer,
    BufferKind,
    Extern,
    Indices,
    Lazy,
    Plan,
    Pointer,
    Reduce,
    ReduceKind,
    Shape,
    Store,
    of_buffer,
)
from sylvester.codegen.scalar import Constant, Expr, IndexValue, Load
from sylvester.codegen.shapes import dtype_of, shape_of, size
from sylvester.compiler import ops  # noqa: F401  (registers the dialect, which lowerings name)
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, Program, binding, is_weight, value

CHEAP_OPERATIONS = 2
MAX_OPERATIONS = 80


@dataclass(frozen=True)
class Fact:
    """Shape and dtype of the result being lowered."""

    shape: Shape
    dtype: str


Lower = Callable[..., Any]
Lowerer = TypeVar("Lowerer", bound=Lower)
LOWERINGS: dict[Any, Lower] = {}


def lowers(*targets: Any) -> Callable[[Lowerer], Lowerer]:
    """Register `f(lowering, fact, *args, **kwargs)` for ops; tensors arrive as Lazy, symbolic sizes as Index."""

    def register(function: Lowerer) -> Lowerer:
        LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register


class Lowering:
    """Builds the plan of one entry."""

    def __init__(self, name: str, program: Program, entry: Entry) -> None:
        self.program, self.entry = program, entry
        self.plan = Plan(name, _sizes(entry))
        self.values: dict[fx.Node, Any] = {}
        self.weights: dict[str, str] = {}
        self._names = itertools.count()

    def run(self) -> Plan:
        require_lowerings([self.entry])
        for node in self.entry.placeholders():
            self._placeholder(node)
        for node in self.entry.calls():
            if not isinstance(value(node), (int, torch.SymInt)):
                self.values[node] = self._call(node)
        self._outputs()
        return self.plan

    def _placeholder(self, node: fx.Node) -> None:
        bound, fact = binding(node), value(node)
        buffer = self.buffer(bound.kind, shape_of(fact), dtype_of(fact.dtype), bound.key, packed=_is_packed(node))
        self.values[node] = of_buffer(buffer)

    def _call(self, node: fx.Node) -> Any:
        args = map_aggregate(node.args, self._argument)
        kwargs = map_aggregate(dict(node.kwargs), self._argument)
        fact = value(node)
        described = Fact(shape_of(fact), dtype_of(fact.dtype)) if isinstance(fact, Tensor) else fact
        result = LOWERINGS[node.target](self, described, *args, **kwargs)
        if isinstance(result, Lazy) and self._worth_storing(node, result):
            return self.realize(result)
        return result

    def _argument(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return size(argument) if isinstance(argument, torch.SymInt) else argument
        fact = value(argument)
        return size(fact) if isinstance(fact, (int, torch.SymInt)) else self.values[argument]

    def _worth_storing(self, node: fx.Node, result: Lazy) -> bool:
        """Shared work is stored unless it is next to nothing; a long expression is stored to keep code small."""
        readers = [u for u in node.users if not isinstance(u.meta.get("val"), (int, torch.SymInt))]
        operations = result.operations
        return operations > MAX_OPERATIONS or (len(readers) > 1 and operations > CHEAP_OPERATIONS)

    def _outputs(self) -> None:
        for output, node in zip(self.entry.outputs, self.entry.results(), strict=True):
            result: Lazy = self.values[node]
            if output.kind == "state":
                continue
            buffer = self.buffer("output", result.shape, result.dtype, output.name)
            self.plan.steps.append(Store(buffer.name, result.shape, result.dtype, result.load, buffer.offset))

    def buffer(self, kind: BufferKind, shape: Shape, dtype: str, key: str = "", *, packed: bool = False) -> Buffer:
        made = Buffer(f"b{next(self._names)}", shape, dtype, kind, key, packed)
        self.plan.buffers[made.name] = made
        return made

    def realize(self, tensor: Lazy) -> Lazy:
        """The tensor in memory: itself when it is a whole buffer already, else a new store step.

        Dimensions along which the value does not change are stored once.
        """
        if self.whole(tensor):
            return tensor
        indices, element = tensor.probe
        varying = [
            n if i.variables <= element_variables(element) else index(1)
            for i, n in zip(indices, tensor.shape, strict=True)
        ]
        buffer = self.buffer("arena", tuple(varying), tensor.dtype)
        self.plan.steps.append(Store(buffer.name, buffer.shape, tensor.dtype, tensor.load, buffer.offset))
        stored = of_buffer(buffer)
        return Lazy(tensor.shape, tensor.dtype, lambda i: stored.at(i))

    def whole(self, tensor: Lazy) -> Buffer | None:
        """The buffer that `tensor` is a plain row-major reading of, or None."""
        indices, element = tensor.probe
        if not isinstance(element, Load):
            return None
        buffer = self.plan.buffers[element.buffer]
        contiguous = not buffer.packed and element.offset == Buffer("", tensor.shape, "", "arena").offset(indices)
        return buffer if contiguous else None

    def contiguous(self, tensor: Lazy) -> Buffer:
        """A buffer that holds exactly `tensor`, row-major."""
        found = self.whole(tensor)
        if found is not None:
            return found
        buffer = self.buffer("arena", tensor.shape, tensor.dtype)
        self.plan.steps.append(Store(buffer.name, tensor.shape, tensor.dtype, tensor.load, buffer.offset))
        return buffer

    def reduce(
        self, kind: ReduceKind, outer: Shape, inner: Shape, dtype: str, make: Callable[[Indices, Indices], Expr]
    ) -> Lazy:
        """A reduction step; the result has shape `outer`."""
        buffer = self.buffer("arena", outer, dtype)
        self.plan.steps.append(Reduce(buffer.name, outer, inner, dtype, kind, make))
        return of_buffer(buffer)

    def extern(self, step: Extern) -> None:
        """Append a kernel call; kernels compute in float32, other operands are `Unsupported`."""
        for pointer in (a for a in step.arguments if isinstance(a, Pointer)):
            found = self.plan.buffers[pointer.buffer].dtype
            if pointer.dtype == "f32" != found:
                raise Unsupported(
                    f"{step.function} computes in float32, found an operand of dtype {found}",
                    hint="convert the operands with `.float()` first",
                )
        self.plan.steps.append(step)


def element_variables(element: Expr) -> frozenset[Any]:
    return frozenset(element.atoms)


def _sizes(entry: Entry) -> tuple[Size, ...]:
    """The symbols of the entry's inputs and state, by name."""
    found: set[Size] = set()
    for node in entry.placeholders():
        for n in shape_of(value(node)):
            found |= {a for a in n.atoms if isinstance(a, Size)}
    return tuple(sorted(found, key=lambda s: s.name))


def _is_packed(node: fx.Node) -> bool:
    """Whether a placeholder is a weight that some linear layer multiplies by; its other readers read the panels."""
    linear = torch.ops.aten.linear.default
    return is_weight(node) and any(user.target is linear and user.args[1] is node for user in node.users)


def require_lowerings(entries: Iterable[Entry]) -> None:
    """Refuse at compile time, with every op that has no lowering and where it came from."""
    missing: dict[str, fx.Node] = {}
    for entry in entries:
        for node in entry.calls():
            if node.target not in LOWERINGS and not isinstance(value(node), (int, torch.SymInt)):
                missing.setdefault(op_name(node.target), node)
    if missing:
        first = next(iter(missing.values()))
        raise Unsupported(
            f"cpu has no lowering for {sorted(missing)}",
            at=first,
            hint="rewrite the op, or run with target='reference'",
        )


def element(operand: Lazy | Index | float | int, indices: Sequence[Index], dtype: str) -> Expr:
    """The scalar of an operand at broadcast indices: tensors are read, numbers become constants."""
    if isinstance(operand, Lazy):
        return operand.at(indices)
    if isinstance(operand, Index):
        return IndexValue(operand)
    return Constant(operand, dtype)

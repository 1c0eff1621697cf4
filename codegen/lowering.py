"""An entry's graph -> a plan: every op becomes a lazy tensor, loop steps, or a call of a kernel family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sylvester.codegen.branches import Opened, branches, calls_before, close_branch, open_branch
from sylvester.codegen.index import Index, Size, index
from sylvester.codegen.layout import Layout, plain
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
from sylvester.codegen.linear_groups import LinearGroup
from sylvester.codegen.scalar import Constant, Expr, IndexValue, Load
from sylvester.codegen.shapes import DTYPES, SHORT, dtype_of, shape_of, size
from sylvester.compiler import ops  # noqa: F401  (registers the dialect, which lowerings name)
from sylvester.compiler.errors import Unsupported, module_path
from sylvester.compiler.printing import op_name
from sylvester.compiler.program import Entry, Program, binding, value

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
TAKES_BF16: set[Any] = set()
"""Ops whose lowerings read or write bfloat16, which C code holds as its bits."""


def lowers(*targets: Any, bf16: bool = False) -> Callable[[Lowerer], Lowerer]:
    """Register `f(lowering, fact, *args, **kwargs)` for ops; tensors arrive as Lazy, symbolic sizes as Index.

    `bf16` says that the function takes bfloat16 tensors.
    """

    def register(function: Lowerer) -> Lowerer:
        LOWERINGS.update(dict.fromkeys(targets, function))
        TAKES_BF16.update(targets if bf16 else ())
        return function

    return register


@dataclass(frozen=True)
class StoredLayers:
    """The linear layers of an entry whose weights are stored, which run in groups."""

    groups: Mapping[fx.Node, LinearGroup]
    layouts: Mapping[str, tuple[Layout, Shape, str]]
    """How a weight is stored that other ops read as well, with the shape and dtype of its buffer."""
    lower: Callable[[Lowering, LinearGroup], dict[fx.Node, Lazy]]


class Lowering:
    """Builds the plan of one entry. `target` and `table`: what it is for, and how ops are lowered there."""

    target: ClassVar[str] = "cpu"
    table: ClassVar[Mapping[Any, Lower]] = LOWERINGS
    takes_bf16: ClassVar[Collection[Any]] = TAKES_BF16
    takes_short: ClassVar[Collection[Any]] = ()
    """Ops whose lowerings read float16 or float8."""
    dtypes: ClassVar[Mapping[torch.dtype, str]] = DTYPES

    def __init__(self, name: str, program: Program, entry: Entry, layers: StoredLayers) -> None:
        self.program, self.entry, self.layers = program, entry, layers
        self.plan = Plan(name, _sizes(entry))
        self.values: dict[fx.Node, Any] = {}
        self._stored: dict[str, Buffer] = {}
        self._names = itertools.count()
        self.branches = branches(entry)
        self.opened: dict[fx.Node, Opened] = {}

    def run(self) -> Plan:
        require_lowerings([self.entry], self.table, self.target)
        for kind in ("input", "state"):
            for node in self.entry.placeholders(kind):
                fact = value(node)
                buffer = self.buffer(kind, shape_of(fact), dtype_of(fact.dtype, self.dtypes), binding(node).key)
                self.values[node] = of_buffer(buffer)
        self._lower_all(self.entry.calls())
        self._outputs()
        return self.plan

    def _lower_all(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if node not in self.values and not isinstance(value(node), (int, torch.SymInt)):
                self._lower(node)

    def _lower(self, node: fx.Node) -> None:
        end = self.branches.get(node)
        if end is None:
            self._lower_plainly(node)
        else:
            self._lower_guarded(node, end)

    def _lower_guarded(self, node: fx.Node, end: fx.Node) -> None:
        """The steps of a node of a branch depend on its flag; nodes outside keep what they had become before."""
        inside = {n for n, of in self.branches.items() if of is end}
        if end not in self.opened:
            self._lower_all(calls_before(inside))  # of parallel parts: they may stand after the first node of this one
            self.opened[end] = open_branch(self, end, inside)
        opened, before, outside = self.opened[end], len(self.plan.steps), dict(self.values)
        if node is end:
            self.values[node] = close_branch(self, opened, self.value_of(node.args[1]))  # type: ignore[arg-type]
            self._label(before, origin(node))
        else:
            self._lower_plainly(node)
        self.values |= {n: known for n, known in outside.items() if n not in inside}
        self.plan.steps[before:] = [replace(step, guard=opened.flag) for step in self.plan.steps[before:]]

    def _lower_plainly(self, node: fx.Node) -> None:
        before = len(self.plan.steps)
        if node in self.layers.groups:
            self.values |= self.layers.lower(self, self.layers.groups[node])
        else:
            self.values[node] = self._call(node)
        self._label(before, origin(node))

    def _call(self, node: fx.Node) -> Any:
        args = map_aggregate(node.args, self._argument)
        kwargs = map_aggregate(dict(node.kwargs), self._argument)
        fact = value(node)
        described = Fact(shape_of(fact), dtype_of(fact.dtype, self.dtypes)) if isinstance(fact, Tensor) else fact
        self._require_floats(node, (described, *args, *kwargs.values()))
        result = self.table[node.target](self, described, *args, **kwargs)
        if isinstance(result, Lazy) and self._worth_storing(node, result):
            return self.realize(result)
        if isinstance(result, Lazy) and result.norm and len(self._readers(node)) > 1:
            return replace(result, norm=None)
        return result

    def _require_floats(self, node: fx.Node, facts: Sequence[Any]) -> None:
        """Short floats are for the ops that take them."""
        refused = ["bf16"] if node.target not in self.takes_bf16 else []
        refused += SHORT.values() if node.target not in self.takes_short else []
        found = next((x.dtype for x in facts if isinstance(x, (Fact, Lazy)) and x.dtype in refused), None)
        if found is not None:
            name = {"bf16": "bfloat16", "f16": "float16", "fp8": "float8"}[found]
            raise Unsupported(
                f"{op_name(node.target)} over {name} has no lowering, the {self.target} target computes in float32",
                at=node,
                hint=f"only caches and the weights of linear layers may be {name}; call model.float() before compiling",
            )

    def _label(self, first: int, label: str) -> None:
        """Name the steps from number `first` on that have no name yet."""
        self.plan.steps[first:] = [s if s.label else replace(s, label=label) for s in self.plan.steps[first:]]

    def _argument(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return size(argument) if isinstance(argument, torch.SymInt) else argument
        fact = value(argument)
        return size(fact) if isinstance(fact, (int, torch.SymInt)) else self.value_of(argument)

    def value_of(self, node: fx.Node) -> Any:
        """What a node has become; a stored weight gets its buffer when it is first read."""
        if node not in self.values:
            key, fact = binding(node).key, value(node)
            stored = self.layers.layouts.get(key)
            stored = stored or (plain(key), shape_of(fact), dtype_of(fact.dtype, self.dtypes))
            self.values[node] = of_buffer(self.weight(*stored))
        return self.values[node]

    def weight(self, layout: Layout, shape: Shape, dtype: str) -> Buffer:
        """The buffer of a stored tensor, made once."""
        if layout.name not in self._stored:
            self._stored[layout.name] = self.buffer("weight", shape, dtype, layout.name, layout=layout)
        return self._stored[layout.name]

    def _worth_storing(self, node: fx.Node, result: Lazy) -> bool:
        """Shared work is stored unless it is next to nothing; a long expression is stored to keep code small."""
        operations = result.operations
        return operations > MAX_OPERATIONS or (operations > CHEAP_OPERATIONS and len(self._readers(node)) > 1)

    def _readers(self, node: fx.Node) -> set[Any]:
        """What reads a node; linear layers that run as one are one reader."""
        tensors = [u for u in node.users if not isinstance(u.meta.get("val"), (int, torch.SymInt))]
        return {self.layers.groups[u].nodes if u in self.layers.groups else u for u in tensors}

    def _outputs(self) -> None:
        for output, node in zip(self.entry.outputs, self.entry.results(), strict=True):
            if output.kind == "state":
                continue
            result: Lazy = self.value_of(node)
            buffer = self.buffer("output", result.shape, result.dtype, output.name)
            store = Store(buffer.name, result.shape, result.dtype, result.load, buffer.offset, f"output {output.name}")
            self.plan.steps.append(store)

    def buffer(
        self, kind: BufferKind, shape: Shape, dtype: str, key: str = "", *, layout: Layout | None = None
    ) -> Buffer:
        made = Buffer(f"b{next(self._names)}", shape, dtype, kind, key, layout)
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
        indices = [index(0) if n.constant == 1 else i for i, n in zip(tensor.probe[0], tensor.shape, strict=True)]
        element = tensor.load(indices)
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

    def kept(self, tensor: Lazy) -> Buffer:
        """`contiguous`, and from now on the ops that read the same value read that buffer."""
        buffer = self.contiguous(tensor)
        if buffer.shape == tensor.shape:  # not a larger one that begins with the value, nor one of another shape
            self.values.update({node: of_buffer(buffer) for node, known in self.values.items() if known is tensor})
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


def origin(node: fx.Node) -> str:
    """What a step made for this node is called: the node and its module."""
    return f"{node.name} {module_path(node)}".strip()


def element_variables(element: Expr) -> frozenset[Any]:
    return frozenset(element.atoms)


def _sizes(entry: Entry) -> tuple[Size, ...]:
    """The symbols of the entry's inputs and state, by name."""
    found: set[Size] = set()
    for node in entry.placeholders():
        for n in shape_of(value(node)):
            found |= {a for a in n.atoms if isinstance(a, Size)}
    return tuple(sorted(found, key=lambda s: s.name))


def require_lowerings(entries: Iterable[Entry], table: Mapping[Any, Lower] = LOWERINGS, target: str = "cpu") -> None:
    """Refuse at compile time, with every op that has no lowering and where it came from."""
    missing: dict[str, fx.Node] = {}
    for entry in entries:
        for node in entry.calls():
            if node.target not in table and not isinstance(value(node), (int, torch.SymInt)):
                missing.setdefault(op_name(node.target), node)
    if missing:
        first = next(iter(missing.values()))
        raise Unsupported(
            f"{target} has no lowering for {sorted(missing)}",
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

"""Loop steps -> fused loop nests: steps over the same rows run in one kernel when no row reads another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from sylvester.codegen.index import Index, Loaded, Quotient, Remainder, Var, atom, flatten, index, product, within
from sylvester.codegen.lazy import Extern, Linear, Plan, Reduce, Shape, Step, Store
from sylvester.codegen.reads import loads
from sylvester.codegen.scalar import Call, Expr, IndexValue, Load

MAX_MEMBERS = 12
MIN_INNER = 64


@dataclass(frozen=True)
class Member:
    """A step seen as rows x inner loops. `extra` leading inner axes of a Reduce are kept, the rest are reduced."""

    step: Store | Reduce
    inner: Shape
    extra: int = 0

    def element(self, rows: list[Index], inner: list[Index]) -> Expr:
        if isinstance(self.step, Store):
            return self.step.make(_restore([*rows, *inner], self.step.shape))
        kept = _restore([*rows, *inner[: self.extra]], self.step.outer)
        return self.step.make(kept, inner[self.extra :])

    def place(self, rows: list[Index], inner: list[Index]) -> Index:
        if isinstance(self.step, Store):
            return self.step.place(_restore([*rows, *inner], self.step.shape))
        return flatten(_restore([*rows, *inner[: self.extra]], self.step.outer), self.step.outer)


@dataclass
class LoopNest:
    """Members run one after another inside each row of `rows`; rows are independent. All are in the branch `guard`."""

    rows: Shape
    guard: str = ""
    members: list[Member] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)

    def add(self, member: Member) -> None:
        self.members.append(member)
        self.reads |= {load.buffer for load in loads(_element(self.rows, member))}
        self.reads |= {load.buffer for load in loads(IndexValue(_place(self.rows, member)))}
        self.writes.add(member.step.buffer)

    def written_by(self, buffer: str) -> list[Member]:
        return [m for m in self.members if m.step.buffer == buffer]


@dataclass
class ExternCall:
    step: Extern

    @property
    def guard(self) -> str:
        return self.step.guard

    @property
    def reads(self) -> set[str]:
        return {*self.step.reads, *([self.guard] if self.guard else [])}

    @property
    def writes(self) -> set[str]:
        return set(self.step.writes)


Kernel = LoopNest | ExternCall


def schedule(plan: Plan) -> list[Kernel]:
    """Kernels in an order that respects every dependency; steps that nothing needs are left out."""
    kernels: list[Kernel] = []
    for kernel in _needed([_alone(step) for step in plan.steps], plan):
        home = _home(kernels, kernel) if isinstance(kernel, LoopNest) else None
        if home is None:
            kernels.append(kernel)
        else:
            home[0].add(home[1])
    return kernels


def _alone(step: Step) -> Kernel:
    if isinstance(step, Extern):
        return ExternCall(step)
    assert not isinstance(step, Linear), "linear steps become calls before they are scheduled"
    nest = LoopNest(_own_rows(step), step.guard, reads={step.guard} if step.guard else set())
    member = _as_member(step, nest.rows)
    assert member is not None
    nest.add(member)
    return nest


def _needed(kernels: list[Kernel], plan: Plan) -> list[Kernel]:
    """Kernels that write an output, a state, or what a later needed kernel reads."""
    wanted = {b.name for b in plan.buffers.values() if b.kind != "arena"}
    kept = []
    for kernel in reversed(kernels):
        if kernel.writes & wanted:
            wanted |= kernel.reads
            kept.append(kernel)
    return kept[::-1]


def _home(kernels: list[Kernel], alone: LoopNest) -> tuple[LoopNest, Member] | None:
    """The latest nest that can take a step without passing a kernel it depends on, and the step as its member."""
    for kernel in reversed(kernels):
        member = _fitted(kernel, alone) if isinstance(kernel, LoopNest) else None
        if member is not None:
            return cast(LoopNest, kernel), member
        if alone.reads & kernel.writes or alone.writes & (kernel.reads | kernel.writes):
            return None
    return None


def _fitted(nest: LoopNest, alone: LoopNest) -> Member | None:
    """The step as a member of the nest, when they share a buffer and its rows read no other row of the nest."""
    related = (alone.reads | alone.writes) & (nest.reads | nest.writes)
    if not related or len(nest.members) >= MAX_MEMBERS or alone.writes & (nest.reads | nest.writes):
        return None
    if nest.guard != alone.guard:
        return None
    member = _as_member(alone.members[0].step, nest.rows)
    if member is None:
        return None
    reads = loads(_element(nest.rows, member))
    aligned = all(row_offset(nest, load) is not None for load in reads if load.buffer in nest.writes)
    return member if aligned else None


def row_offset(nest: LoopNest, load: Load) -> Index | None:
    """Where in its own row's part of a buffer that the nest writes the load reads, or None if it may be another row."""
    writers = nest.written_by(load.buffer)
    if len(writers) != 1:
        return None
    rows, inner = row_variables(nest.rows), inner_variables(writers[0].inner)
    written = writers[0].inner if isinstance(writers[0].step, Store) else writers[0].inner[: writers[0].extra]
    base = writers[0].place(rows, [index(0)] * len(inner))
    if writers[0].place(rows, inner) - base != flatten(inner[: len(written)], written):
        return None
    rest = load.offset - base
    if any(isinstance(a, Loaded) or (isinstance(a, Var) and a.name.startswith("r")) for a in rest.atoms):
        return None
    return rest if within(rest, product(written)) else None


def row_variables(rows: Shape) -> list[Index]:
    return [atom(Var(f"r{d}", n)) for d, n in enumerate(rows)]


def inner_variables(inner: Shape) -> list[Index]:
    return [atom(Var(f"i{d}", n)) for d, n in enumerate(inner)]


def _element(rows: Shape, member: Member) -> Expr:
    return member.element(row_variables(rows), inner_variables(member.inner))


def _place(rows: Shape, member: Member) -> Index:
    return member.place(row_variables(rows), inner_variables(member.inner))


def certain(element: Expr) -> Iterator[Loaded]:
    """Integers read from memory on every path through an expression: not those in a branch of `where`."""
    if isinstance(element, Call):
        for argument in element.arguments[: 1 if element.function == "where" else None]:
            yield from certain(argument)
    elif isinstance(element, (Load, IndexValue)):
        yield from certain_in(element.offset if isinstance(element, Load) else element.index)


def certain_in(position: Index) -> Iterator[Loaded]:
    for a in (a for monomial, _ in position.terms for a in monomial):
        if isinstance(a, Loaded):
            yield a
            yield from certain(a.expression)
        if isinstance(a, (Quotient, Remainder)):
            yield from certain_in(a.top)
            yield from certain_in(a.bottom)


def _units_dropped(shape: Shape) -> Shape:
    return tuple(n for n in shape if n.constant != 1)


def _restore(indices: list[Index], shape: Shape) -> list[Index]:
    """Indices without the unit dimensions -> indices of `shape`."""
    rest = iter(indices)
    return [index(0) if n.constant == 1 else next(rest) for n in shape]


def _own_rows(step: Step) -> Shape:
    """Rows of a nest that this step opens: all that a reduction keeps, all but the last axes of a store."""
    if isinstance(step, Reduce):
        return _units_dropped(step.outer)
    assert isinstance(step, Store)
    shape = _units_dropped(step.shape)
    cut = len(shape) - 1
    while cut > 0 and (product(shape[cut:]).constant or MIN_INNER) < MIN_INNER:
        cut -= 1
    return shape[: max(cut, 0)]


def _as_member(step: Store | Reduce, rows: Shape) -> Member | None:
    """The step over these rows, when its leading axes are the rows."""
    kept = _units_dropped(step.shape if isinstance(step, Store) else step.outer)
    if kept[: len(rows)] != rows:
        return None
    rest = kept[len(rows) :]
    if isinstance(step, Store):
        return Member(step, rest)
    return Member(step, (*rest, *step.inner), len(rest))

"""Loop steps -> fused loop nests: steps over the same rows run row by row in one kernel when rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sylvester.codegen.index import Index, Loaded, Var, atom, flatten, index, product, within
from sylvester.codegen.lazy import Extern, Plan, Reduce, Shape, Step, Store
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
    """Members run one after another inside each row of `rows`; rows are independent."""

    rows: Shape
    members: list[Member] = field(default_factory=list)
    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)

    def add(self, member: Member) -> None:
        self.members.append(member)
        self.reads |= {load.buffer for load in loads(_element(self.rows, member))}
        self.writes.add(member.step.buffer)

    def written_by(self, buffer: str) -> list[Member]:
        return [m for m in self.members if m.step.buffer == buffer]


@dataclass
class ExternCall:
    step: Extern

    @property
    def reads(self) -> set[str]:
        return set(self.step.reads)

    @property
    def writes(self) -> set[str]:
        return set(self.step.writes)


Kernel = LoopNest | ExternCall


def schedule(plan: Plan) -> list[Kernel]:
    """Kernels in an order that respects every dependency."""
    kernels: list[Kernel] = []
    for step in plan.steps:
        if isinstance(step, Extern):
            kernels.append(ExternCall(step))
            continue
        nest = _home(kernels, step) or LoopNest(_own_rows(step))
        member = _as_member(step, nest.rows)
        assert member is not None
        if not nest.members:
            kernels.append(nest)
        nest.add(member)
    return kernels


def _home(kernels: list[Kernel], step: Store | Reduce) -> LoopNest | None:
    """The latest nest that can take the step without passing a kernel it depends on."""
    alone = LoopNest(_own_rows(step))
    own = _as_member(step, alone.rows)
    assert own is not None
    alone.add(own)
    for kernel in reversed(kernels):
        if isinstance(kernel, LoopNest) and _fits(kernel, step, alone):
            return kernel
        if alone.reads & kernel.writes or alone.writes & (kernel.reads | kernel.writes):
            return None
    return None


def _fits(nest: LoopNest, step: Store | Reduce, alone: LoopNest) -> bool:
    member = _as_member(step, nest.rows)
    related = (alone.reads | alone.writes) & (nest.reads | nest.writes)
    if member is None or not related or len(nest.members) >= MAX_MEMBERS or alone.writes & (nest.reads | nest.writes):
        return False
    reads = loads(_element(nest.rows, member))
    return all(row_offset(nest, load) is not None for load in reads if load.buffer in nest.writes)


def row_offset(nest: LoopNest, load: Load) -> Index | None:
    """Where in its own row's part of a buffer written by the nest the load reads, or None if it may read another row."""
    writers = nest.written_by(load.buffer)
    if len(writers) != 1:
        return None
    rows, inner = row_variables(nest.rows), inner_variables(writers[0].inner)
    written = writers[0].inner if isinstance(writers[0].step, Store) else writers[0].inner[: writers[0].extra]
    base = writers[0].place(rows, [index(0)] * len(inner))
    if writers[0].place(rows, inner) - base != flatten(inner[: len(written)], written):
        return None
    rest = load.offset - base
    free = not any(v.name.startswith("r") for v in rest.variables) and not any(isinstance(a, Loaded) for a in rest.atoms)
    return rest if free and within(rest, product(written)) else None


def row_variables(rows: Shape) -> list[Index]:
    return [atom(Var(f"r{d}", n)) for d, n in enumerate(rows)]


def inner_variables(inner: Shape) -> list[Index]:
    return [atom(Var(f"i{d}", n)) for d, n in enumerate(inner)]


def _element(rows: Shape, member: Member) -> Expr:
    return member.element(row_variables(rows), inner_variables(member.inner))


def loads(element: Expr) -> Iterator[Load]:
    """Every memory read of an expression, those inside indices too."""
    if isinstance(element, Call):
        for argument in element.arguments:
            yield from loads(argument)
        return
    if isinstance(element, Load):
        yield element
    if isinstance(element, (Load, IndexValue)):
        for a in element.atoms:
            if isinstance(a, Loaded):
                yield from loads(a.expression)


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

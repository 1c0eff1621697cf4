"""A region as a TVM function over raw pointers: void f(buffers..., rows in memory..., sizes..., lo, hi)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm
from tvm import tirx

from sylvester.codegen.index import Index, Var, index
from sylvester.codegen.lazy import Reduce, Store
from sylvester.codegen.loop_axes import Body, loop_body
from sylvester.codegen.reads import loads
from sylvester.codegen.region import Refused, Region
from sylvester.codegen.scalar import FLOATS, Load
from sylvester.codegen.schedule import Member, row_offset, row_variables
from sylvester.codegen.tvm_scalar import MEMORY, Scalars, constant, guarded, typed

Value = Any
UNBOUNDED = 1 << 40
"""Elements a buffer is declared with; the sizes of a call say how many there are."""
COMBINE: dict[str, Callable[[Value, Value], Value]] = {
    "sum": lambda total, v: total + v, "prod": lambda total, v: total * v,
    "max": lambda total, v: tirx.Select(v > total, v, total), "min": lambda total, v: tirx.Select(v < total, v, total),
    "any": tirx.bitwise_or, "all": tirx.bitwise_and,
}  # fmt: skip
START = {"sum": 0, "prod": 1, "any": 0, "all": 1}
VECTORIZED = tirx.ForKind.VECTORIZED


@dataclass(frozen=True)
class Schedule:
    """How many elements are computed side by side: of the innermost loop, or whole rows that follow each other."""

    lanes: int
    rows: bool = False


def function(region: Region, schedule: Schedule, name: str) -> Any:
    """The PrimFunc; `Refused` says what has no form in TVM."""
    return (Blocks if schedule.rows else Vectors)(region, schedule.lanes).build(name)


class Builder(Scalars):
    """What both ways share: parameters, rows, and where elements lie."""

    step = 1
    """Rows that are computed at a time."""

    def __init__(self, region: Region, lanes: int) -> None:
        super().__init__(region.buffers)
        self.region, self.nest, self.lanes = region, region.nest, lanes
        self.memory: dict[str, Any] = {}
        self.pointers: list[Any] = []
        self.locals: list[Any] = []
        for name in (*region.function.buffers, *region.rows_in_memory):
            self._declare(name)
        self.atoms |= {size: tirx.Var(size.name, "int64") for size in region.function.sizes}

    @abstractmethod
    def member_store(self, step: Store, body: Body) -> None: ...

    @abstractmethod
    def member_reduce(self, step: Reduce, body: Body, totals: Any) -> None: ...

    @abstractmethod
    def slot(self) -> Any:
        """Where the number of this row is in the totals of a reduction."""

    def _declare(self, name: str) -> None:
        dtype = self.buffers[name].dtype
        typed(dtype)
        pointer = tirx.Var(f"{name}_p", tvm.ir.PointerType(tvm.ir.PrimType(MEMORY[dtype]), "global"))
        made = tirx.decl_buffer((constant(UNBOUNDED),), MEMORY[dtype], name=name, data=pointer, data_alignment=1)
        self.memory[name] = made
        self.pointers.append(pointer)

    def local(self, dtype: str, size: int) -> Any:
        made = tirx.decl_buffer((size,), dtype, name="a", scope="local")
        self.locals.append(tirx.AllocBuffer(made))
        return made

    def build(self, name: str) -> Any:
        lo, hi = tirx.Var("lo", "int64"), tirx.Var("hi", "int64")
        sizes = [self.atoms[size] for size in self.region.function.sizes]
        declared = [tirx.DeclBuffer(m, data=p) for m, p in zip(self.memory.values(), self.pointers, strict=True)]
        number = tirx.Var("row", "int64")
        with self.block() as statements:
            self._row(lo + number * constant(self.step))
            for position, member in enumerate(self.nest.members):
                self._member(member, 100 * position)
        rows = loop(number, tirx.truncdiv(hi - lo, constant(self.step)), statements)
        made = tirx.PrimFunc([*self.pointers, *sizes, lo, hi], sequence([*declared, *self.locals, rows]))
        return made.with_attr("global_symbol", name).with_attr("tirx.noalias", True)

    def _row(self, first: Value) -> None:
        """The row counters, from the number of the row."""
        rest = first
        for d in reversed(range(len(self.nest.rows))):
            extent = self.nest.rows[d]
            counter = tirx.truncmod(rest, self.index(extent)) if d else rest
            self.atoms[Var(f"r{d}", extent)] = self.keep(counter, "int64")
            rest = tirx.truncdiv(rest, self.index(extent))

    def _member(self, member: Member, first: int) -> None:
        step, body = member.step, loop_body(member, row_variables(self.nest.rows), first)
        if isinstance(step, Store):
            self.member_store(step, body)
            return
        if step.kind not in COMBINE:
            raise Refused(f"the reduction {step.kind}")
        totals = self.local(MEMORY[step.dtype], self.step)
        if step.buffer in self.region.private:
            self.memory[step.buffer] = totals
        self.member_reduce(step, body, totals)

    def position(self, buffer: str, place: Index) -> Value:
        if buffer not in self.region.private:
            return self.index(place)
        if buffer not in self.region.rows_in_memory:
            return self.slot()
        rest = row_offset(self.nest, Load(buffer, place, ""))
        assert rest is not None
        return self.index(rest)

    def read(self, load: Load) -> Value:
        return tirx.BufferLoad(self.memory[load.buffer], [self.position(load.buffer, load.offset)])

    def put(self, memory: Any, value: Value, at: Value) -> None:
        self.statements.append(tirx.BufferStore(memory, value, [at]))

    def element(self, body: Body, dtype: str) -> Value:
        return self.stored(self.value(body.element), dtype)

    def combined(self, step: Reduce, memory: Any, at: Value, body: Body) -> None:
        """Add one element to a total."""
        value = self.value(body.element)
        if step.kind in ("any", "all"):
            value = tirx.Cast("uint8", truth(value, body.element.dtype))
        elif step.kind in ("max", "min"):
            value = self.keep(value, MEMORY[step.dtype])
        self.put(memory, COMBINE[step.kind](tirx.BufferLoad(memory, [at]), value), at)

    def serial(self, loops: Sequence[Var], inside: Callable[[], None]) -> None:
        """Loops around what is inside, one element at a time."""
        if not loops:
            inside()
            return
        variable = self.atoms[loops[0]] = tirx.Var(loops[0].name, "int64")
        with self.block() as statements:
            self.serial(loops[1:], inside)
        self.statements.append(loop(variable, self.index(loops[0].extent), statements))


class Vectors(Builder):
    """The innermost loop of every member runs over vectors."""

    def slot(self) -> Value:
        return constant(0)

    def member_store(self, step: Store, body: Body) -> None:
        def inside() -> None:
            self.put(self.memory[step.buffer], self.element(body, step.dtype), self.position(step.buffer, body.place))

        if body.loops:
            self.serial(body.loops[:-1], lambda: self._vectors(body.loops[-1], self._width(body), lambda _: inside()))
        else:
            inside()

    def member_reduce(self, step: Reduce, body: Body, totals: Any) -> None:
        self.serial(body.loops[: body.kept], lambda: self._total(step, body, totals))

    def _width(self, body: Body) -> int:
        """One lane where a read must not run ahead of its condition."""
        return 1 if guarded(body.element, self.buffers) else self.lanes

    def _total(self, step: Reduce, body: Body, totals: Any) -> None:
        start, loops, width = start_of(step), body.loops[body.kept :], self._width(body)
        parts = self.local(MEMORY[step.dtype], width) if loops and width > 1 else None

        def add(lane: Value | None) -> None:
            memory, at = (totals, constant(0)) if lane is None else (parts, lane)
            self.combined(step, memory, at, body)

        self.put(totals, start, constant(0))
        if parts is not None:
            self._lanes(width, lambda lane: self.put(parts, start, lane))
        if loops:
            self.serial(loops[:-1], lambda: self._vectors(loops[-1], width, add))
        else:
            add(None)
        if parts is not None:
            self._fold(step, parts, totals, width)
        if step.buffer not in self.region.private:
            self.put(self.memory[step.buffer], tirx.BufferLoad(totals, [constant(0)]), self.index(body.place))

    def _fold(self, step: Reduce, parts: Any, totals: Any, width: int) -> None:
        """The lanes of a vector of totals into one, half by half."""
        combine = COMBINE[step.kind]
        while width > 1:
            width //= 2
            self._lanes(width, partial(self._halve, parts, width, combine))
        both = combine(tirx.BufferLoad(totals, [constant(0)]), tirx.BufferLoad(parts, [constant(0)]))
        self.put(totals, both, constant(0))

    def _halve(self, parts: Any, half: int, combine: Callable[[Value, Value], Value], lane: Value) -> None:
        low, high = (tirx.BufferLoad(parts, [at]) for at in (lane, lane + constant(half)))
        self.put(parts, combine(low, high), lane)

    def _lanes(self, width: int, inside: Callable[[Value], None]) -> None:
        lane = tirx.Var("lane", "int64")
        with self.block() as statements:
            inside(lane if width > 1 else constant(0))
        if width > 1:
            statements = [loop(lane, constant(width), statements, VECTORIZED)]
        self.statements.extend(statements)

    def _vectors(self, variable: Var, lanes: int, inside: Callable[[Value | None], None]) -> None:
        """A loop as one over vectors, then one over the rest; `inside` gets the lane, None for the rest."""
        extent, count = self.index(variable.extent), variable.extent.constant
        whole = tirx.truncdiv(extent, constant(lanes)) if lanes > 1 else constant(0)
        if lanes > 1 and (count is None or count >= lanes):
            block = tirx.Var(variable.name, "int64")
            with self.block() as statements:
                self._lanes(lanes, lambda lane: self._at(variable, block * constant(lanes) + lane, lane, inside))
            self.statements.append(loop(block, whole, statements))
        if lanes == 1 or count is None or count % lanes:
            done, rest = whole * constant(lanes), tirx.Var(variable.name, "int64")
            with self.block() as statements:
                self._at(variable, done + rest, None, inside)
            self.statements.append(loop(rest, extent - done, statements))

    def _at(self, variable: Var, at: Value, lane: Value | None, inside: Callable[[Value | None], None]) -> None:
        self.atoms[variable] = at
        inside(lane)


class Blocks(Builder):
    """Rows that follow each other run side by side, each in a lane."""

    def __init__(self, region: Region, lanes: int) -> None:
        super().__init__(region, lanes)
        self.step, self.lane = lanes, constant(0)

    def slot(self) -> Value:
        return self.lane

    def member_store(self, step: Store, body: Body) -> None:
        def inside() -> None:
            self.put(self.memory[step.buffer], self.element(body, step.dtype), self.position(step.buffer, body.place))

        self.serial(body.loops, lambda: self._side_by_side(inside))

    def member_reduce(self, step: Reduce, body: Body, totals: Any) -> None:
        start = start_of(step)

        def total() -> None:
            self._side_by_side(lambda: self.put(totals, start, self.lane))
            self.serial(
                body.loops[body.kept :],
                lambda: self._side_by_side(lambda: self.combined(step, totals, self.lane, body)),
            )
            if step.buffer not in self.region.private:
                self._side_by_side(write)

        def write() -> None:
            self.put(self.memory[step.buffer], tirx.BufferLoad(totals, [self.lane]), self.index(body.place))

        self.serial(body.loops[: body.kept], total)

    def _side_by_side(self, inside: Callable[[], None]) -> None:
        last = Var(f"r{len(self.nest.rows) - 1}", self.nest.rows[-1])
        first, self.lane = self.atoms[last], tirx.Var("lane", "int64")
        self.atoms[last] = first + self.lane
        with self.block() as statements:
            inside()
        self.statements.append(loop(self.lane, constant(self.lanes), statements, VECTORIZED))
        self.atoms[last] = first


def schedules(region: Region, vector: int) -> tuple[Schedule, ...]:
    """What is worth trying where a register holds `vector` floats."""
    longest = max((_longest(m) for m in region.nest.members), default=1)
    found = [Schedule(vector * n) for n in (1, 2, 4) if vector * n <= longest] or [Schedule(1)]
    return (*found, *(Schedule(vector * n, rows=True) for n in (1, 4) if blocks_fit(region, vector * n)))


def _longest(member: Member) -> int:
    """Elements of the innermost loop; of an open length many."""
    return (member.inner[-1].constant or UNBOUNDED) if member.inner else 1


def blocks_fit(region: Region, lanes: int) -> bool:
    """Whether `lanes` rows that follow each other lie side by side in every buffer."""
    rows = region.nest.rows
    if not rows or region.rows_in_memory or (rows[-1].constant or 1) % lanes:
        return False
    last = Var(f"r{len(rows) - 1}", rows[-1])
    return all(_side_by_side(region, member, last) for member in region.nest.members)


def _side_by_side(region: Region, member: Member, last: Var) -> bool:
    """Whether the next row reads and writes the next elements, or the same."""
    body = loop_body(member, row_variables(region.nest.rows), 0)
    places = [] if member.step.buffer in region.private else [body.place]
    places += [load.offset for load in loads(body.element) if load.buffer not in region.private]
    strides = [place.coefficient(last).constant for place in places]
    hidden = any(last in place.substitute({last: index(0)}).atoms for place in places)
    return not hidden and all(n in (0, 1) for n in strides) and not guarded(body.element, region.buffers)


def start_of(step: Reduce) -> Value:
    dtype = MEMORY[step.dtype]
    if step.kind in START:
        return tirx.const(START[step.kind], dtype)
    if step.dtype in FLOATS:
        return tirx.const(float("-inf") if step.kind == "max" else float("inf"), dtype)
    return tirx.min_value(dtype) if step.kind == "max" else tirx.max_value(dtype)


def truth(value: Value, dtype: str) -> Value:
    return value if dtype == "b8" else tirx.NE(value, tirx.const(0, MEMORY[dtype]))


def loop(variable: Any, extent: Value, statements: list[Any], kind: Any = tirx.ForKind.SERIAL) -> Any:
    return tirx.For(variable, constant(0), extent, kind, sequence(statements))


def sequence(statements: list[Any]) -> Any:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)

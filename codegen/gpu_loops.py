"""A loop nest as a Triton kernel: a program computes R rows, their elements in blocks of B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sylvester.codegen.emit_loops import START
from sylvester.codegen.gpu_kernel import Kernel, text
from sylvester.codegen.gpu_scalar import POINTERS, TYPES, Scalars
from sylvester.codegen.index import Index, Size, Var, flatten, index, product
from sylvester.codegen.lazy import Buffer, Reduce, Store
from sylvester.codegen.loop_axes import Body, loop_body
from sylvester.codegen.scalar import FLOATS, Load
from sylvester.codegen.schedule import LoopNest, Member, row_offset, row_variables

BLOCK = 1024
"""Elements that a program holds at a time."""
WARPS = 4
COMBINE = {
    "sum": "{0} + {1}", "prod": "{0} * {1}", "any": "{0} | ({1} != 0)", "all": "{0} & ({1} != 0)",
    "max": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "min": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}  # fmt: skip
ACROSS = {
    "sum": "tl.sum({0}, 1, keep_dims=True)", "prod": "tl.reduce({0}, 1, times, keep_dims=True)",
    "any": "(tl.max({0}.to(tl.int32), 1, keep_dims=True) != 0)",
    "all": "(tl.min({0}.to(tl.int32), 1, keep_dims=True) != 0)",
}  # fmt: skip
LIMITS = {"i64": 63, "i32": 31, "i8": 7, "u8": 8}


@dataclass(frozen=True)
class LoopKernel:
    """A kernel, the buffers and sizes to pass in order, and how many programs run; `checks`: positions may be wrong."""

    kernel: Kernel
    buffers: tuple[str, ...]
    sizes: tuple[Size, ...]
    grid: Index
    checks: bool


def loop_kernel(nest: LoopNest, buffers: dict[str, Buffer], private: set[str]) -> LoopKernel:
    """`private`: buffers of a number a row that only this nest touches, which need no memory."""
    return _Emitter(nest, buffers, private).emit()


class _Emitter:
    def __init__(self, nest: LoopNest, buffers: dict[str, Buffer], private: set[str]) -> None:
        self.nest, self.private = nest, private
        self.scalars = Scalars(buffers, known=self._known)
        longest = max((_columns(member) for member in nest.members), default=1)
        self.block = min(_power(longest), BLOCK)
        self.rows = min(BLOCK // self.block, _power(product(nest.rows).constant or BLOCK))
        self.spread = len(nest.members) == 1 and isinstance(nest.members[0].step, Store)
        """Whether blocks of a row are programs of their own."""
        self.blocks = index(1)
        self.held: set[str] = set()
        """Buffers of numbers that are computed already."""
        self.variables = 0

    def emit(self) -> LoopKernel:
        rows = product(self.nest.rows)
        for number, member in enumerate(self.nest.members):
            self._member(number, member)
        body, self.scalars.lines = self.scalars.lines, []
        self._head(rows)
        made = [*self.scalars.lines, *body]
        pointers, sizes = self.scalars.pointers, self.scalars.sizes
        names = [*pointers.values(), *sizes.values(), *(["error"] if self.scalars.checks else [])]
        head = f"@triton.jit\ndef loops({', '.join([*names, 'R: tl.constexpr', 'B: tl.constexpr'])}):"
        types = {name: POINTERS[self.scalars.buffers[b].dtype] for b, name in pointers.items()}
        types |= dict.fromkeys(sizes.values(), "i32")
        types |= {"error": "*i64"} if self.scalars.checks else {}
        kernel = Kernel(
            "\n\n".join([text("pointwise"), text("math"), "\n".join([head, *made]) + "\n"]), "loops", types,
            {"R": self.rows, "B": self.block}, aligned=tuple(pointers.values()), warps=WARPS,
        )  # fmt: skip
        found = tuple(a for a in sizes if isinstance(a, Size))
        grid = (rows + (self.rows - 1)) // self.rows * self.blocks
        return LoopKernel(kernel, tuple(pointers), found, grid, self.scalars.checks)

    def _head(self, rows: Index) -> None:
        emit = self.scalars.line
        emit("program = tl.program_id(0)")
        if self.spread:
            emit(f"blocks = {self.scalars.index(self.blocks)}")
            emit("first = program % blocks * B")
            emit("program = program // blocks")
        emit("row = program * R + tl.arange(0, R)[:, None]")
        emit(f"rows = row < {self.scalars.index(rows)}")
        rest = "row"
        for d in reversed(range(len(self.nest.rows))):
            extent = self.scalars.index(self.nest.rows[d])
            emit(f"r{d} = {rest} % ({extent})" if d else f"r0 = {rest}")
            rest = f"({rest} // ({extent}))"
        for variable in (v for r in row_variables(self.nest.rows) for v in r.variables):
            self.scalars.atoms[variable] = variable.name

    def _member(self, number: int, member: Member) -> None:
        for d, r in enumerate(row_variables(self.nest.rows)):
            self.scalars.atoms |= {v: f"r{d}" for v in r.variables}
        body = loop_body(member, row_variables(self.nest.rows), self.variables)
        self.variables += len(body.loops)
        if isinstance(member.step, Store):
            self._store(member.step, body)
        else:
            self._reduce(number, member, member.step, body)
        if number + 1 < len(self.nest.members):
            self.scalars.line("tl.debug_barrier()")

    def _store(self, step: Store, body: Body) -> None:
        blocks = self._open(body.loops)
        place = f"{self.scalars.pointer(step.buffer)} + ({self.scalars.index(body.place)}) + full"
        value = self.scalars.as_type(body.element, step.dtype)
        self.scalars.line(f"tl.store({place}, {_stored(value, step.dtype)}, rows & lanes)")
        self._close(blocks)

    def _reduce(self, number: int, member: Member, step: Reduce, body: Body) -> None:
        kept, reduced = body.loops[: body.kept], body.loops[body.kept :]
        total = f"a{number}"
        if kept:
            blocks = self._open(kept)
            self._columns_reduced(total, step, body, reduced, member)
            self._put(step, body, total)
            self._close(blocks)
            return
        self._start(total, step)
        blocks = self._open(reduced)
        self._combine(total, step, body, member)
        self._close(blocks)
        self.scalars.line(f"full, lanes = {FULL}, {ALL}")
        self._across(total, step)
        if step.buffer not in self.private:
            self._put(step, body, total)
        self.held.add(step.buffer)

    def _columns_reduced(self, total: str, step: Reduce, body: Body, reduced: Sequence[Var], member: Member) -> None:
        """Each lane reduces by itself, one element after another."""
        self._start(total, step)
        for variable in reduced:
            self.scalars.atoms[variable] = variable.name
            self.scalars.line(f"for {variable.name} in range({self.scalars.index(variable.extent)}):")
            self.scalars.depth += 1
        self._combine(total, step, body, member)
        self.scalars.depth -= len(reduced)
        if step.kind in ("argmax", "argmin"):
            self.scalars.line(f"{total} = {total}_at")

    def _start(self, total: str, step: Reduce) -> None:
        if step.kind in ("argmax", "argmin"):
            infinity = f'float("{"-" if step.kind == "argmax" else ""}inf")'
            self.scalars.line(f"{total} = tl.full([R, B], {infinity}, tl.float32)")
            self.scalars.line(f"{total}_at = tl.full([R, B], 9223372036854775807, tl.int64)")
            return
        self.scalars.line(f"{total} = tl.full([R, B], {_start(step)}, tl.{TYPES[step.dtype]})")

    def _combine(self, total: str, step: Reduce, body: Body, member: Member) -> None:
        value = self.scalars.keep(self.scalars.as_type(body.element, _computed(step)))
        if step.kind in ("argmax", "argmin"):
            self._found(total, step, value, flatten(body.inner[member.extra :], step.inner))
            return
        combined = COMBINE[step.kind].format(total, value)
        self.scalars.line(f"{total} = tl.where(rows & lanes, {combined}, {total})")

    def _found(self, best: str, step: Reduce, value: str, at: Index) -> None:
        emit, sign = self.scalars.line, ">" if step.kind == "argmax" else "<"
        emit(f"better = ({value} {sign} {best}) | (({value} != {value}) & ({best} == {best}))")
        emit(f"better = rows & lanes & (better | (({best} == {value}) & ({best}_at == 9223372036854775807)))")
        emit(f"{best}_at = tl.where(better, {self.scalars.index(at)}, {best}_at)")
        emit(f"{best} = tl.where(better, {value}, {best})")

    def _across(self, total: str, step: Reduce) -> None:
        least = step.kind in ("min", "argmin")
        if step.kind in ("argmax", "argmin"):
            found = f"place_of({total}, {total}_at, {least})"
        elif step.kind in ACROSS:
            found = ACROSS[step.kind].format(total)
        elif step.dtype in FLOATS:
            found = f"extreme({total}, {least})"
        else:
            found = f"tl.{step.kind}({total}, 1, keep_dims=True)"
        cast = "" if step.kind in ("argmax", "argmin") else f".to(tl.{TYPES[step.dtype]})"
        self.scalars.line(f"{total} = {found}{cast}")

    def _put(self, step: Reduce, body: Body, total: str) -> None:
        place = f"{self.scalars.pointer(step.buffer)} + ({self.scalars.index(body.place)}) + full"
        self.scalars.line(f"tl.store({place}, {_stored(total, step.dtype)}, rows & lanes)")

    def _known(self, load: Load) -> str | None:
        """A number of this row that an earlier member has computed."""
        if load.buffer not in self.held or row_offset(self.nest, load) is None:
            return None
        return f"a{next(n for n, m in enumerate(self.nest.members) if m.step.buffer == load.buffer)}"

    def _open(self, loops: Sequence[Var]) -> bool:
        """Loops over one axis in blocks; gives whether a loop was opened."""
        emit, total = self.scalars.line, product(v.extent for v in loops)
        if not loops:
            emit(f"full, lanes = {FULL}, {ALL}")
            return False
        whole = total.constant is not None and total.constant <= self.block
        opened = not whole and not self.spread
        if self.spread:
            self.blocks = (total + (self.block - 1)) // self.block
        if opened:
            emit(f"for first in range(0, {self.scalars.index(total)}, B):")
            self.scalars.depth += 1
        start = "" if whole and not self.spread else "first + "
        emit(f"lane = {start}tl.arange(0, B)[None, :]")
        emit(f"lanes = lane < {self.scalars.index(total)}")
        emit("full = tl.zeros([R, B], tl.int32)")
        rest = "lane"
        for n, variable in reversed(list(enumerate(loops))):
            extent = self.scalars.index(variable.extent)
            emit(f"{variable.name} = {rest} % ({extent})" if n else f"{variable.name} = {rest}")
            rest = f"({rest} // ({extent}))"
            self.scalars.atoms[variable] = variable.name
            self.scalars.lanes.add(variable)
        return opened

    def _close(self, opened: bool) -> None:
        self.scalars.depth -= opened


FULL, ALL = "tl.zeros([R, 1], tl.int32)", "tl.full([1, 1], True, tl.int1)"


def _computed(step: Reduce) -> str:
    """The type that elements are compared or added in."""
    return "f32" if step.kind in ("argmax", "argmin") else step.dtype


def _start(step: Reduce) -> str:
    if step.kind in START:
        return {"any": "0", "all": "1"}.get(step.kind, START[step.kind])
    if step.dtype in FLOATS:
        return f'float("{"-" if step.kind == "max" else ""}inf")'
    bits = LIMITS[step.dtype]
    lowest = 0 if step.dtype == "u8" else -(2**bits)
    return str(lowest if step.kind == "max" else 2**bits - 1)


def _stored(value: str, dtype: str) -> str:
    return f"{value}.to(tl.uint8)" if dtype == "b8" else value


def _columns(member: Member) -> int:
    inner = member.inner[: member.extra] or member.inner
    return product(inner).constant or BLOCK


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()

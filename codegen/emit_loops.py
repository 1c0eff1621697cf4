"""A loop nest as one C function, written with names of its own so that equal nests give equal text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sylvester.codegen.index import Atom, Index, Loaded, Size, Var, atom, flatten, index, product
from sylvester.codegen.index_text import c_text
from sylvester.codegen.lazy import Buffer, Reduce, Store
from sylvester.codegen.loop_axes import loop_body
from sylvester.codegen.reads import loads
from sylvester.codegen.scalar import BYTES, C_TYPES, FLOATS, Expr, Load, c_expression
from sylvester.codegen.schedule import LoopNest, Member, certain, certain_in, row_offset, row_variables

MAX_LOCAL_BYTES = 16384
START = {"sum": "0", "prod": "1", "any": "0", "all": "1"}
COMBINE = {
    "sum": "{0} += {1};", "prod": "{0} *= {1};", "any": "{0} |= ({1} != 0);", "all": "{0} &= ({1} != 0);",
    "max": "{0} = {1} > {0} ? {1} : {0};", "min": "{0} = {1} < {0} ? {1} : {0};",
}  # fmt: skip
LIMITS = {
    "i64": ("INT64_MIN", "INT64_MAX"), "i32": ("INT32_MIN", "INT32_MAX"), "i8": ("INT8_MIN", "INT8_MAX"),
    "u8": ("0", "UINT8_MAX"), "b8": ("0", "1"),
}  # fmt: skip
CLAUSE = {"sum": "+", "prod": "*", "any": "|", "all": "&", "max": "max", "min": "min"}


@dataclass(frozen=True)
class LoopFunction:
    """C text with NAME for its name, the buffers and sizes to pass in order, and the scalar operations of a call."""

    text: str
    buffers: tuple[str, ...]
    sizes: tuple[Size, ...]
    work: Index


@dataclass
class Emitter:
    """Collects the parameters and lines of one nest."""

    nest: LoopNest
    buffers: dict[str, Buffer]
    private: set[str]
    parameters: dict[str, str] = field(default_factory=dict)
    sizes: dict[Size, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    hoisted: dict[str, str] = field(default_factory=dict)
    certain: set[Loaded] = field(default_factory=set)
    variables: int = 0
    depth: int = 2

    def emit(self) -> LoopFunction:
        rows = product(self.nest.rows)
        for number, member in enumerate(self.nest.members):
            self._member(number, member)
        body = self.lines
        self.lines = []
        head = self._head(rows)
        arguments = [self._parameter(name, text) for name, text in self.parameters.items()]
        signature = ", ".join(["const sv_thread *t", *arguments, *(f"int64_t {n}" for n in self.sizes.values())])
        text = "\n".join([f"static SV_NOINLINE void NAME({signature}) {{", *head, *body, *self._advance(), "  }", "}"])
        return LoopFunction(text, tuple(self.parameters), tuple(self.sizes), rows * self._row_work())

    def _parameter(self, name: str, text: str) -> str:
        const = "" if name in self.nest.writes else "const "
        return f"{const}{C_TYPES[self.buffers[name].dtype]} *restrict {text}"

    def _row_work(self) -> Index:
        total = index(0)
        for member in self.nest.members:
            inner = [atom(Var(f"i{d}", n)) for d, n in enumerate(member.inner)]
            operations = member.element(row_variables(self.nest.rows), inner).operations + 1
            total = total + product(member.inner) * operations
        return total

    def _head(self, rows: Index) -> list[str]:
        """Split the rows over the threads and set the row counters to the first one."""
        lines = ["  int64_t lo, hi;", f"  sv_split({self._index(rows)}, 1, t, &lo, &hi);"]
        if len(self.nest.rows) > 1:  # an axis without elements is no divisor
            lines.append("  if (lo >= hi) return;")
        rest = "lo"
        for d in reversed(range(len(self.nest.rows))):
            extent = self._index(self.nest.rows[d])
            lines.append(f"  int64_t r{d} = {rest} % ({extent});" if d else f"  int64_t r0 = {rest};")
            rest = f"({rest} / ({extent}))"
        return [*lines, "  for (int64_t row = lo; row < hi; row++) {"]

    def _advance(self) -> list[str]:
        """Step the row counters like an odometer."""
        lines: list[str] = []
        indent = "    "
        for d in reversed(range(1, len(self.nest.rows))):
            lines.append(f"{indent}if (++r{d} == {self._index(self.nest.rows[d])}) {{ r{d} = 0;")
            indent += "  "
        if self.nest.rows:
            lines.append(f"{indent}r0++;")
        lines.extend("    " + "}" for _ in range(len(self.nest.rows) - 1))
        return lines

    def _member(self, number: int, member: Member) -> None:
        body = loop_body(member, row_variables(self.nest.rows), self.variables)
        self.variables += len(body.loops)
        if isinstance(member.step, Store):
            self._store(member.step, body.loops, body.element, body.place)
        else:
            reduced = body.inner[member.extra :]
            self._reduce(number, member.step, body.loops, body.kept, body.element, body.place, reduced)

    def _store(self, step: Store, loops: Sequence[Var], element: Expr, place: Index) -> None:
        if step.buffer in self.private:
            self._declare_private(step)
        value, target = self._value(element), self._target(step.buffer, place)
        self._open(loops, "#pragma omp simd")
        self._line(f"{target} = {value};")
        self._close(len(loops))

    def _reduce(
        self,
        number: int,
        step: Reduce,
        loops: Sequence[Var],
        kept: int,
        element: Expr,
        place: Index,
        reduced: Sequence[Index],
    ) -> None:
        value, target = self._value(element), self._target(step.buffer, place)
        self._open(loops[:kept], "")
        if step.kind in ("argmax", "argmin"):
            at = self._index(flatten(reduced, step.inner))
            self._find(f"a{number}", f"best{number}", step.kind, element.dtype, value, at, loops[kept:])
        else:
            self._accumulate(f"a{number}", step.kind, step.dtype, value, loops[kept:])
        if step.buffer not in self.private:
            self._line(f"{target} = a{number};")
        self._close(kept)

    def _accumulate(self, total: str, kind: str, dtype: str, value: str, loops: Sequence[Var]) -> None:
        extremum, floating = kind in ("max", "min"), dtype == "f32"
        clause, combined = f"reduction({CLAUSE[kind]}:{total})", COMBINE[kind].format(total, "v" if extremum else value)
        self._line(f"{C_TYPES[dtype]} {total} = {START.get(kind) or _extreme(kind, dtype)};")
        if extremum and floating:
            self._line(f"int {total}_nan = 0;")
            clause, combined = f"{clause} reduction(|:{total}_nan)", f"{combined} {total}_nan |= v != v;"
        self._open(loops, f"#pragma omp simd {clause}")
        if extremum:  # the combination names its operand twice
            self._line(f"const {C_TYPES[dtype]} v = {value};")
        self._line(combined)
        self._close(len(loops))
        if extremum and floating:
            self._infinite(total, kind, value, loops)

    def _infinite(self, total: str, kind: str, element: str, loops: Sequence[Var]) -> None:
        """A vectorised extremum may start from the largest finite number: look again when it ends there. NaN wins."""
        self._line(f"if ({total} == {'-' if kind == 'max' else ''}3.40282347e+38f) {{")
        self.depth += 1
        self._line(f"{total} = {_extreme(kind, dtype='f32')};")
        self._open(loops, "")
        self._line(f"const float v = {element};")
        self._line(COMBINE[kind].format(total, "v"))
        self._close(len(loops) + 1)
        self._line(f"if ({total}_nan) {total} = NAN;")

    def _find(self, at: str, best: str, kind: str, dtype: str, value: str, place: str, loops: Sequence[Var]) -> None:
        """The first place of the largest or smallest value, or of a NaN."""
        self._line(f"{C_TYPES[dtype]} {best} = {_extreme(kind[3:], dtype)};")
        self._line(f"int64_t {at} = 0;")
        self._open(loops, "")
        self._line(f"const {C_TYPES[dtype]} v = {value};")
        better = f"v {'>' if kind == 'argmax' else '<'} {best}"
        if dtype == "f32":
            better += f" || (v != v && {best} == {best})"
        self._line(f"if ({better}) {{ {best} = v; {at} = {place}; }}")
        self._close(len(loops))

    def _declare_private(self, step: Store) -> None:
        size = row_elements(self.nest, step.buffer)
        self._line(f"{C_TYPES[step.dtype]} l{self._private_name(step.buffer)}[{size}] __attribute__((aligned(64)));")

    def _private_name(self, buffer: str) -> int:
        return next(n for n, m in enumerate(self.nest.members) if m.step.buffer == buffer)

    def _target(self, buffer: str, place: Index) -> str:
        if buffer in self.private:
            return self._private_text(Load(buffer, place, "f32"))
        self.certain = set(certain_in(place))
        return f"{self._pointer(buffer)}[{self._index(place)}]"

    def _private_text(self, load: Load) -> str:
        number = self._private_name(load.buffer)
        if isinstance(self.nest.members[number].step, Reduce):
            return f"a{number}"
        rest = row_offset(self.nest, load)
        assert rest is not None
        return f"l{number}[{self._index(rest)}]"

    def _pointer(self, buffer: str) -> str:
        return self.parameters.setdefault(buffer, f"p{len(self.parameters)}")

    def _value(self, element: Expr) -> str:
        self.certain = set(certain(element))
        return self._text(element)

    def _text(self, element: Expr) -> str:
        return c_expression(element, self._load, self._index)

    def _load(self, load: Load) -> str:
        if load.buffer in self.private:
            return self._private_text(load)
        return f"{self._pointer(load.buffer)}[{self._index(load.offset)}]"

    def _index(self, value: Index) -> str:
        return c_text(value, self._atom)

    def _atom(self, a: Atom) -> str:
        if isinstance(a, Size):
            return self.sizes.setdefault(a, f"n{len(self.sizes)}")
        if isinstance(a, Loaded):
            return self._loaded(a)
        assert isinstance(a, Var)
        return a.name

    def _loaded(self, a: Loaded) -> str:
        """A checked read of a position; read once per row when it is read in any case and the same in the whole row."""
        text = self._text(a.expression)
        checked = text if a.limit is None else f"sv_index(t, {text}, {self._index(a.limit)})"
        if a not in self.certain or any(v.name.startswith("i") for v in a.expression.atoms if isinstance(v, Var)):
            return checked
        if checked not in self.hoisted:
            self.hoisted[checked] = f"h{len(self.hoisted)}"
            self._line(f"const int64_t {self.hoisted[checked]} = {checked};")
        return self.hoisted[checked]

    def _open(self, loops: Sequence[Var], pragma: str) -> None:
        for n, variable in enumerate(loops):
            if pragma and n == len(loops) - 1:
                self.lines.append(pragma)
            extent = self._index(variable.extent)
            self._line(f"for (int64_t {variable.name} = 0; {variable.name} < {extent}; {variable.name}++) {{")
            self.depth += 1

    def _close(self, count: int) -> None:
        for _ in range(count):
            self.depth -= 1
            self._line("}")

    def _line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)


def _extreme(kind: str, dtype: str) -> str:
    """The value that every other beats."""
    if dtype in FLOATS:
        return "-INFINITY" if kind == "max" else "INFINITY"
    lowest, highest = LIMITS[dtype]
    return lowest if kind == "max" else highest


def row_elements(nest: LoopNest, buffer: str) -> int | None:
    """Elements of a row of a private buffer."""
    (member,) = nest.written_by(buffer)
    return product(member.inner).constant


def private_buffers(nest: LoopNest, buffers: dict[str, Buffer], readers: dict[str, int]) -> set[str]:
    """Buffers that only this nest touches and whose row part is small enough for the stack, or a single number."""
    private: set[str] = set()
    for member in nest.members:
        buffer = buffers[member.step.buffer]
        if buffer.kind != "arena" or readers.get(buffer.name, 0) != 1 or len(nest.written_by(buffer.name)) != 1:
            continue
        span = product(member.inner[: member.extra] if isinstance(member.step, Reduce) else member.inner).constant
        limit = 1 if isinstance(member.step, Reduce) else MAX_LOCAL_BYTES // BYTES[buffer.dtype]
        if span is not None and span <= limit and _read_after_write(nest, buffer.name):
            private.add(buffer.name)
    return private


def _read_after_write(nest: LoopNest, buffer: str) -> bool:
    """Whether every read of the buffer in the nest is row-aligned."""
    for member in nest.members:
        inner = [atom(Var(f"i{d}", n)) for d, n in enumerate(member.inner)]
        for load in loads(member.element(row_variables(nest.rows), inner)):
            if load.buffer == buffer and row_offset(nest, load) is None:
                return False
    return True


def emit(nest: LoopNest, buffers: dict[str, Buffer], readers: dict[str, int]) -> LoopFunction:
    """The C function of a nest. `readers`: how many kernels touch each buffer."""
    return Emitter(nest, buffers, private_buffers(nest, buffers, readers)).emit()

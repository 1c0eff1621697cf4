"""Kernels + memory plan -> the C function of an entry, and the translation unit of a program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from types import MappingProxyType

from sylvester.codegen.attention import attention_header, records_header
from sylvester.codegen.costs import Cost, cost
from sylvester.codegen.emit_loops import LoopFunction, emit, private_buffers
from sylvester.codegen.formats import format_headers
from sylvester.codegen.index import Atom, Index, Size, index, sum_of
from sylvester.codegen.index_text import c_text
from sylvester.codegen.isa import Isa
from sylvester.codegen.layout import FormatName
from sylvester.codegen.lazy import POSITION, Buffer, Plan, Pointer
from sylvester.codegen.memory import ALIGNMENT, Slot, assign, lifetimes
from sylvester.codegen.prelude import prelude, render
from sylvester.codegen.region import Region
from sylvester.codegen.scalar import C_TYPES
from sylvester.codegen.schedule import ExternCall, Kernel, LoopNest, schedule
from sylvester.codegen.web_candidates import choices

ABI = 2
"""Version of the calling convention of the exported functions; the loader checks it."""
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Arena:
    """The buffers of each slot of an entry by size, and example values of the symbols in them."""

    slots: tuple[tuple[Index, ...], ...]
    hints: Mapping[Size, int]

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes at these sizes, by symbol."""
        values: dict[Atom, Index] = {Size(name): index(n) for name, n in sizes.items()}
        largest = [max(size.substitute(values).constant or 0 for size in slot) for slot in self.slots]
        return sum(-(-n // ALIGNMENT) * ALIGNMENT for n in largest)


@dataclass
class Unit:
    """The C text of a program: functions shared by all entries, then one plan per entry."""

    functions: dict[str, str] = field(default_factory=dict)
    sources: dict[str, None] = field(default_factory=dict)
    formats: set[FormatName] = field(default_factory=set)
    """Of the stored weights; each adds its kernels to the text."""
    plans: list[str] = field(default_factory=list)
    costs: dict[str, tuple[Cost, ...]] = field(default_factory=dict)
    """Of the kernels of every entry, in the order of the plan."""
    arenas: dict[str, Arena] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    """Text of a loop nest -> the nest, of equal ones that with the most work."""

    def add(self, plan: Plan, outputs: Sequence[Buffer], hints: Mapping[Size, int]) -> None:
        """Schedule an entry and append its plan."""
        entry = _Entry(self, plan, outputs, hints)
        self.plans.append(entry.text())
        self.costs[plan.name] = entry.costs
        self.arenas[plan.name] = Arena(tuple(tuple(slot.sizes) for slot in entry.slots), dict(hints))

    def region(self, region: Region) -> None:
        known = self.regions.get(region.function.text)
        if known is None or known.work() < region.work():
            self.regions[region.function.text] = region

    def function(self, text: str) -> str:
        """The name of the function with this text; equal text is emitted once."""
        return self.functions.setdefault(text, f"k{len(self.functions)}")

    def text(self, isa: Isa, claimed: Mapping[str, str] = NOTHING) -> str:
        """The translation unit for one instruction set; `claimed`: text of a loop nest -> what takes its place."""
        uses_attention = any("sv_attention_args" in source for source in self.sources)
        header = [attention_header()] if uses_attention else []
        header += [records_header()] if any("sv_record" in source for source in self.sources) else []
        loops = [claimed.get(text, text).replace("NAME", name, 1) for text, name in self.functions.items()]
        return (
            "\n\n".join(
                [
                    prelude(isa),
                    *format_headers(self.formats, isa),
                    *choices(self.formats, isa),
                    *header,
                    render("plan.h.in"),
                    render("abi.h.in", ABI=ABI),
                    *self.sources,
                    *loops,
                    *self.plans,
                ]
            )
            + "\n"
        )


class _Entry:
    """Emits one plan function."""

    def __init__(self, unit: Unit, plan: Plan, outputs: Sequence[Buffer], hints: Mapping[Size, int]) -> None:
        self.unit, self.plan, self.outputs = unit, plan, outputs
        self.kernels = schedule(plan)
        touched = _touch_counts(self.kernels)
        self.loops = {n: emit(k, plan.buffers, touched) for n, k in enumerate(self.kernels) if isinstance(k, LoopNest)}
        private = [private_buffers(k, plan.buffers, touched) for k in self.kernels if isinstance(k, LoopNest)]
        self.private: set[str] = set().union(*private)
        self.slots = assign(lifetimes(self.kernels, plan.buffers, self.private), plan.buffers, hints)
        self.slot_of = {name: n for n, slot in enumerate(self.slots) for name in slot.buffers}
        self.costs = tuple(cost(kernel, plan.buffers, self.private) for kernel in self.kernels)
        self.hints = hints

    def text(self) -> str:
        pointers = [*(b for kind in ("input", "weight", "state") for b in self.plan.of_kind(kind)), *self.outputs]
        lines = [f"SV_PLAN void sv_plan_{self.plan.name}(const sv_thread *t, void *argument) {{"]
        lines += ["  const sv_call *call = argument;", "  const sv_thread solo = {0, 1, t->team, t->scratch};"]
        lines += [
            "  double *const times = call->times, mark = sv_mark(t, times);",
            "  sv_progress done = {.last_wide = -1};",
            "  (void)done, (void)solo, (void)times, (void)mark;",
            *self._sizes("call->sizes"),
        ]
        lines += [f"  {_pointer_type(b)} *{b.name} = call->buffers[{n}];" for n, b in enumerate(pointers)]
        if self.slots:
            lines += [f"  char *arena = call->buffers[{len(pointers)}];", *self._slot_offsets()]
        for name, n in self.slot_of.items():
            kind = C_TYPES[self.plan.buffers[name].dtype]
            lines.append(f"  {kind} *{name} = ({kind} *)(arena + o{n});")
        lines += self._steps()
        parts = ["\n".join([*lines, "}"]), self._arena(), self._shapes(), self._costs(), self._scratch()]
        parts += [self._profile(), self._run()]
        return "\n\n".join(parts)

    def _sizes(self, source: str) -> list[str]:
        lines = [f"  const int64_t {s.name} = {source}[{n}];" for n, s in enumerate(self.plan.sizes)]
        return [*lines, *(f"  (void){s.name};" for s in self.plan.sizes)]

    def _slot_offsets(self) -> list[str]:
        lines = ["  const int64_t o0 = 0;"]
        for n, slot in enumerate(self.slots[:-1]):
            lines.append(f"  const int64_t o{n + 1} = o{n} + sv_align({_largest(slot)});")
        return lines

    def _arena(self) -> str:
        lines = [f"SV_EXPORT int64_t sv_arena_{self.plan.name}(const int64_t *sizes) {{", *self._sizes("sizes")]
        if not self.slots:
            return "\n".join([*lines, "  return 0;", "}"])
        last = len(self.slots) - 1
        return "\n".join(
            [*lines, *self._slot_offsets(), f"  return o{last} + sv_align({_largest(self.slots[last])});", "}"]
        )

    def _shapes(self) -> str:
        buffers = [*self.plan.of_kind("input"), *self.outputs, *self.plan.of_kind("state")]
        dims = [n for b in buffers for n in b.shape]
        lines = [
            f"SV_EXPORT void sv_shapes_{self.plan.name}(const int64_t *sizes, int64_t *dims) {{",
            *self._sizes("sizes"),
        ]
        lines += [f"  dims[{n}] = {_c(d)};" for n, d in enumerate(dims)]
        return "\n".join([*lines, "}"])

    def _costs(self) -> str:
        """What every kernel computes and moves at these sizes, when `position` positions of the state are filled."""
        arguments = f"const int64_t *sizes, int64_t {POSITION.name}, double *flops, double *bytes"
        lines = [f"SV_EXPORT void sv_costs_{self.plan.name}({arguments}) {{", *self._sizes("sizes")]
        lines.append(f"  (void){POSITION.name};")
        for n, kernel in enumerate(self.costs):
            moved = [f"sv_bytes({_c(part.touched)}, {_c(part.whole)})" for part in kernel.traffic]
            lines.append(f"  flops[{n}] = (double)({_c(kernel.flops)});")
            lines.append(f"  bytes[{n}] = {' + '.join(moved) or '0'};")
        return "\n".join([*lines, "}"])

    def _run(self) -> str:
        arguments = "void *team, const int64_t *sizes, void *const *buffers"
        return (
            f"SV_EXPORT int64_t sv_run_{self.plan.name}({arguments}) {{\n"
            f"  return sv_profile_{self.plan.name}(team, sizes, buffers, NULL);\n}}"
        )

    def _profile(self) -> str:
        arguments = "void *team, const int64_t *sizes, void *const *buffers, double *times"
        head = f"SV_EXPORT int64_t sv_profile_{self.plan.name}({arguments}) {{"
        lines = [head, *self._sizes("sizes"), f"  const int64_t scratch = sv_scratch_{self.plan.name}(sizes);"]
        lines.append("  sv_call call = {sizes, buffers, times};")
        lines.append(f"  const int small = {_c(self._work())} < SV_SMALL;")
        run = "(small ? sv_team_run_alone : sv_team_run)"
        lines.append(f"  return {run}(team, sv_plan_{self.plan.name}, &call, (size_t)scratch);")
        return "\n".join([*lines, "}"])

    def _scratch(self) -> str:
        """Bytes that each thread needs at these sizes."""
        scratch = {k.step.scratch for k in self.kernels if isinstance(k, ExternCall) and k.step.scratch}
        head = f"SV_EXPORT int64_t sv_scratch_{self.plan.name}(const int64_t *sizes) {{"
        lines = [head, *self._sizes("sizes"), "  int64_t scratch = 0;"]
        for function, given in sorted(scratch, key=str):
            bytes_ = f"{function}({', '.join(_c(a) for a in given)})" if given else function
            lines.append(f"  scratch = sv_larger(scratch, (int64_t){bytes_});")
        return "\n".join([*lines, "  return scratch;", "}"])

    def _work(self) -> Index:
        """Multiply-adds, or scalar operations, of all kernels."""
        kernels = enumerate(self.kernels)
        return sum_of(k.step.work if isinstance(k, ExternCall) else self.loops[n].work for n, k in kernels)

    def _steps(self) -> Iterator[str]:
        """Every kernel in order; neighbours of one branch are run together, or not at all."""
        for guard, run in groupby(enumerate(self.kernels), key=lambda item: item[1].guard):
            steps = [(number, self._step(number, kernel)) for number, kernel in run]
            if guard:
                writer = max((n for n, kernel in enumerate(self.kernels) if guard in kernel.writes), default=-1)
                yield f"  SV_MEET({steps[0][0]}, {writer});\n  if ({guard}[0] <= 0) {{"
            yield from (text for _, text in steps)
            if guard:
                yield "  }"

    def _step(self, number: int, kernel: Kernel) -> str:
        if isinstance(kernel, ExternCall):
            self.unit.sources[kernel.step.source] = None
            self.unit.formats |= set(kernel.step.formats)
            arguments = ", ".join(["u", *(_argument(a) for a in kernel.step.arguments)])
            call, work = f"{kernel.step.function}({arguments})", kernel.step.work
        else:
            loop: LoopFunction = self.loops[number]
            self.unit.region(self._region(number, kernel))
            arguments = ", ".join(["u", *loop.buffers, *(s.name for s in loop.sizes)])
            call, work = f"{self.unit.function(loop.text)}({arguments})", loop.work
        return f"  SV_STEP({number}, {self._conflict(number)}, {_c(work)}, {call});"

    def _region(self, number: int, nest: LoopNest) -> Region:
        used = nest.reads | nest.writes
        buffers = {name: self.plan.buffers[name] for name in sorted(used)}
        return Region(nest, buffers, frozenset(self.private & used), self.loops[number], self.hints, self.costs[number])

    def _conflict(self, number: int) -> int:
        """The latest earlier kernel that this one must not overlap with, or -1."""
        reads, writes = self._places(number)
        for earlier in reversed(range(number)):
            read, written = self._places(earlier)
            if writes & (read | written) or reads & written:
                return earlier
        return -1

    def _places(self, number: int) -> tuple[set[str], set[str]]:
        kernel = self.kernels[number]
        return ({self._place(b) for b in kernel.reads}, {self._place(b) for b in kernel.writes})

    def _place(self, buffer: str) -> str:
        return f"slot{self.slot_of[buffer]}" if buffer in self.slot_of else buffer


def _touch_counts(kernels: Sequence[Kernel]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kernel in kernels:
        for name in kernel.reads | kernel.writes:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _pointer_type(buffer: Buffer) -> str:
    const = "const " if buffer.kind in ("input", "weight") else ""
    return const + C_TYPES[buffer.dtype]


def _c(value: Index) -> str:
    return c_text(value, lambda a: a.name if isinstance(a, Size) else "?")


def _largest(slot: Slot) -> str:
    text = _c(slot.sizes[0])
    for other in slot.sizes[1:]:
        text = f"sv_larger({text}, {_c(other)})"
    return text


def _argument(argument: Pointer | Index | str | None) -> str:
    if argument is None:
        return "NULL"
    if isinstance(argument, Pointer):
        return f"{argument.buffer} + {_c(argument.offset)}" if argument.offset.terms else argument.buffer
    return argument if isinstance(argument, str) else _c(argument)

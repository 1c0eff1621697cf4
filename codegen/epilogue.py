"""Elementwise work on the result of a linear layer or a convolution, done on each tile while it is in cache.

y = x W^T;  z = f(y, residual, ...)  ->  z = f(x W^T, residual, ...)   in one kernel
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sylvester.codegen.index import Atom, Index, Loaded, Size, Var, atom, flatten, index, product
from sylvester.codegen.index_text import c_text
from sylvester.codegen.lazy import Extern, Linear, Plan, Step, Store
from sylvester.codegen.reads import step_reads, step_writes
from sylvester.codegen.scalar import C_TYPES, Call, Expr, IndexValue, Load, c_expression

LAST = "column"


@dataclass(frozen=True)
class Finish:
    """The C function of an epilogue, its call, and what the kernel must be given for it."""

    function: str
    call: str
    parameters: str
    buffers: tuple[str, ...]
    sizes: tuple[Index, ...]


def fuse_epilogues(plan: Plan) -> list[Step]:
    """The steps of a plan, with every store that alone reads the result of a linear step or of a kernel that can finish
    its result made part of that step."""
    steps: list[Step | None] = list(plan.steps)
    readers = readers_of(plan.steps)
    for number, step in enumerate(plan.steps):
        at = only_reader(plan, step, readers)
        store = None if at is None else plan.steps[at]
        if at is None or not isinstance(store, Store) or store.guard != step.guard:
            continue
        if _overtaken(plan.steps, number, at, store):
            continue
        joined = _with_epilogue(plan, step, store)
        if joined is not None:
            steps[number], steps[at] = joined, None
    return [step for step in steps if step is not None]


def _with_epilogue(plan: Plan, step: Step, store: Store) -> Step | None:
    if isinstance(step, Linear):
        return replace(step, epilogue=store) if _fits(plan, step, store) else None
    if isinstance(step, Extern) and step.finished is not None and _fits_in_place(plan, step.writes[0], store):
        return step.finished(store)
    return None


def _fits_in_place(plan: Plan, result: str, store: Store) -> bool:
    """Whether every element is made from float32 numbers at the same place of the result and of other tensors."""
    if store.dtype != "f32" or plan.buffers[store.buffer].kind not in ("arena", "output"):
        return False
    indices, place, element = element_of(store)
    if product(store.shape) != product(plan.buffers[result].shape) or place != flatten(indices, store.shape):
        return False
    leaves = list(_leaves(element))
    return all(isinstance(leaf, Load) and leaf.offset == place and leaf.dtype == "f32" for leaf in leaves)


def in_place(store: Store, result: str) -> tuple[str, tuple[str, ...]]:
    """C text of the element j of y after an epilogue that `_fits_in_place`, and the buffers p0, p1, ... it reads."""
    buffers: dict[str, str] = {result: "y"}

    def load(leaf: Load) -> str:
        return f"{buffers.setdefault(leaf.buffer, f'p{len(buffers) - 1}')}[j]"

    text = c_expression(element_of(store)[2], load, str)
    return text, tuple(buffers)[1:]


def readers_of(steps: Sequence[Step]) -> dict[str, set[int]]:
    """Buffer -> the numbers of the steps that read it."""
    readers: dict[str, set[int]] = {}
    for number, step in enumerate(steps):
        for name in step_reads(step):
            readers.setdefault(name, set()).add(number)
    return readers


def only_reader(plan: Plan, step: Step, readers: dict[str, set[int]]) -> int | None:
    """The one step that reads what a step writes."""
    written = step_writes(step)
    found = set().union(*(readers.get(name, set()) for name in written))
    temporary = all(plan.buffers[name].kind == "arena" for name in written)
    return found.pop() if temporary and len(found) == 1 else None


def _overtaken(steps: Sequence[Step], first: int, last: int, store: Store) -> bool:
    """Whether a step in between makes what the store reads, or touches what it writes."""
    reads = step_reads(store)
    between = steps[first + 1 : last]
    return any(step_writes(s) & reads or store.buffer in step_writes(s) | step_reads(s) for s in between)


def _fits(plan: Plan, step: Linear, store: Store) -> bool:
    """Whether every element is made from the same place of the results and of other tensors, or from its column."""
    if store.dtype != "f32" or plan.buffers[store.buffer].kind not in ("arena", "output"):
        return False
    indices, place, element = element_of(store)
    if product(store.shape) != step.m * step.n or place != flatten(indices, store.shape):
        return False
    for leaf in _leaves(element):
        if isinstance(leaf, IndexValue):
            return False
        if leaf.offset == place:
            continue
        if leaf.buffer in step.outputs or store.shape[-1] != step.n or not _by_column(leaf.offset):
            return False
    return True


def _by_column(offset: Index) -> bool:
    names = {v.name for v in offset.variables}
    return names <= {LAST} and not any(isinstance(a, Loaded) for a in offset.atoms)


def element_of(store: Store) -> tuple[list[Index], Index, Expr]:
    """The store at index variables of which the last is named `LAST`; axes of size 1 have the index 0."""
    last = len(store.shape) - 1
    variables = [atom(Var(LAST if d == last else f"e{d}", n)) for d, n in enumerate(store.shape)]
    indices = [index(0) if n.constant == 1 else v for v, n in zip(variables, store.shape, strict=True)]
    return indices, store.place(indices), store.make(indices)


def _leaves(element: Expr) -> Iterator[Load | IndexValue]:
    if isinstance(element, Call):
        for argument in element.arguments:
            yield from _leaves(argument)
    elif isinstance(element, (Load, IndexValue)):
        yield element


_FUNCTION = """SV_INLINE void NAME_finish(const sv_thread *t, float *c0, const float *c1, int64_t ld0, int64_t ld1,
                             int64_t row, int64_t col, int64_t count, const int64_t cols{parameters})
{{
    (void)t, (void)c1, (void)ld1, (void)row, (void)col;
    for (int64_t i = 0; i < count; i++) {{
        #pragma omp simd
        for (int64_t j = 0; j < cols; j++) c0[i * ld0 + j] = {value};
    }}
}}
"""
_CALL = """if (cols == SV_PANEL)
                NAME_finish(t, y + row * n + col, {second}, n, {ld}, row, col, count, SV_PANEL{arguments});
            else NAME_finish(t, y + row * n + col, {second}, n, {ld}, row, col, count, cols{arguments});"""


def finish(store: Store, outputs: tuple[str, ...], n: Index) -> Finish:
    """The C text of an epilogue that `_fits`; tile w of the results is c0, c1, ..."""
    _, place, element = element_of(store)
    buffers: dict[str, str] = {}
    sizes: dict[Size, str] = {}

    def name(a: Atom) -> str:
        if isinstance(a, Size):
            return sizes.setdefault(a, f"s{len(sizes)}")
        return "(col + j)"

    def load(leaf: Load) -> str:
        if leaf.buffer in outputs:
            way = outputs.index(leaf.buffer)
            return f"c{way}[i * ld{way} + j]"
        pointer = buffers.setdefault(leaf.buffer, f"p{len(buffers)}")
        kinds[leaf.buffer] = C_TYPES[leaf.dtype]
        return f"{pointer}[{f'(row + i) * {width} + col + j' if leaf.offset == place else c_text(leaf.offset, name)}]"

    kinds: dict[str, str] = {}
    width = c_text(n, name)
    value = c_expression(element, load, lambda i: c_text(i, name))
    parameters = "".join(f", const {kinds[b]} *{p}" for b, p in buffers.items())
    parameters += "".join(f", int64_t {s}" for s in sizes.values())
    arguments = "".join(f", {a}" for a in (*buffers.values(), *sizes.values()))
    second, ld = ("c", "ld") if len(outputs) > 1 else ("NULL", "0")
    return Finish(
        _FUNCTION.format(parameters=parameters, value=value),
        _CALL.format(second=second, ld=ld, arguments=arguments),
        parameters,
        tuple(buffers),
        tuple(atom(s) for s in sizes),
    )

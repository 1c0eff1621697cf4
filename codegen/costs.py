"""What a kernel costs at least: floating-point operations, and each byte it touches read and written once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sylvester.codegen.index import Index, atom, index, product
from sylvester.codegen.layout import PANEL
from sylvester.codegen.lazy import POSITION, Arithmetic, Buffer, Extern, Lazy, Reduce
from sylvester.codegen.reads import loads
from sylvester.codegen.scalar import BYTES, COSTLY, FLOATS, Call, Expr, IndexValue, Load
from sylvester.codegen.schedule import Kernel, LoopNest, Member, inner_variables, row_variables

INSTANCE = re.compile(r"(_[0-9a-f]{10}|_call)$")
"""The end of a kernel function's name that tells instances of a family apart."""
FREE = ("cast", "where")
"""Scalar functions that compute nothing."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that a kernel reads or writes: what its loops touch, at most the whole buffer."""

    touched: Index
    whole: Index


@dataclass(frozen=True)
class Cost:
    """Of one call. `streams`: it reads weights or state, which other kernels push out of the caches meanwhile."""

    name: str
    labels: tuple[str, ...]
    arithmetic: Arithmetic
    flops: Index
    traffic: tuple[Traffic, ...]
    streams: bool


def cost(kernel: Kernel, buffers: Mapping[str, Buffer], private: set[str]) -> Cost:
    """`private`: buffers that stay on the stack of a loop nest."""
    streams = any(buffers[name].kind in ("weight", "state") for name in kernel.reads)
    if isinstance(kernel, LoopNest):
        labels = _labels(m.step.label for m in kernel.members)
        return Cost("loop", labels, "f32", _nest_flops(kernel), _nest_traffic(kernel, buffers, private), streams)
    step = kernel.step
    flops = 2 * step.work if step.flops is None else step.flops
    name = INSTANCE.sub("", step.function).removeprefix("sv_")
    return Cost(name, _labels([step.label]), step.arithmetic, flops, _extern_traffic(step, buffers), streams)


def _labels(of: Iterable[str]) -> tuple[str, ...]:
    """Each once; a step made for several nodes has several."""
    return tuple(dict.fromkeys(part for label in of for part in label.split("; ") if part))


def _extern_traffic(step: Extern, buffers: Mapping[str, Buffer]) -> tuple[Traffic, ...]:
    if step.bytes is not None:
        return (Traffic(step.bytes, step.bytes),)
    sizes = [stored_bytes(buffers[name]) for name in (*dict.fromkeys(step.reads), *dict.fromkeys(step.writes))]
    return tuple(Traffic(n, n) for n in sizes)


def stored_bytes(buffer: Buffer) -> Index:
    """Bytes in memory; float32 panels of a weight [n, k] are as large as their padding makes them."""
    if not buffer.packed or buffer.dtype != "f32":
        return buffer.nbytes
    features, depth = buffer.shape
    return (features + PANEL - 1) // PANEL * PANEL * depth * BYTES["f32"]


def _nest_flops(nest: LoopNest) -> Index:
    total = index(0)
    for member in nest.members:
        element = member.element(row_variables(nest.rows), inner_variables(member.inner))
        each = operations(element) + isinstance(member.step, Reduce)
        total = total + product(nest.rows) * product(member.inner) * each
    return total


def operations(element: Expr) -> int:
    """Floating-point operations of a scalar expression; a transcendental counts as `COSTLY` says."""
    if not isinstance(element, Call):
        return 0
    own = COSTLY.get(element.function, 1) if element.dtype in FLOATS and element.function not in FREE else 0
    return own + sum(operations(a) for a in element.arguments)


def _nest_traffic(nest: LoopNest, buffers: Mapping[str, Buffer], private: set[str]) -> tuple[Traffic, ...]:
    """Reads of what the nest itself wrote are not counted: rows are in the caches."""
    read: dict[str, dict[Index, Index]] = {}
    written: dict[str, dict[Index, Index]] = {}
    for member in nest.members:
        for load in _member_loads(nest, member):
            if load.buffer not in nest.writes:
                read.setdefault(load.buffer, {})[load.offset] = _touched(load.offset, buffers[load.buffer])
        place = member.place(row_variables(nest.rows), inner_variables(member.inner))
        if member.step.buffer not in private:
            written.setdefault(member.step.buffer, {})[place] = _touched(place, buffers[member.step.buffer])
    sides = [(name, places) for side in (read, written) for name, places in side.items()]
    return tuple(Traffic(sum(places.values(), index(0)), stored_bytes(buffers[name])) for name, places in sides)


def _member_loads(nest: LoopNest, member: Member) -> list[Load]:
    rows, inner = row_variables(nest.rows), inner_variables(member.inner)
    return [*loads(member.element(rows, inner)), *loads(IndexValue(member.place(rows, inner)))]


def _touched(offset: Index, buffer: Buffer) -> Index:
    """Elements that an access can reach: one for every value of the loop variables its offset depends on."""
    return product(v.extent for v in sorted(offset.variables, key=lambda v: v.name)) * BYTES[buffer.dtype]


def attention_costs(q: Lazy, k: Lazy, v: Lazy, *, past: bool, causal: bool) -> tuple[Index, Index]:
    """Flops and bytes of softmax(q k^T) v; with `past` the first POSITION + queries rows of the cache are read.

    Over records keys and values have as many features as queries.
    """
    batch, heads, queries, depth = q.shape
    keys = atom(POSITION) + queries if past else k.shape[2]
    width = depth + (depth if k.dtype == "u8" else v.shape[3])
    pairs = 2 * queries * keys  # twice the (query, key) pairs; a causal query sees no later key
    if causal:
        pairs = pairs - queries * (queries - 1)
    q_and_y = batch * heads * queries * width * BYTES[q.dtype]
    row = (k.shape[3] + v.shape[3]) * BYTES[k.dtype]
    return pairs * batch * heads * width, q_and_y + batch * k.shape[1] * keys * row

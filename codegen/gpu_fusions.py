"""Work before and after linear layers that their kernels do on GPUs, without memory in between.

z = act(x W^T + b);  z = act(x W^T + b) (x U^T + c);  z = y + r;  y = norm(x) W^T   ->   one product with that in it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sylvester.codegen.epilogue import element_of, only_reader, readers_of
from sylvester.codegen.gpu_steps import GpuNorm, GpuProduct, rows_of
from sylvester.codegen.index import Atom, Index, Size, flatten, index, product
from sylvester.codegen.lazy import Plan, Pointer, Step, Store
from sylvester.codegen.reads import step_writes
from sylvester.codegen.scalar import Call, Constant, Expr, Load
from sylvester.compiler.ledger import Fusion

Activation = Literal["none", "silu", "gelu", "gelu_tanh", "relu"]
NAMED: Mapping[str, Activation] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
FLOAT = 4
NORMS = "{} norm into the rows of a linear layer"
SAVED = "elementwise work into the epilogue of a linear layer"


@dataclass(frozen=True)
class Reading:
    """An expression as act(y) * up + residual: what each part reads; without `up` or `residual` there is none."""

    y: Load
    activation: Activation = "none"
    up: Load | None = None
    residual: Load | None = None


def readings(element: Expr) -> Iterator[Reading]:
    """The ways to see an expression so, those with the most in them first."""
    if isinstance(element, Call) and element.function == "add":
        for part, residual in _either(element):
            if isinstance(residual, Load):
                yield from (replace(found, residual=residual) for found in _products(part))
    yield from _products(element)


def _products(element: Expr) -> Iterator[Reading]:
    if isinstance(element, Call) and element.function == "mul":
        for part, up in _either(element):
            if isinstance(up, Load):
                yield from (replace(found, up=up) for found in _activated(part))
    yield from _activated(element)


def _activated(element: Expr) -> Iterator[Reading]:
    if isinstance(element, Load):
        yield Reading(element)
    if isinstance(element, Call) and isinstance(inner := element.arguments[0], Load):
        if element.function in NAMED:
            yield Reading(inner, NAMED[element.function])
        if element.function == "fmax" and element.arguments[1] == Constant(0, "f32"):
            yield Reading(inner, "relu")


def _either(call: Call) -> Iterator[tuple[Expr, Expr]]:
    first, second = call.arguments
    yield first, second
    yield second, first


def fuse(plan: Plan, hints: Mapping[Size, int]) -> list[Fusion]:
    """Put stores and norms into products, and say what was fused; bytes at the sizes `hints`."""
    found: dict[str, list[Index]] = defaultdict(list)
    for fuse_one in (_Fused.store, _Fused.norm):
        fused = _Fused(plan, found)
        for number, step in enumerate(plan.steps):
            fuse_one(fused, number, step)
        plan.steps = [step for step in fused.steps if step is not None]
    values: dict[Atom, Index] = {size: index(n) for size, n in hints.items()}
    return [
        Fusion(plan.name, kind, len(saved), sum(n.substitute(values).constant or 0 for n in saved))
        for kind, saved in found.items()
    ]


class _Fused:
    """The steps of a plan while some become part of others."""

    def __init__(self, plan: Plan, saved: dict[str, list[Index]]) -> None:
        self.plan, self.saved = plan, saved
        self.steps: list[Step | None] = list(plan.steps)
        self.readers = readers_of(plan.steps)
        self.products = {step.y: number for number, step in enumerate(plan.steps) if isinstance(step, GpuProduct)}

    def store(self, number: int, store: Step) -> None:
        """The product that a store ends, in its place, where all elements are made at the same place."""
        if not isinstance(store, Store):
            return
        indices, place, element = element_of(store)
        kind = self.plan.buffers[store.buffer].kind
        if store.dtype != "f32" or kind not in ("arena", "output") or place != flatten(indices, store.shape):
            return
        for found in readings(element):
            loads = [part for part in (found.y, found.up, found.residual) if part is not None]
            if len(loads) == len({load.buffer for load in loads}) and all(
                load.offset == place and load.dtype == "f32" for load in loads
            ):
                parts = [self._product(number, store, load) for load in loads if load is not found.residual]
                if self._join(number, store, found, [part for part in parts if part is not None], len(parts)):
                    return

    def _product(self, number: int, store: Store, load: Load) -> GpuProduct | None:
        """The plain product whose result is read, where it may as well be computed in the place of the store."""
        at = self.products.get(load.buffer, number)
        step = self.steps[at]
        if not isinstance(step, GpuProduct) or step.guard != store.guard or step.form != step.form.plain:
            return None
        whole = product(store.shape) == step.m * step.n
        if not whole or only_reader(self.plan, step, self.readers) != number or store.buffer in step.reads:
            return None
        return step if self._unchanged(step, at, number) else None

    def _unchanged(self, step: GpuProduct | GpuNorm, first: int, last: int) -> bool:
        """Whether what a step reads is not written between two places."""
        between = (s for s in self.steps[first + 1 : last] if s is not None)
        return not any(step_writes(s) & set(step.reads) for s in between)

    def _join(self, number: int, store: Store, found: Reading, parts: Sequence[GpuProduct], wanted: int) -> bool:
        if len(parts) < wanted or not _alike(*parts):
            return False
        main = parts[0]
        pointers = {"y": Pointer(store.buffer, index(0))}
        if found.up is not None:
            names = {"w": "up", "scales": "up_scales", "bias": "up_bias"}
            pointers |= {new: parts[1].pointers[old] for old, new in names.items() if old in parts[1].pointers}
        if found.residual is not None:
            pointers["residual"] = Pointer(found.residual.buffer, index(0))
        form = replace(
            main.form, activation=found.activation, gated=found.up is not None,
            residual="" if found.residual is None else "fp32",
        )  # fmt: skip
        labels = [*(part.label for part in parts), store.label]
        for part in parts:
            self.steps[self.products.pop(part.y)] = None
        self.steps[number] = main.changed(form, pointers, label="; ".join(dict.fromkeys(filter(None, labels))))
        self.products[store.buffer] = number
        self.saved[SAVED].append(2 * FLOAT * main.m * main.n * wanted)
        return True

    def norm(self, number: int, step: Step) -> None:
        """Products that alone read normalised rows normalise them: each for few rows, once for many."""
        if not isinstance(step, GpuNorm) or self.plan.buffers[step.y].kind != "arena":
            return
        readers = self.readers.get(step.y, set())
        found = {at: s for at in readers if isinstance(s := self.steps[at], GpuProduct)}
        if not readers or len(found) < len(readers):
            return
        if not all(_of_rows(s, step) and self._unchanged(step, number, at) for at, s in found.items()):
            return
        pointers = {name: p for name, p in step.pointers.items() if name != "y"}
        for at, s in found.items():
            labels = [step.label, s.label]
            self.steps[at] = s.changed(
                replace(s.form, norm=step.norm), pointers, x_row=step.x_row, label="; ".join(filter(None, labels))
            )
        self.steps[number] = None
        self.saved[NORMS.format(step.norm.kind)].append(2 * FLOAT * step.m * step.k)


def _of_rows(reader: GpuProduct, norm: GpuNorm) -> bool:
    """Whether a product multiplies normalised rows, and reads them for nothing else."""
    rows = [name for name, p in reader.pointers.items() if p.buffer == norm.y]
    whole = reader.pointers["x"] == norm.pointers["y"] and reader.m == norm.m and reader.k == norm.k
    apart = reader.x_row == index(norm.k) or reader.m == index(1)
    return rows == ["x"] and whole and apart and reader.guard == norm.guard


def _alike(first: GpuProduct, second: GpuProduct | None = None) -> bool:
    """Whether two products multiply the same rows by weights of one form."""
    if second is None:
        return True
    return rows_of(first) == rows_of(second) and first.n == second.n and first.form == second.form

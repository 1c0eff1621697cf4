"""What expressions and steps read and write."""

from __future__ import annotations

from collections.abc import Iterator

from sylvester.codegen.index import Index, Loaded, Var, atom
from sylvester.codegen.lazy import Extern, Linear, Reduce, Shape, Step
from sylvester.codegen.scalar import Call, Expr, IndexValue, Load


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


def step_writes(step: Step) -> set[str]:
    """Buffers a step writes."""
    if isinstance(step, Linear):
        return set(step.outputs) if step.epilogue is None else {step.epilogue.buffer}
    return set(step.writes) if isinstance(step, Extern) else {step.buffer}


def step_reads(step: Step) -> set[str]:
    """Buffers a step reads, the flag of its branch among them."""
    return _operands(step) | ({step.guard} if step.guard else set())


def _operands(step: Step) -> set[str]:
    if isinstance(step, Extern):
        return set(step.reads)
    if isinstance(step, Linear):
        own = {b for b in (step.rows.buffer, step.weight, step.bias, step.step, *step.parameters) if b is not None}
        return own | (step_reads(step.epilogue) - set(step.outputs) if step.epilogue else set())
    if isinstance(step, Reduce):
        return {load.buffer for load in loads(step.make(_variables(step.outer, "o"), _variables(step.inner, "i")))}
    indices = _variables(step.shape, "i")
    places = loads(IndexValue(step.place(indices)))
    return {load.buffer for load in (*loads(step.make(indices)), *places)}


def _variables(shape: Shape, letter: str) -> list[Index]:
    return [atom(Var(f"{letter}{d}", n)) for d, n in enumerate(shape)]

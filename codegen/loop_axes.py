"""Which loops a nest's inner axes become: an axis is cut where the body takes quotients and remainders of it."""

from __future__ import annotations

from dataclasses import dataclass

from sylvester.codegen.index import Atom, Index, Quotient, Remainder, Var, atom, flatten, index
from sylvester.codegen.lazy import Shape
from sylvester.codegen.scalar import Expr
from sylvester.codegen.schedule import Member


@dataclass(frozen=True)
class Body:
    """A member as loops around one element: the first `kept` loops choose the result, the rest are reduced.

    `inner`: the position on each inner axis of the member.
    """

    loops: tuple[Var, ...]
    kept: int
    element: Expr
    place: Index
    inner: tuple[Index, ...]


def loop_body(member: Member, rows: list[Index], first: int) -> Body:
    """The loops of a member, called i<first>, i<first + 1>, ..."""
    axes = split_axes(member, rows, member.inner)
    inner: list[Index] = []
    loops: list[Var] = []
    for parts in axes:
        position = index(0)
        for extent in parts:
            variable = Var(f"i{first + len(loops)}", extent)
            loops.append(variable)
            position = position * extent + atom(variable)
        inner.append(position)
    kept = sum(len(parts) for parts in axes[: member.extra])
    return Body(tuple(loops), kept, member.element(rows, inner), member.place(rows, inner), tuple(inner))


def split_axes(member: Member, rows: list[Index], inner: Shape) -> list[list[Index]]:
    """Cut inner axes where the body takes quotients and remainders of them, so that those disappear."""
    axes: list[list[Index]] = [[n] for n in inner]
    for _ in range(4):
        variables = [[atom(Var(f"i{d}_{p}", n)) for p, n in enumerate(parts)] for d, parts in enumerate(axes)]
        positions = [flatten(v, tuple(parts)) for v, parts in zip(variables, axes, strict=True)]
        found = {*member.element(rows, positions).atoms, *member.place(rows, positions).atoms}
        cut = _wanted_cut(found, axes)
        if cut is None:
            return axes
        axis, part, width = cut
        extent = axes[axis][part].constant
        assert extent is not None
        axes[axis][part : part + 1] = [index(extent // width), index(width)]
    return axes


def _wanted_cut(found: set[Atom], axes: list[list[Index]]) -> tuple[int, int, int] | None:
    for a in sorted((a for a in found if isinstance(a, (Quotient, Remainder))), key=str):
        width = a.bottom.constant
        for variable in sorted(a.top.variables, key=lambda v: v.name):
            if not variable.name.startswith("i") or width is None or a.top.coefficient(variable) != index(1):
                continue
            axis, part = (int(n) for n in variable.name[1:].split("_"))
            extent = axes[axis][part].constant
            if extent is not None and extent % width == 0 and extent > width:
                return axis, part, width
    return None

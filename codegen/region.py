"""A generated loop nest as something that another compiler may build instead of our C: what it needs to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sylvester.codegen.costs import Cost, stored_bytes
from sylvester.codegen.emit_loops import LoopFunction
from sylvester.codegen.index import Atom, Index, Size, index
from sylvester.codegen.lazy import Buffer, Store
from sylvester.codegen.scalar import BYTES
from sylvester.codegen.schedule import LoopNest


class Refused(Exception):
    """A compiler has no form for a region; the text says what of."""


@dataclass(frozen=True)
class Region:
    """`function` is our C of the nest, which one call of an entry runs on the sizes `hints`.

    `private`: buffers that only this nest touches, a row at a time.
    """

    nest: LoopNest
    buffers: Mapping[str, Buffer]
    private: frozenset[str]
    function: LoopFunction
    hints: Mapping[Size, int]
    cost: Cost

    def sizes(self, less: int = 0) -> tuple[int, ...]:
        """Values of the symbols that the function takes: those of the example, or less where they are not yet 1."""
        return tuple(max(1, self.hints[size] - less) for size in self.function.sizes)

    def elements(self, buffer: str, sizes: tuple[int, ...]) -> int:
        """Elements of a buffer at these sizes."""
        found = self.buffers[buffer]
        nbytes = _at(stored_bytes(found), self.hints, dict(zip(self.function.sizes, sizes, strict=True)))
        return nbytes // BYTES[found.dtype]

    def work(self) -> int:
        """Scalar operations of a call on the example."""
        return _at(self.function.work, self.hints, {})

    @property
    def rows_in_memory(self) -> list[str]:
        """Private buffers of more than a number: each thread has memory for one row."""
        members = (m.step for m in self.nest.members)
        return [step.buffer for step in members if isinstance(step, Store) and step.buffer in self.private]


def _at(value: Index, hints: Mapping[Size, int], chosen: Mapping[Size, int]) -> int:
    values: dict[Atom, Index] = {size: index(n) for size, n in {**hints, **chosen}.items()}
    return value.substitute(values).constant or 0

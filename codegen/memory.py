"""Arena layout: buffers whose lifetimes do not overlap share a slot; a slot is as large as its largest buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sylvester.codegen.index import Atom, Index, Size, index
from sylvester.codegen.lazy import Buffer
from sylvester.codegen.schedule import Kernel

ALIGNMENT = 64


@dataclass
class Slot:
    """One region of the arena; `free_from` is the first kernel that may write a new buffer there."""

    buffers: list[str] = field(default_factory=list)
    sizes: list[Index] = field(default_factory=list)
    free_from: int = 0
    capacity: int = 0


def lifetimes(
    kernels: Sequence[Kernel], buffers: Mapping[str, Buffer], private: set[str]
) -> dict[str, tuple[int, int]]:
    """(first, last) kernel that touches each arena buffer that needs memory."""
    spans: dict[str, tuple[int, int]] = {}
    for number, kernel in enumerate(kernels):
        for name in sorted(kernel.reads | kernel.writes):
            if buffers[name].kind == "arena" and name not in private:
                spans[name] = (spans.get(name, (number, 0))[0], number)
    return spans


def assign(
    spans: Mapping[str, tuple[int, int]], buffers: Mapping[str, Buffer], hints: Mapping[Size, int]
) -> list[Slot]:
    """Greedy best fit in order of first use; `hints` give typical sizes to compare buffers by."""
    slots: list[Slot] = []
    values: dict[Atom, Index] = {size: index(n) for size, n in hints.items()}
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        need = buffers[name].nbytes.substitute(values).constant or 0
        free = [s for s in slots if s.free_from <= first]
        best = min(free, key=lambda s: (max(need - s.capacity, 0), s.capacity), default=None)
        if best is None or need > 4 * best.capacity:
            best = Slot()
            slots.append(best)
        best.buffers.append(name)
        if buffers[name].nbytes not in best.sizes:
            best.sizes.append(buffers[name].nbytes)
        best.free_from, best.capacity = last + 1, max(best.capacity, need)
    return slots

"""How stored tensors are laid out for the kernels: as they are, one after another, or packed into panels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PANEL = 32
"""Output features of a linear layer in one panel."""

FormatName = Literal["f32", "bf16", "q8", "q4", "q3", "rows", "columns"]
"""Panels of these numbers; of float32 also a weight as it is, by rows, or transposed, by columns."""
Bits = Literal[4, 8, 16]


@dataclass(frozen=True)
class Format:
    """Arithmetic of a linear layer. `group`: depth that shares a weight scale, 0 for one scale per output feature.

    With whole numbers as weights, the rows of the input become whole numbers of `bits`, whose scale is stored when they
    are `static`.
    """

    name: FormatName
    group: int = 0
    bits: Bits = 8
    static: bool = False

    def __str__(self) -> str:
        name = f"{self.name}/{self.group}" if self.group else self.name
        return f"{name}{'' if self.bits == 8 else f' a{self.bits}'}{' static' if self.static else ''}"

    @property
    def quantised(self) -> bool:
        """Whether weights and rows are whole numbers."""
        return self.name in ("q8", "q4", "q3")

    @property
    def floats(self) -> bool:
        """Whether the rows of the input are read as they are."""
        return self.name == "f32" or self.strided

    @property
    def strided(self) -> bool:
        """Whether float32 weights lie by rows or by columns and not in panels."""
        return self.name in ("rows", "columns")

    @property
    def stored(self) -> Format:
        """What the weights are stored for; the same for all kinds of rows."""
        return Format(self.name, self.group)

    @property
    def records(self) -> int:
        """Records of one row of the input: rows of 16 bits are two of 8."""
        return 2 if self.bits == 16 else 1


F32 = Format("f32")


@dataclass(frozen=True)
class Layout:
    """One stored tensor made of one or several weights; `scales` go with quantised weights.

    plain: a single tensor as it is. joined: vectors end to end, a missing one is zeros of its length (`lengths`).
    panels: the rows of all weights end to end in panels of 32; with `ways` > 1 panel p of each weight in turn.
    columns: W^T of a single float32 weight, its rows padded with zeros to whole panels.
    """

    kind: Literal["plain", "joined", "panels", "columns"]
    keys: tuple[str, ...]
    scales: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    format: Format = F32
    ways: int = 1

    @property
    def name(self) -> str:
        """The stored tensor's name: the key of a plain one, else the keys and the arrangement."""
        joined = "+".join(self.keys)
        if self.kind == "plain":
            return joined
        if self.kind == "columns":
            return f"{joined}@columns"
        if self.kind == "joined":
            return f"{joined}@{'+'.join(map(str, self.lengths))}{'' if self.ways == 1 else f'x{self.ways}'}"
        return f"{joined}@{self.format}" + ("" if self.ways == 1 else f"x{self.ways}")


def plain(key: str) -> Layout:
    return Layout("plain", (key,))

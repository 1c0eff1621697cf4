"""What the runtime asks of a GPU, and a device that only takes notes: for tests of plans on machines without one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class Device(Protocol):
    """Addresses are plain numbers; work is done in the order in which it is given."""

    arch: str
    """As "sm_90"."""

    def free_bytes(self) -> int: ...

    def allocate(self, nbytes: int) -> int: ...

    def release(self, address: int) -> None: ...

    def write(self, address: int, array: Array) -> None: ...

    def read(self, address: int, array: Array) -> None:
        """Fills the array, after all work before."""
        ...

    def function(self, image: Path, name: str, shared: int) -> Any: ...

    def launch(
        self, function: Any, grid: tuple[int, ...], warps: int, shared: int, types: tuple[str, ...], values: list[Any]
    ) -> None: ...


@dataclass
class NullDevice:
    """Nothing is computed: what is read is zero."""

    arch: str = "sm_90"
    memory: int = 80 << 30
    launches: list[tuple[str, tuple[int, ...], list[Any]]] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    """Bytes by address."""

    def __post_init__(self) -> None:
        self._next = itertools.count(1)

    def free_bytes(self) -> int:
        return self.memory - sum(self.held.values())

    def allocate(self, nbytes: int) -> int:
        address = next(self._next) << 40
        self.held[address] = nbytes
        return address

    def release(self, address: int) -> None:
        del self.held[address]

    def write(self, address: int, array: Array) -> None:
        self._require(address, array.nbytes)

    def read(self, address: int, array: Array) -> None:
        self._require(address, array.nbytes)
        array.fill(0)

    def function(self, image: Path, name: str, shared: int) -> str:
        assert image.read_bytes()[:4] == b"\x7fELF"
        return name

    def launch(
        self, function: Any, grid: tuple[int, ...], warps: int, shared: int, types: tuple[str, ...], values: list[Any]
    ) -> None:
        for kind, value in zip(types, values, strict=True):
            if kind.startswith("*"):
                self._require(value, 1)
        self.launches.append((function, grid, values))

    def _require(self, address: int, nbytes: int) -> None:
        start = address >> 40 << 40
        held = self.held.get(start, 0)
        if address - start + nbytes > held:
            raise AssertionError(f"{nbytes} bytes at {address - start} of an allocation of {held}")

"""What the runtime asks of a GPU, and a device that only takes notes: for tests of plans on machines without one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sylvester.compiler.errors import CompileError

Array = NDArray[np.generic]


class OutOfMemory(CompileError):
    """The device has not the memory that was asked for."""

    def __init__(self, nbytes: int, free: int) -> None:
        super().__init__(
            f"the device is out of memory: {nbytes / 1e9:.3f} GB were asked for, {free / 1e9:.3f} GB are free",
            hint="use a smaller batch or a shorter length, or free memory of the device",
        )


@dataclass(frozen=True)
class Transfer:
    """Rows of `width` bytes; the next row is a pitch of bytes further, in what is written and in what is read."""

    width: int
    height: int
    to_pitch: int
    from_pitch: int


class Device(Protocol):
    """Addresses are plain numbers; work is done in the order in which it is given."""

    arch: str
    """As "sm_90"."""

    @property
    def stream(self) -> int:
        """What all work is given to, as a number that other libraries know; 0 where there are none."""
        ...

    def free_bytes(self) -> int: ...

    def allocate(self, nbytes: int) -> int:
        """The address of unwritten memory, a multiple of 256; `OutOfMemory` where there is not so much."""
        ...

    def release(self, address: int) -> None: ...

    def write(self, address: int, array: Array) -> None:
        """The array may change right after."""
        ...

    def begin_read(self, address: int, nbytes: int) -> Any:
        """Begins a copy of at most 64 KB to the host, one at a time: work may be given meanwhile."""
        ...

    def end_read(self, coming: Any) -> NDArray[np.uint8]:
        """Waits for that copy, and for no work after it."""
        ...

    def clear(self, address: int, nbytes: int) -> None:
        """Zeros."""
        ...

    def copy(self, target: int, source: int, transfer: Transfer) -> None: ...

    def read(self, address: int, array: Array) -> None:
        """Fills the array, after all work before."""
        ...

    def function(self, image: Path, name: str, shared: int) -> Any: ...

    def launch(
        self, function: Any, grid: tuple[int, ...], warps: int, shared: int, types: tuple[str, ...], values: list[Any]
    ) -> None: ...

    def begin_capture(self) -> None:
        """Launches from here on are noted, and not done; there is nothing else until `end_capture`."""
        ...

    def end_capture(self) -> Any:
        """A graph of what was noted."""
        ...

    def replay(self, graph: Any) -> None: ...

    def forget(self, graph: Any) -> None: ...

    def follow(self, stream: int) -> None:
        """Work from here on begins after what another stream was given so far."""
        ...

    def lead(self, stream: int) -> None:
        """What another stream is given from here on begins after the work so far."""
        ...

    def mark(self) -> Any:
        """A point in time between the work before and after it."""
        ...

    def elapsed(self, first: Any, last: Any) -> float:
        """Milliseconds between two marks, which are used up; waits for the last."""
        ...

    def floats(self, address: int, count: int) -> Any:
        """A tensor of torch over float32 numbers there."""
        ...

    def close(self) -> None:
        """Give back what is kept of memory that was released; the device can be used on."""
        ...


@dataclass
class NullDevice:
    """Nothing is computed: what is read is zero."""

    arch: str = "sm_90"
    memory: int = 80 << 30
    stream: int = 0
    launches: list[tuple[str, tuple[int, ...], list[Any]]] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    """Bytes by address."""
    replays: int = 0

    def __post_init__(self) -> None:
        self._next = itertools.count(1)

    def free_bytes(self) -> int:
        return self.memory - sum(self.held.values())

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.free_bytes():
            raise OutOfMemory(nbytes, self.free_bytes())
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

    def begin_read(self, address: int, nbytes: int) -> int:
        self._require(address, nbytes)
        return nbytes

    def end_read(self, coming: int) -> NDArray[np.uint8]:
        return np.zeros(coming, np.uint8)

    def clear(self, address: int, nbytes: int) -> None:
        self._require(address, nbytes)

    def copy(self, target: int, source: int, transfer: Transfer) -> None:
        self._require(target, (transfer.height - 1) * transfer.to_pitch + transfer.width)
        self._require(source, (transfer.height - 1) * transfer.from_pitch + transfer.width)

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

    def begin_capture(self) -> None:
        self._captured = len(self.launches)

    def end_capture(self) -> int:
        noted = len(self.launches) - self._captured
        del self.launches[self._captured :]
        return noted

    def replay(self, graph: int) -> None:
        self.replays += 1

    def forget(self, graph: int) -> None:
        return None

    def follow(self, stream: int) -> None:
        return None

    def lead(self, stream: int) -> None:
        return None

    def mark(self) -> float:
        return 0.0

    def elapsed(self, first: float, last: float) -> float:
        return last - first

    def floats(self, address: int, count: int) -> Any:
        self._require(address, 4 * count)
        return np.zeros(count, np.float32)

    def close(self) -> None:
        return None

    def _require(self, address: int, nbytes: int) -> None:
        start = address >> 40 << 40
        held = self.held.get(start, 0)
        if address - start + nbytes > held:
            raise AssertionError(f"{nbytes} bytes at {address - start} of an allocation of {held}")

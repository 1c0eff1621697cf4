"""Arrays on a device, with what of numpy the users of caches and outputs need, and memory that is used again."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.device import Device, OutOfMemory, Transfer

Array = NDArray[np.generic]
ALIGNMENT = 256
STEP = 64 << 10
KEPT = 8
"""Pieces of memory that are kept for later use."""


class Memory:
    """`nbytes` from `address` on, which go back to their heap with the last reference."""

    def __init__(self, address: int, nbytes: int, back: Callable[[int, int], None]) -> None:
        self.address, self.nbytes = address, nbytes
        weakref.finalize(self, back, address, nbytes).atexit = False


class Heap:
    """Memory of a device. A size that was held before mostly gets the address that it had: graphs name addresses.

    `settle` waits for all work and raises what kernels reported. Whoever gives work to the device holds `lock`.
    """

    def __init__(self, device: Device, settle: Callable[[], None] = lambda: None) -> None:
        self.device, self.settle, self.lock = device, settle, threading.RLock()
        self._free: list[tuple[int, int]] = []
        self._lent: dict[int, None] = {}
        self._closed = False

    def take(self, nbytes: int) -> Memory:
        size = padded(nbytes)
        with self.lock:
            fitting = min((place for place in self._free if place[1] == size), default=None)
            if fitting:
                self._free.remove(fitting)
                self._follow()
            address = fitting[0] if fitting else self._allocated(size)
            self._drop(KEPT)
        return Memory(address, size, self._back)

    def lend(self, streams: Iterable[int]) -> None:
        """These streams of other software may read what was taken, and still do when it has come back."""
        self._lent |= dict.fromkeys(streams)

    def array(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Fresh memory, unwritten."""
        kind = np.dtype(dtype)
        memory = self.take(math.prod(shape) * kind.itemsize)
        return DeviceArray(self, memory, memory.address, tuple(shape), kind)

    def close(self) -> None:
        """Memory in use is released when its last user goes."""
        with self.lock:
            self._closed = True
            self._drop(0)

    def _allocated(self, size: int) -> int:
        try:
            return self.device.allocate(size)
        except OutOfMemory:
            self._drop(0)
            return self.device.allocate(size)

    def _follow(self) -> None:
        for stream in self._lent:
            self.device.follow(stream)

    def _drop(self, kept: int) -> None:
        while len(self._free) > kept:
            self._follow()
            self.device.release(self._free.pop(0)[0])

    def _back(self, address: int, size: int) -> None:
        """Called by the garbage collector, perhaps while `take` runs: it takes no lock and only appends."""
        if self._closed:
            self._follow()
            self.device.release(address)
        else:
            self._free.append((address, size))


class DeviceArray:
    """Like a numpy array, as far as caches and logits need it; `numpy()` waits, and copies it to the host.

    Indices are whole numbers, slices without steps, None, and one list; whatever else is looked up on the host.
    """

    def __init__(
        self,
        heap: Heap,
        memory: object,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.heap, self.memory, self.address, self.shape, self.dtype = heap, memory, address, shape, dtype
        self.strides = strides_of(shape, dtype.itemsize) if strides is None else strides
        """In bytes."""
        self.contiguous = is_contiguous(shape, self.strides, dtype.itemsize)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3, "shape": self.shape, "typestr": self.dtype.str, "strides": self.strides,
            "data": (self.address if self.size else 0, False), "stream": self.heap.device.stream or None,
        }  # fmt: skip

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def numpy(self) -> Array:
        source = self if self.contiguous else self.copy()
        found: Array = np.empty(self.shape, self.dtype)
        with self.heap.lock:
            if self.size:
                self.heap.device.read(source.address, found)
            self.heap.settle()
        return found

    def rows(self) -> Self:
        """[rows, n], of one memory where that is possible."""
        whole = self if self.contiguous else self.copy()
        shape = (math.prod(self.shape[:-1]), self.shape[-1])
        return whole._view(whole.address, shape, strides_of(shape, self.dtype.itemsize))

    def copy(self) -> Self:
        """In memory of its own, row-major."""
        memory = self.heap.take(self.nbytes)
        made = self._view(memory.address, self.shape, strides_of(self.shape, self.dtype.itemsize))
        made.memory = memory
        made.fill(self)
        return made

    def fill(self, source: DeviceArray) -> None:
        """Copy an array of this shape, or one that is broadcast to it, that does not overlap with this one."""
        missing = self.ndim - source.ndim
        given = zip((1,) * missing + source.shape, (0,) * missing + source.strides, strict=True)
        steps = tuple(0 if n == 1 else step for n, step in given)
        with self.heap.lock:
            for target, origin, transfer in transfers(self.shape, self.strides, steps, self.dtype.itemsize):
                self.heap.device.copy(self.address + target, source.address + origin, transfer)

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if any(not isinstance(k, int | slice | list | None) or getattr(k, "step", None) not in (None, 1) for k in keys):
            return self.numpy()[key]
        lists = [n for n, k in enumerate(keys) if isinstance(k, list)]
        return self._gathered(keys, lists[0]) if lists else self._part(keys)

    def __setitem__(self, key: Any, value: Any) -> None:
        part = self[key]
        if isinstance(value, DeviceArray):
            part.fill(value)
            return
        host = np.ascontiguousarray(np.broadcast_to(value, part.shape), self.dtype)
        sent = self.heap.array(part.shape, self.dtype)
        with self.heap.lock:
            self.heap.device.write(sent.address, host)
            part.fill(sent)

    def _part(self, keys: tuple[Any, ...]) -> Self:
        address, shape, strides = self.address, [], []
        axes = iter(zip(self.shape, self.strides, strict=True))
        for key in (*keys, *[slice(None)] * (self.ndim - sum(k is not None for k in keys))):
            if key is None:
                shape.append(1)
                strides.append(0)
                continue
            n, step = next(axes)
            first, last, _ = key.indices(n) if isinstance(key, slice) else (range(n)[key], 0, 1)
            address += first * step
            if isinstance(key, slice):
                shape.append(max(0, last - first))
                strides.append(step)
        return self._view(address, tuple(shape), tuple(strides))

    def _gathered(self, keys: tuple[Any, ...], place: int) -> Self:
        numbers, before, after = keys[place], keys[:place], keys[place + 1 :]
        axis = sum(not isinstance(k, int) for k in before)
        first = self._part((*before, slice(0, 1), *after))
        shape = (*first.shape[:axis], len(numbers), *first.shape[axis + 1 :])
        memory = self.heap.take(math.prod(shape) * self.dtype.itemsize)
        made = self._view(memory.address, shape, strides_of(shape, self.dtype.itemsize))
        made.memory = memory
        for n, number in enumerate(numbers):
            at = range(self.shape[sum(k is not None for k in before)])[number]
            made._part((*[slice(None)] * axis, slice(n, n + 1))).fill(self._part((*before, slice(at, at + 1), *after)))
        return made

    def _view(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Self:
        made = copy.copy(self)
        made.address, made.shape, made.strides = address, shape, strides
        made.contiguous = is_contiguous(shape, strides, self.dtype.itemsize)
        return made


def transfers(
    shape: Sequence[int], to: Sequence[int], origin: Sequence[int], itemsize: int
) -> Iterator[tuple[int, int, Transfer]]:
    """(offset there, offset here, what is copied) for arrays of a shape with these strides in bytes."""
    if not math.prod(shape):
        return
    axes: list[tuple[int, int, int]] = [(itemsize, 1, 1)]
    for n, there, here in reversed([*zip(shape, to, origin, strict=True)]):
        held, step_there, step_here = axes[-1]
        if n == 1:
            continue
        if (there, here) == (held * step_there, held * step_here):
            axes[-1] = (held * n, step_there, step_here)
        else:
            axes.append((n, there, here))
    width, *rest = axes
    rows = rest.pop(0) if rest and min(rest[0][1:]) >= width[0] else (1, width[0], width[0])
    transfer = Transfer(width[0], *rows)
    for place in product(*(range(n) for n, _, _ in rest)):
        offsets = [sum(i * axis[which] for i, axis in zip(place, rest, strict=True)) for which in (1, 2)]
        yield offsets[0], offsets[1], transfer


def strides_of(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Row-major, in bytes."""
    found = [itemsize]
    for n in reversed(shape[1:]):
        found.insert(0, found[0] * n)
    return tuple(found[: len(shape)])


def is_contiguous(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether it is row-major without gaps; the strides of sizes of 1 do not matter."""
    wanted = zip(shape, strides, strides_of(shape, itemsize), strict=True)
    return 0 in shape or all(n == 1 or found == expected for n, found, expected in wanted)


def padded(nbytes: int) -> int:
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


def stepped(nbytes: int) -> int:
    """At least so many: 64 KB, or at most an eighth more."""
    step = max(STEP, 1 << max(0, nbytes.bit_length() - 4))
    return max(STEP, -(-nbytes // step) * step)

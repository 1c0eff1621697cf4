"""Arrays that start on a cache line and may be read a cache line past their end."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LINE = 64
MEMINFO = Path("/proc/meminfo")


def aligned_empty(shape: Sequence[int], dtype: str) -> NDArray[np.generic]:
    """Uninitialised, 64-byte aligned, with 64 bytes of slack behind."""
    return _place(np.empty(_room(shape, dtype), np.uint8), shape, dtype)


def aligned_zeros(shape: Sequence[int], dtype: str) -> NDArray[np.generic]:
    """Zeros; memory is committed when it is first written."""
    return _place(np.zeros(_room(shape, dtype), np.uint8), shape, dtype)


def small_pages(array: NDArray[np.generic]) -> bool:
    """Have untouched memory of a contiguous array committed in pages of 4 KiB, not of 2 MiB, where Linux can."""
    advice = getattr(mmap, "MADV_NOHUGEPAGE", None)
    start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - start
    if advice is None or length <= 0:
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return int(advise(start, length, advice)) == 0


def aligned(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array itself when it is contiguous on a cache line, else a copy that is."""
    if array.flags.c_contiguous and array.ctypes.data % LINE == 0:
        return array
    copy = aligned_empty(array.shape, array.dtype.name)
    copy[...] = array
    return copy


def available() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return math.inf


def _room(shape: Sequence[int], dtype: str) -> int:
    return prod(shape) * np.dtype(dtype).itemsize + 2 * LINE


def _place(raw: NDArray[np.uint8], shape: Sequence[int], dtype: str) -> NDArray[np.generic]:
    start = -raw.ctypes.data % LINE
    return raw[start : start + prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

"""A mapped file moved into private memory on huge pages: decoding reads every weight once per token, page by page."""

from __future__ import annotations

import mmap

import numpy as np

from sylvester.backends.memory import available
from sylvester.compiler import knobs

PAGE = 1 << 21
LEAST = 1 << 23
"""Smaller files stay mapped: they cost few page walks, and processes share them."""
STEP = 1 << 23
SLACK = 64
"""Kernels may read a cache line past the end of a tensor."""


def moved(mapped: mmap.mmap) -> memoryview | None:
    """The contents of the file, read-only; None where they had better stay mapped.

    Pages of the mapping are let go as they are copied, so that the two are never in memory together.
    """
    size = len(mapped)
    if knobs.HUGE_PAGES.get() == "0" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    if size <= LEAST or not size + STEP < available():
        return None
    region = _region(size + SLACK)
    if region is None:
        return None
    target, source = np.frombuffer(region, np.uint8), np.frombuffer(mapped, np.uint8)
    for start in range(0, size, STEP):
        length = min(STEP, size - start)
        np.copyto(target[start : start + length], source[start : start + length])
        mapped.madvise(mmap.MADV_DONTNEED, start, length)
    return region.toreadonly()


def _region(size: int) -> memoryview | None:
    """Anonymous memory that starts on a huge page; None when the kernel has none to give."""
    try:
        memory = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -np.frombuffer(memory, np.uint8).ctypes.data % PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, size)
    except OSError:
        return None
    return memoryview(memory)[start : start + size]

"""Lengths that prompts are padded to: calls of few sizes occur, and what is prepared for a size serves often."""

from __future__ import annotations

PADDED = "padded"
"""Key of `Program.info`: whether tokens behind those of a prompt change nothing of it."""
SMALL = (1, 16, 32, 64)
STEP, EVEN = 64, 512
"""Multiples of `STEP` up to `EVEN` tokens."""
PARTS = 8
"""Buckets between a power of two and the next one, beyond."""


def bucket(length: int) -> int:
    """The least length that prompts of `length` tokens, 1 or more, are padded to.

    1, 16, 32, 64, every multiple of 64 up to 512, then eight lengths for every doubling: less than an eighth more.
    """
    small = next((n for n in SMALL if length <= n), 0)
    if small:
        return small
    step = STEP if length <= EVEN else (1 << (length - 1).bit_length() - 1) // PARTS
    return -(-length // step) * step


def padding(length: int, room: int) -> int:
    """Tokens to add to `length` where `room` of them fit: none where the bucket does not."""
    whole = bucket(length)
    return whole - length if whole <= room else 0

"""Architectures of NVIDIA GPUs that kernels are built for, and what tells them apart."""

from __future__ import annotations

from collections.abc import Iterable

SHARED = {
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}  # fmt: skip
"""Bytes of shared memory that a program may have: Ampere (A100, others), Ada, Hopper, Blackwell (B200, others)."""
USUAL = ("sm_80", "sm_89", "sm_90")
"""Those that an artefact has code for where none is asked for."""
FLOAT8 = 89
"""The first that multiplies float8 numbers."""
EXACT = 90
"""From here on, code is for one architecture; code of an earlier one runs on the later ones of its major version."""
READ_IN_PLACE = ("sm_90", "sm_100")
"""Tensor cores read their operands from shared memory, so that a stage under way stays there."""


def number_of(arch: str) -> int:
    """As 90 of "sm_90"."""
    return int(arch.removeprefix("sm_"))


def smallest(archs: Iterable[str]) -> str:
    """The architecture with the least shared memory: tiles are chosen for all of them."""
    return min(archs, key=SHARED.__getitem__)


def has_float8(arch: str) -> bool:
    return number_of(arch) >= FLOAT8


def runs(device: str, arch: str) -> bool:
    """Whether a device of one architecture runs machine code for another."""
    own, made = number_of(device), number_of(arch)
    return own == made or (made < own < EXACT and made // 10 == own // 10)


def nearest(capability: tuple[int, int]) -> str | None:
    """The latest architecture that is known and not later than a device; None where none is."""
    held = 10 * capability[0] + capability[1]
    return max((arch for arch in SHARED if number_of(arch) <= held), key=number_of, default=None)


def stages_in_shared(stages: int, arch: str) -> int:
    """Of the stages of a loop, those that lie in shared memory at once."""
    return max(1, stages - (arch not in READ_IN_PLACE))

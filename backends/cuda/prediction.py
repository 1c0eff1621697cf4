"""What an artefact takes of a device's memory, told before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.calls import arena_bytes, dtype_of
from sylvester.backends.cuda.memory import padded
from sylvester.compiler.errors import CompileError
from sylvester.compiler.manifest import Manifest, SlotSpec
from sylvester.compiler.sizes import evaluate, symbols


def require_memory(
    arrays: Mapping[str, NDArray[Any]], entries: Mapping[str, Any], manifest: Manifest, free: int
) -> None:
    """`CompileError` unless weights, caches of one sequence and the arena of a usual call fit."""
    parts = {
        "weights": sum(padded(a.nbytes) for a in arrays.values()),
        "caches of one sequence": sum(_slot_bytes(slot) for slot in manifest.state.values()),
        "tensors of a call": max((arena_bytes(entry, entry["hints"]) for entry in entries.values()), default=0),
    }
    needed = sum(parts.values())
    if needed > free:
        listed = ", ".join(f"{name} {_gigabytes(n)}" for name, n in parts.items())
        raise CompileError(
            f"this artefact takes {_gigabytes(needed)} ({listed}), the device has {_gigabytes(free)} free",
            hint="compile with fewer bits (passes='w4a8'), or free memory of the device",
        )


def _slot_bytes(slot: SlotSpec) -> int:
    """A slot whose symbols are 1: its batch."""
    shape = [evaluate(n, dict.fromkeys(symbols(n), 1)) for n in slot.shape]
    return padded(math.prod(shape) * np.dtype(dtype_of(slot.dtype)).itemsize)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"

"""A call of an entry at fixed sizes: its launches as numbers, but for the addresses of what they work on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sylvester.backends.cuda.memory import padded
from sylvester.codegen.scalar import BYTES
from sylvester.compiler import binding
from sylvester.compiler.errors import InputError
from sylvester.compiler.manifest import EntrySpec, SlotSpec, TensorSpec
from sylvester.compiler.sizes import evaluate

LIMIT = 2**31 - 1
"""The most elements that kernels address in a tensor."""
ARENA, ERROR = "arena", "error"
Values = Mapping[str, int]


@dataclass(frozen=True)
class Launch:
    """An argument is (place, bytes from there), or ("", number); `guard` is a place, or "" for none."""

    kernel: int
    grid: tuple[int, ...]
    arguments: tuple[tuple[str, Any], ...]
    guard: tuple[str, int] | None


@dataclass(frozen=True)
class Call:
    """Shapes and dtypes of outputs by name, bytes of the arena, and the launches in order."""

    entry: str
    values: tuple[int, ...]
    outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    arena: int
    launches: tuple[Launch, ...]
    guarded: bool
    """Whether what is launched depends on numbers of the device."""


def prepared(
    entry: str, data: Mapping[str, Any], spec: EntrySpec, state: Mapping[str, SlotSpec], values: Values
) -> Call:
    """`data` is what the artefact says of the entry. `InputError` where tensors are too large for kernels."""
    tensors = (*spec.inputs, *spec.outputs, *(TensorSpec(n, state[n].dtype, state[n].shape) for n in spec.states))
    for tensor in tensors:
        require_addressable(tensor.name, math.prod(_shape(tensor, values)))
    offsets = _offsets(data, values)
    outputs = {o.name: (_shape(o, values), dtype_of(o.dtype)) for o in spec.outputs}
    launches = tuple(_launch(one, data, offsets, values) for one in data["launches"] if _runs(one, values))
    guarded = any(launch.guard for launch in launches)
    return Call(entry, tuple(values.values()), outputs, offsets[-1], launches, guarded)


def arena_bytes(data: Mapping[str, Any], values: Values) -> int:
    return _offsets(data, values)[-1]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(binding.DTYPES.get(name, name))


def _shape(tensor: TensorSpec, values: Values) -> tuple[int, ...]:
    return tuple(evaluate(n, values) for n in tensor.shape)


def _offsets(data: Mapping[str, Any], values: Values) -> list[int]:
    """Where each slot of the arena begins, and the end."""
    found = [0]
    for sizes in data["slots"]:
        nbytes = max(evaluate(n, values) for n in sizes)
        require_addressable("a tensor of this call", nbytes)
        found.append(found[-1] + padded(nbytes))
    return found


def _runs(launch: Mapping[str, Any], values: Values) -> bool:
    when = launch.get("when")
    fits = when is None or when[1] <= evaluate(when[0], values) <= when[2]
    return fits and all(evaluate(n, values) for n in launch["grid"])


def _launch(launch: Mapping[str, Any], data: Mapping[str, Any], offsets: list[int], values: Values) -> Launch:
    def place(name: str) -> tuple[str, int]:
        buffer = data["buffers"][name]
        return (
            (ARENA, offsets[buffer["slot"]]) if buffer["kind"] == "arena" else (f"{buffer['kind']} {buffer['key']}", 0)
        )

    def argument(given: Any) -> tuple[str, Any]:
        if not isinstance(given, dict):
            return "", given if isinstance(given, float) else evaluate(given, values)
        if "error" in given:
            return ERROR, 0
        at, offset = place(given["buffer"])
        return at, offset + BYTES[data["buffers"][given["buffer"]]["dtype"]] * evaluate(given["offset"], values)

    grid = tuple(evaluate(n, values) for n in launch["grid"])
    guard = place(launch["guard"]) if "guard" in launch else None
    return Launch(launch["kernel"], grid, tuple(argument(a) for a in launch["arguments"]), guard)


def require_addressable(name: str, elements: int) -> None:
    """Kernels count in 32 bits; of memory between kernels every byte counts as one."""
    if elements > LIMIT:
        raise InputError(
            f"{name} has {elements} elements, kernels on GPUs address at most {LIMIT}",
            hint="use a smaller batch or a shorter length",
        )

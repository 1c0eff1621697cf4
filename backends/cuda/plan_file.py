"""What the entries of an artefact launch, as JSON: sizes are expressions of the symbols of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sylvester.codegen.gpu_plan import Argument, ErrorFlag, GpuEntry, Launch
from sylvester.codegen.index import Atom, Index, Quotient, Size
from sylvester.codegen.lazy import Buffer, Pointer


def described(entry: GpuEntry, numbers: Mapping[str, int], hints: Mapping[str, int]) -> dict[str, Any]:
    """`numbers`: the place of a kernel, by its key, among those of the artefact; `hints`: sizes of usual calls."""
    slots = {name: n for n, slot in enumerate(entry.slots) for name in slot.buffers}
    outputs = {b.name for b in entry.outputs}
    return {
        "buffers": {b.name: _buffer(b, slots) for b in entry.buffers.values() if b.name not in outputs}
        | {b.name: _buffer(b, slots) for b in entry.outputs},
        "hints": dict(hints),
        "slots": [[size_text(n) for n in slot.sizes] for slot in entry.slots],
        "launches": [_launch(launch, numbers) for launch in entry.launches],
    }


def _buffer(buffer: Buffer, slots: Mapping[str, int]) -> dict[str, Any]:
    place = {"slot": slots[buffer.name]} if buffer.name in slots and buffer.kind == "arena" else {}
    return {"kind": buffer.kind, "key": buffer.key, "dtype": buffer.dtype, **place}


def _launch(launch: Launch, numbers: Mapping[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kernel": numbers[launch.kernel.key],
        "grid": [size_text(n) for n in launch.grid],
        "arguments": [_argument(a) for a in launch.arguments],
        "label": launch.label,
    }
    found |= {"guard": launch.guard} if launch.guard else {}
    return found | ({"when": [size_text(launch.when[0]), *launch.when[1:]]} if launch.when else {})


def _argument(argument: Argument) -> Any:
    if isinstance(argument, Pointer):
        return {"buffer": argument.buffer, "offset": size_text(argument.offset)}
    if isinstance(argument, ErrorFlag):
        return {"error": True}
    return size_text(argument) if isinstance(argument, Index) else argument


def size_text(value: Index) -> int | str:
    """A number, or an expression that `compiler.sizes.evaluate` reads."""
    if value.constant is not None:
        return value.constant
    terms = []
    for monomial, coefficient in value.terms:
        terms.append("*".join([str(coefficient), *(_atom(a) for a in monomial)]))
    return " + ".join(terms)


def _atom(a: Atom) -> str:
    if isinstance(a, Size):
        return a.name
    sign = "//" if isinstance(a, Quotient) else "%"
    return f"(({size_text(a.top)}) {sign} ({size_text(a.bottom)}))"  # type: ignore[union-attr]


@dataclass(frozen=True)
class StoredKernel:
    """A cubin by architecture, and how it is started; `types` of its arguments in order."""

    function: str
    types: tuple[str, ...]
    warps: int
    shared: Mapping[str, int]
    files: Mapping[str, str]

"""Arrays of other software that live on a GPU, by `__cuda_array_interface__`; torch is used only if it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sylvester.compiler.arrays import is_tensor
from sylvester.compiler.errors import InputError

INTERFACE = "__cuda_array_interface__"


@dataclass(frozen=True)
class Foreign:
    """Memory of a GPU that its owner keeps: strides in bytes, None for row-major ones."""

    owner: object
    address: int
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None


def on_device(value: object) -> bool:
    """Whether it is an array on a GPU."""
    return value.device.type == "cuda" if is_tensor(value) else hasattr(value, INTERFACE)  # type: ignore[attr-defined]


def foreign(name: str, value: Any) -> Foreign:
    """Where an array on a GPU is; bfloat16 becomes uint16. `InputError` for another GPU than the first."""
    if is_tensor(value):
        import torch

        if value.device.index:
            raise InputError(
                f"input {name!r} is on {value.device}, expected cuda:0", hint="move it with `.to('cuda:0')`"
            )
        value = value.detach()
        if value.dtype == torch.bfloat16:
            return replace(foreign(name, value.view(torch.int16)), dtype="<u2")
    found = getattr(value, INTERFACE)
    return Foreign(value, found["data"][0], tuple(found["shape"]), found["typestr"], found.get("strides"))


def streams(values: Iterable[Any]) -> list[int]:
    """The streams in which these arrays are made ready and read: torch's current one, or what their owners say."""
    found: dict[int, None] = {}
    for value in values:
        if is_tensor(value):
            found[sys.modules["torch"].cuda.current_stream(value.device).cuda_stream] = None
        elif (stream := getattr(value, INTERFACE).get("stream")) is not None:
            found[int(stream)] = None
    return list(found)


def to_device_tensors(outputs: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Torch tensors over the memory of outputs on a device, which they keep."""
    import torch

    made = {name: torch.as_tensor(array, device="cuda") for name, array in outputs.items()}
    return {n: t.view(torch.bfloat16) if dtypes[n] == "bfloat16" else t for n, t in made.items()}

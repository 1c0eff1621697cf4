"""Write a safetensors file whose data starts on a 64-byte boundary, one piece of a tensor in memory at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "BF16", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
FLOAT8 = "float8_e4m3fn"
"""A type that numpy lacks: the arrays hold its bits, as uint8."""


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when its turn comes: whole, or piece by piece along its first axis."""

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], NDArray[Any] | Iterator[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    @property
    def itemsize(self) -> int:
        return 1 if self.dtype == FLOAT8 else np.dtype(self.dtype).itemsize


def write_tensors(path: Path, tensors: Mapping[str, Deferred]) -> None:
    """Tensors whose size is a multiple of 64 bytes come first, then by falling item size: elements are aligned."""
    ordered = sorted(
        tensors.items(),
        key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].itemsize),
    )
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            made = tensor.make()
            for piece in [made] if isinstance(made, np.ndarray) else made:
                file.write(np.ascontiguousarray(piece).data)

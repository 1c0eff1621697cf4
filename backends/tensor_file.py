"""A safetensors file as numpy arrays: mapped from disk at once, brought into memory when they are about to be used."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.huge_pages import moved
from sylvester.compiler.errors import ArtefactError

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
    "F8_E4M3": "uint8",
}  # fmt: skip
PREFIX = 8


class TensorFile:
    """A mapped file and its arrays by name, read-only; bfloat16 appears as uint16, float8 as uint8."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._header, self._start = _header(path, self._mapped)
        self.arrays = self._placed(self._mapped)

    def read(self) -> None:
        """Bring the tensors into memory, on huge pages where that is possible."""
        region = moved(self._mapped)
        if region is not None:
            self.arrays = self._placed(region)

    def _placed(self, data: mmap.mmap | memoryview) -> dict[str, NDArray[np.generic]]:
        tensors = {name: spec for name, spec in self._header.items() if name != "__metadata__"}
        return {name: _array(self.path, name, spec, data, self._start) for name, spec in tensors.items()}


def map_tensors(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read-only arrays by name, mapped from the file; bfloat16 appears as uint16, float8 as uint8."""
    return TensorFile(path).arrays


def _header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    size = struct.unpack("<Q", mapped[:PREFIX])[0] if len(mapped) >= PREFIX else len(mapped)
    try:
        header = json.loads(mapped[PREFIX : PREFIX + size])
    except ValueError as error:
        raise ArtefactError(f"{path} has no safetensors header: {error}") from error
    return dict(header), PREFIX + size


def _array(
    path: Path, name: str, spec: dict[str, Any], data: mmap.mmap | memoryview, start: int
) -> NDArray[np.generic]:
    first, last = spec["data_offsets"]
    if spec["dtype"] not in DTYPES:
        raise ArtefactError(f"{path}: tensor {name!r} has dtype {spec['dtype']}, expected one of {sorted(DTYPES)}")
    dtype = np.dtype(DTYPES[spec["dtype"]])
    if start + last > len(data) or (last - first) % dtype.itemsize:
        raise ArtefactError(f"{path}: tensor {name!r} ends at byte {start + last}, the file has {len(data)}")
    count = (last - first) // dtype.itemsize
    return np.frombuffer(data, dtype, count, start + first).reshape(spec["shape"])

"""A safetensors file as numpy arrays mapped from disk: no copy, pages are read when a kernel touches them."""

from __future__ import annotations

import json
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.compiler.errors import ArtefactError

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip
PREFIX = 8


def map_tensors(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read-only arrays by name; bfloat16 appears as uint16."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header, start = _header(path, mapped)
    return {name: _array(path, name, spec, mapped, start) for name, spec in header.items() if name != "__metadata__"}


def _header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    size = struct.unpack("<Q", mapped[:PREFIX])[0] if len(mapped) >= PREFIX else len(mapped)
    try:
        header = json.loads(mapped[PREFIX : PREFIX + size])
    except ValueError as error:
        raise ArtefactError(f"{path} has no safetensors header: {error}") from error
    return dict(header), PREFIX + size


def _array(path: Path, name: str, spec: dict[str, Any], mapped: mmap.mmap, start: int) -> NDArray[np.generic]:
    first, last = spec["data_offsets"]
    if spec["dtype"] not in DTYPES:
        raise ArtefactError(f"{path}: tensor {name!r} has dtype {spec['dtype']}, expected one of {sorted(DTYPES)}")
    dtype = np.dtype(DTYPES[spec["dtype"]])
    if start + last > len(mapped) or (last - first) % dtype.itemsize:
        raise ArtefactError(f"{path}: tensor {name!r} ends at byte {start + last}, the file has {len(mapped)}")
    count = (last - first) // dtype.itemsize
    return np.frombuffer(mapped, dtype, count, start + first).reshape(spec["shape"])

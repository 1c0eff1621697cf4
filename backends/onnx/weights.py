"""One file of weights for all graphs: tensors in the form that ops read them, each stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from sylvester.backends.onnx.graph import numpy_of
from sylvester.compiler.program import Program

FILE = "weights.bin"
ALIGNED = 64


@dataclass(frozen=True)
class Form:
    """How a weight is stored: `make` turns it into the array; `name` tells forms of one weight apart, "" as it is."""

    name: str = ""
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor
    int4: bool = False
    """Whether the array is whole numbers of 4 bits, two to a byte along the last axis."""


PLAIN = Form()
TRANSPOSED = Form("transposed", lambda tensor: tensor.t())


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


class Store:
    """The tensors that graphs have asked for. `write` puts them into the file; equal bytes share a place."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program, self.folder = program, folder
        self._values: dict[str, tuple[ir.DataType, tuple[int, ...], Place]] = {}
        self._places: dict[tuple[bytes, int], Place] = {}
        self._file = (folder / FILE).open("wb")
        self.unique = 0
        """Bytes of what is stored, without what aligns it."""

    def add(self, key: str, form: Form = PLAIN) -> str:
        """Store a weight; its name in the graphs."""
        key = self.program.weights.resolve(key)
        name = f"{key}.{form.name}" if form.name else key
        if name not in self._values:
            self.put(name, form.make(self.program.weights[key]), form.int4)
        return name

    def put(self, name: str, tensor: Tensor, int4: bool = False) -> str:
        """Store a tensor under a name of its own."""
        if name not in self._values:
            array, dtype, shape = _stored(tensor, int4)
            self._values[name] = dtype, shape, self._place(array)
        return name

    def made(self, name: str, make: Callable[[], Tensor]) -> str:
        """Store what is made, once, under a name of its own."""
        return name if name in self._values else self.put(name, make())

    def value(self, name: str) -> ir.Value:
        """A fresh initializer that lies in the file."""
        dtype, shape, place = self._values[name]
        tensor = ir.ExternalTensor(
            FILE, place.offset, place.length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.folder
        )
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)

    def close(self) -> None:
        self._file.close()

    def _place(self, array: NDArray[Any]) -> Place:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        key = (hashlib.sha256(data.data).digest(), data.nbytes)
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNED))
            self._places[key] = Place(self._file.tell(), data.nbytes)
            self._file.write(data.data)
            self.unique += data.nbytes
        return self._places[key]


def _stored(tensor: Tensor, int4: bool) -> tuple[NDArray[Any], ir.DataType, tuple[int, ...]]:
    """The bytes, their type in ONNX and the shape."""
    shape = tuple(tensor.shape)
    if int4:
        flat = tensor.reshape(-1).to(torch.uint8) & 15
        packed = flat[::2] | flat[1::2] << 4 if len(flat) % 2 == 0 else _odd(flat)
        return numpy_of(packed), ir.DataType.INT4, shape
    if tensor.dtype == torch.bfloat16:
        return numpy_of(tensor.contiguous().view(torch.uint16)), ir.DataType.BFLOAT16, shape
    array = numpy_of(tensor)
    return array, ir.DataType.from_numpy(array.dtype), shape


def _odd(flat: Tensor) -> Tensor:
    padded = torch.cat((flat, flat.new_zeros(1)))
    return padded[::2] | padded[1::2] << 4

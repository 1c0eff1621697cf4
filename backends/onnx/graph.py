"""An ONNX graph while it is written: every call once, constants by their value."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

CONTRIB = "com.microsoft"
TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}
Known = dict[object, tuple[ir.Value, ...]]


class Graph:
    """Nodes in order. A call with the inputs and attributes of an earlier one is that one."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.label = ""
        """What the values that are made carry in their names: the node of the program they stand for."""
        self.constants: dict[object, ir.Value] = {}
        self._nodes: list[list[ir.Node]] = [[]]
        self._known: list[Known] = [{}]
        self._names: dict[str, int] = {}

    @property
    def nodes(self) -> list[ir.Node]:
        return self._nodes[-1]

    def call(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The only result of an op."""
        return self.calls(op, *inputs, count=1, domain=domain, **attributes)[0]

    def calls(
        self,
        op: str,
        *inputs: ir.Value | None,
        count: int,
        domain: str = "",
        unread: Collection[int] = (),
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """All results of an op; attributes that are None, and inputs at the end, are left out.

        Results that are `unread` have no name: a runtime does not make them.
        """
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = {name: x for name, x in attributes.items() if x is not None}
        key = (domain, op, tuple(map(id, inputs)), count, tuple((n, _frozen(x)) for n, x in sorted(given.items())))
        for known in self._known:
            if key in known:
                return known[key]
        outputs = tuple(ir.Value(name="" if n in unread else self._fresh()) for n in range(count))
        named = ir.convenience.convert_attributes(given)
        node = ir.Node(domain, op, inputs, named, outputs=outputs, name=f"{outputs[0].name}.{op}")
        self.nodes.append(node)
        self._known[-1][key] = outputs
        return outputs

    def constant(self, array: Any, dtype: Any = None) -> ir.Value:
        """A small array that stands in the graph itself."""
        array = np.asarray(array, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            value = ir.Value(name=f"constant/{len(self.constants)}", const_value=ir.tensor(array))
            self.constants[key] = _typed(value, ir.DataType.from_numpy(array.dtype), array.shape)
        return self.constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(numbers, np.int64)

    def number(self, number: Any, dtype: torch.dtype) -> ir.Value:
        """A constant of no axes."""
        if dtype in (torch.float16, torch.bfloat16):
            return self.call("Cast", self.constant(number, np.float32), to=TYPES[dtype])
        return self.constant(number, TYPES[dtype].numpy())

    @contextmanager
    def branch(self) -> Iterator[list[ir.Node]]:
        """Calls go to the nodes of a branch, which may read what was made before it."""
        self._nodes.append([])
        self._known.append({})
        try:
            yield self._nodes[-1]
        finally:
            self._nodes.pop()
            self._known.pop()

    def _fresh(self) -> str:
        count = self._names.get(self.label, 0)
        self._names[self.label] = count + 1
        return f"{self.label}/{count}"


def _frozen(x: Any) -> object:
    return tuple(x) if isinstance(x, Sequence) and not isinstance(x, str) else x


def _typed(value: ir.Value, dtype: ir.DataType, shape: Sequence[Any]) -> ir.Value:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value


def described(value: ir.Value, dtype: torch.dtype, shape: Sequence[Any]) -> ir.Value:
    """The value with its type and shape; sizes are numbers or texts."""
    return _typed(value, TYPES[dtype], shape)


def numpy_of(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().contiguous().numpy()

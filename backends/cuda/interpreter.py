"""Triton's interpreter with the conversions and products of 16 and 8 bits that GPUs have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FORMATS = {
    "bf16": (np.int16, np.uint16, torch.bfloat16, float("inf")),
    "fp8e4nv": (np.int8, np.uint8, torch.float8_e4m3fn, 448.0),
}
"""Floats that numpy lacks: as it holds them, signed and not, in torch, and the largest that others become."""
Array = NDArray[Any]


@contextmanager
def rounding() -> Iterator[None]:
    """Conversions to and from `FORMATS` are to nearest, ties to even, and `tl.dot` multiplies what they stand for,
    and whole numbers exactly.

    Triton 3.9 cuts off what bfloat16 does not hold, loses the carry of float8, and multiplies the bits of bfloat16.
    """
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = {name: getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot")}

    def cast(self: Any, x: Any, dtype: Any) -> Any:
        return converted(self, x, dtype) if _concerns(x, dtype) else plain["cast_impl"](self, x, dtype)

    def between_floats(self: Any, x: Any, dtype: Any, rounded: Any) -> Any:
        return converted(self, x, dtype) if _concerns(x, dtype) else plain["create_fp_to_fp"](self, x, dtype, rounded)

    def converted(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar.name not in FORMATS and dtype.scalar.name in FORMATS:
            return TensorHandle(_narrow(x.data, dtype.scalar.name), dtype.scalar)
        wide = TensorHandle(_wide(x), language.float32)
        return cast(self, wide, dtype) if dtype.scalar.name != "fp32" else wide

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        wide = np.float32 if d.data.dtype == np.float32 else np.float64
        product = np.matmul(_wide(a).astype(wide), _wide(b).astype(wide))
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    corrected = {"cast_impl": cast, "create_fp_to_fp": between_floats, "create_dot": dot}
    try:
        _set(InterpreterBuilder, corrected)
        yield
    finally:
        _set(InterpreterBuilder, plain)


def _concerns(x: Any, dtype: Any) -> bool:
    return x.dtype.scalar.name in FORMATS or dtype.scalar.name in FORMATS


def _set(owner: Any, functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        setattr(owner, name, function)


def _wide(x: Any) -> Array:
    """float32 for `FORMATS`, else as it is."""
    if x.dtype.scalar.name not in FORMATS:
        return np.asarray(x.data)
    signed, _, dtype, _ = FORMATS[x.dtype.scalar.name]
    bits = torch.from_numpy(np.ascontiguousarray(x.data).view(signed))
    return bits.view(dtype).float().numpy()


def _narrow(data: Array, name: str) -> Array:
    _, unsigned, dtype, largest = FORMATS[name]
    wide = torch.from_numpy(np.array(data, np.float32)).clamp(-largest, largest)
    bits = wide.to(dtype).view(torch.int16 if dtype.itemsize == 2 else torch.int8)
    return bits.numpy().view(unsigned)

"""Which float types a target computes with: float32 everywhere, short floats in the ops that are made for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from sylvester.compiler import quantized_ops as ops
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.program import Program, binding

READERS: Mapping[torch.dtype, Collection[Any]] = {
    torch.bfloat16: (ops.linear_bf16.target, ops.widen_bf16.target),
    torch.float16: (ops.linear_fp16.target, ops.widen_fp16.target),
    torch.float8_e4m3fn: (ops.linear_fp8.target, ops.dequantize_fp8.target),
}
"""The ops that weights of a short float are for."""


def require_float32(program: Program, target: str, short: Collection[torch.dtype] = (torch.bfloat16,)) -> None:
    """`Unsupported` for weights in other floats than float32, but in `short` ones that only the ops for them read."""
    for entry in program.entries.values():
        for weight in entry.placeholders("weight"):
            _require(weight, program.weights[binding(weight).key].dtype, target, short)


def _require(weight: fx.Node, dtype: torch.dtype, target: str, short: Collection[torch.dtype]) -> None:
    if dtype not in (torch.float64, *READERS):
        return
    found = f"{binding(weight).key!r} is {dtype}"
    if not all(user.target in READERS.get(dtype, ()) for user in weight.users):
        raise Unsupported(
            f"the {target} target computes in float32, found weights of other float types: {found}",
            hint="call model.float() before compiling, then a pass such as 'bf16' for smaller weights",
        )
    if dtype not in short:
        raise Unsupported(
            f"the {target} target has no linear layers with weights in {str(dtype).removeprefix('torch.')}: {found}",
            hint="round to int8 (passes='w8a8') or bfloat16 (passes='bf16'), or compile for the target cuda",
        )

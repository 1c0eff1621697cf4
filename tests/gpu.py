"""How tests run a kernel for GPUs: by Triton's interpreter, and built for the usual architectures."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from sylvester.backends.cuda.compile import build
from sylvester.backends.cuda.modules import interpret, load
from sylvester.codegen.gpu_architectures import SHARED, USUAL
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_plan import GpuEntry
from sylvester.codegen.sparse import pack_columns

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


def types_of(arguments: dict[str, Any]) -> dict[str, str]:
    """Triton's types of tensors, whole numbers (32 bits) and floats."""

    def name(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"

    return {key: name(value) for key, value in arguments.items()}


def with_columns(entry: GpuEntry, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by key, and those weights that an entry reads transposed."""
    layouts = [b.layout for b in entry.buffers.values() if b.layout is not None and b.layout.kind == "columns"]
    packed = {x.name: torch.from_numpy(pack_columns(tensors[x.keys[0]].numpy())) for x in layouts}
    return {**tensors, **packed}


def run(kernel: Kernel, grid: tuple[int, ...], **arguments: Any) -> None:
    """Writes into the tensors among the arguments, which must have the types that the kernel was made for."""
    assert types_of(arguments) == dict(kernel.types)
    names = inspect.signature(getattr(load(kernel.text, interpreted=True), kernel.function).fn).parameters
    assert list(kernel.types) == [name for name in names if name in kernel.types]  # as they are passed on a device
    interpret(kernel, grid, arguments)


def builds(kernel: Kernel, architectures: tuple[str, ...] = USUAL) -> None:
    """The kernel has machine code for these architectures."""
    for arch in architectures:
        made = build(kernel, arch)
        assert made.image[:4] == b"\x7fELF"
        assert made.shared <= SHARED[arch]

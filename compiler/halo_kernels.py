"""What computes the products of training: kernels of this project on CPUs and GPUs, or a simulation, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from sylvester.compiler import registry
from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_quantise import format_of

KERNELS = "sylvester.backends.halo:kernels"
GPU_PRODUCTS = "sylvester.backends.cuda.training:products"
PLAIN = (Tensor, Parameter)


def library() -> Any:
    """The kernels for this CPU, reached by name, or the `CompileError` that says why there are none."""
    return registry.resolve(KERNELS)()


def gpu_products(device: torch.device) -> Any:
    """The products of a GPU, reached by name, or the `CompileError` that says why there are none."""
    return registry.resolve(GPU_PRODUCTS)(device.index or 0)


def library_for(*operands: Tensor | None) -> Any | None:
    """The kernels where they may take these; None where operands are traced or on another device, or there are none.

    A graph that is traced holds the ops that the kernels stand for.
    """
    return _present(library()) if _are_plain(operands, "cpu") else None


def multiplier_for(*operands: Tensor) -> Any | None:
    """What has a `product` of these matrices, on CPUs and GPUs."""
    if _are_plain(operands, "cuda"):
        return _present(gpu_products(operands[0].device))
    return library_for(*operands)


def _are_plain(operands: Sequence[Tensor | None], device: str) -> bool:
    given = [x for x in operands if x is not None]
    traced = _get_current_dispatch_mode() is not None
    return not traced and all(type(x) in PLAIN and x.device.type == device for x in given)


def _present(found: Any) -> Any | None:
    return None if isinstance(found, CompileError) else found


def has_tiles() -> bool:
    """Whether PyTorch multiplies int8 by AMX tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def arithmetic(format: str, device: torch.device) -> str:
    """What multiplies in a format on a device, and why it is a simulation where it is one."""
    if device.type == "cuda":
        return _arithmetic_of_gpu(format, gpu_products(device))
    if device.type != "cpu":
        return f"simulated in float32: there are no kernels for {device.type}"
    if not format_of(format).whole:
        return f"simulated in float32: CPUs do not multiply {format}"
    found = library()
    if not isinstance(found, CompileError) and found.multiplies:
        return f"int8 {'tiles' if found.variant == 'amx' else 'dot products'} of this CPU ({found.variant})"
    if has_tiles():
        return "int8 tiles (AMX) of PyTorch, rotations by its ops"
    if isinstance(found, CompileError):
        return f"simulated in float32: {found.message}"
    return f"simulated in float32: this CPU ({found.variant}) has no dot products of bytes"


def _arithmetic_of_gpu(format: str, found: Any) -> str:
    if isinstance(found, CompileError):
        return f"simulated in float32: {found.message}"
    if format not in found.formats:
        return f"simulated in float32: GPUs of {found.variant} do not multiply {format}"
    return f"{'fp8' if format == 'fp8' else 'int8'} products of Triton ({found.variant})"

"""The products of training on NVIDIA GPUs: int8 and fp8 matrices by this project's kernels, launched by Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sylvester.backends.cuda.modules import load, require_triton
from sylvester.codegen.gpu_architectures import has_float8, nearest
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.gpu_matmul import DEEPEST, Linear, grid, kernel
from sylvester.codegen.gpu_matmul_space import tiles
from sylvester.compiler.errors import CompileError, ToolchainMissing, Unsupported

Launch = Callable[[Kernel, tuple[int, ...], Mapping[str, Any]], None]
TYPES = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}


class Products:
    """Of one architecture; what it does not multiply gives None."""

    def __init__(self, arch: str, launch: Launch) -> None:
        self.variant, self._launch = arch, launch
        self.formats = ("int8", "int4", "fp8") if has_float8(arch) else ("int8", "int4")

    def product(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor | None:
        """scale * (a b) in float32 of a [m, k] and b [k, n]."""
        (m, k), n = a.shape, b.shape[1]
        kind = TYPES.get(a.dtype)
        if kind is None or b.dtype != a.dtype or not m * n * k or k > DEEPEST:
            return None
        if kind == "fp8e4nv" and "fp8" not in self.formats:
            return None
        linear = Linear(kind, kind, "fp32", rounding="given")
        tile = replace(tiles(linear, m, n, k, self.variant)[0], splits=1)
        y = torch.empty((m, n), device=a.device)
        arguments = {
            "x": a.contiguous(), "w": b.t().contiguous(), "y": y, "scales": torch.ones(n, device=a.device),
            "x_scales": scale.detach().expand(m).contiguous(), "m": m, "n": n, "k": k, "x_row": k, "w_row": k,
            "y_row": n, "residual_row": 0,
        }  # fmt: skip
        self._launch(kernel(linear, tile, k), grid(tile, m, n), arguments)
        return y


def launch(made: Kernel, programs: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    """Compiles a kernel at its first use and starts it on the stream of PyTorch."""
    function: Any = getattr(load(made.text, interpreted=False), made.function)[programs]
    function(**arguments, **made.constants, num_warps=made.warps, num_stages=made.stages)


@cache
def products(device: int) -> Products | CompileError:
    """The products of a GPU by its number, or why there are none."""
    try:
        require_triton()
        return Products(_architecture(torch.cuda.get_device_capability(device)), launch)
    except (ToolchainMissing, Unsupported) as error:
        return error


def _architecture(capability: tuple[int, int]) -> str:
    found = nearest(capability)
    if found is None:
        raise Unsupported(f"a GPU of capability {capability[0]}.{capability[1]}, kernels are for 8.0 and later")
    return found

"""How ops become kernel launches on a GPU; what no kernel family computes becomes generated loops, as on the CPU."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.index import Index, index
from sylvester.codegen.lazy import Extern, Lazy, Pointer
from sylvester.codegen.lowering import LOWERINGS, TAKES_BF16, Lower, Lowerer, Lowering
from sylvester.codegen.shapes import dtype_of, shape_of

dialect = torch.ops.sylvester
GPU_LOWERINGS: dict[Any, Lower] = {}
NO_LIMIT = 2**31 - 1
Given = Pointer | Index | float
When = tuple[Index, int, int]
"""A size and the least and the most that it may be."""


@dataclass(frozen=True)
class KernelCall(Extern):
    """A launch of a hand-written kernel: what its types name, and the programs that run. `when`: only at such sizes."""

    kernel: Kernel | None = None
    given: tuple[Given, ...] = ()
    grid: tuple[Index, ...] = field(default=())
    when: When | None = None


def gpu_lowers(*targets: Any) -> Callable[[Lowerer], Lowerer]:
    """As `lowers`, for GPUs only."""

    def register(function: Lowerer) -> Lowerer:
        GPU_LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register


class GpuLowering(Lowering):
    """Every op by its kernel on a GPU, or by the lowering to loops that all targets share."""

    target: ClassVar[str] = "cuda"
    table: ClassVar[Mapping[Any, Lower]] = ChainMap(GPU_LOWERINGS, LOWERINGS)
    takes_bf16: ClassVar[Collection[Any]] = {*TAKES_BF16, dialect.linear_bf16.default}

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.constants: dict[str, Tensor] = {}
        """Stored tensors that kernels need and the program does not have, by key."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[Index, ...],
        given: Mapping[str, Given],
        writes: tuple[str, ...],
        when: When | None = None,
    ) -> None:
        """Append a launch; `given` may have more than the kernel takes."""
        arguments = tuple(given[name] for name in kernel.types)
        reads = tuple(a.buffer for a in arguments if isinstance(a, Pointer) and a.buffer not in writes)
        call = KernelCall(
            kernel.function, "", (), writes, reads, index(0), kernel=kernel, given=arguments, grid=grid, when=when
        )
        self.plan.steps.append(call)

    def constant(self, tensor: Tensor, key: str) -> str:
        """The buffer of a tensor that is stored beside the weights."""
        found = next((b.name for b in self.plan.of_kind("weight") if b.key == key), None)
        self.constants[key] = tensor
        return found or self.buffer("weight", shape_of(tensor), dtype_of(tensor.dtype), key).name


def stored(lowering: Lowering, x: Lazy) -> Pointer:
    """Memory that holds exactly x, row-major."""
    buffer = lowering.contiguous(x)
    return Pointer(buffer.name, index(0), buffer.dtype)


def over(total: Index, part: int) -> Index:
    """How many parts there are, the last one perhaps not whole."""
    return (total + (part - 1)) // part

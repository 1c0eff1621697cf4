"""How ops become kernel launches on a GPU; what no kernel family computes becomes generated loops, as on the CPU."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from sylvester.codegen.elementwise import call
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.codegen.index import Index
from sylvester.codegen.lazy import Extern, Lazy
from sylvester.codegen.lowering import LOWERINGS, Fact, Lower, Lowerer, Lowering

aten, dialect = torch.ops.aten, torch.ops.sylvester
GPU_LOWERINGS: dict[Any, Lower] = {}


@dataclass(frozen=True)
class KernelCall(Extern):
    """A launch of a hand-written kernel: `arguments` in the order of its types, and the programs that run."""

    kernel: Kernel | None = None
    grid: tuple[Index, ...] = field(default=())


def gpu_lowers(*targets: Any) -> Any:
    """As `lowers`, for GPUs only."""

    def register(function: Lowerer) -> Lowerer:
        GPU_LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register


class GpuLowering(Lowering):
    """Every op by its kernel on a GPU, or by the lowering to loops that all targets share."""

    target: ClassVar[str] = "cuda"
    table: ClassVar[Mapping[Any, Lower]] = ChainMap(GPU_LOWERINGS, LOWERINGS)


@gpu_lowers(aten.linear.default)
def linear(lowering: Lowering, fact: Fact, x: Lazy, weight: Lazy, bias: Lazy | None = None) -> Lazy:
    y = lowering.reduce(
        "sum", fact.shape, (x.shape[-1],), fact.dtype,
        lambda o, i: call("mul", x.load([*o[:-1], *i]), weight.load([*o[-1:], *i][-len(weight.shape) :])),
    )  # fmt: skip
    if bias is None:
        return y
    return Lazy(fact.shape, fact.dtype, lambda i: call("add", y.load(i), bias.at(i)))

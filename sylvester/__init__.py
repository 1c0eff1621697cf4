"""sylvester: a graph-rewriting compiler for PyTorch models. Every name loads what it needs when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sylvester import passes as passes
    from sylvester.compiler.budget import Budget as Budget
    from sylvester.compiler.compiled import Compiled as Compiled
    from sylvester.compiler.compiled import load as load
    from sylvester.compiler.driver import compile as compile
    from sylvester.compiler.driver import trace as trace
    from sylvester.compiler.errors import CompileError as CompileError
    from sylvester.compiler.finetune import finetune as finetune
    from sylvester.compiler.halo import halo as halo
    from sylvester.compiler.halo_sharded import halo_shard as halo_shard
    from sylvester.compiler.lora import lora as lora
    from sylvester.compiler.program import Program as Program
    from sylvester.compiler.target import Target as Target

__version__ = "0.1.0"

_PLACES = {
    "Budget": "sylvester.compiler.budget",
    "CompileError": "sylvester.compiler.errors",
    "Compiled": "sylvester.compiler.compiled",
    "Program": "sylvester.compiler.program",
    "Target": "sylvester.compiler.target",
    "compile": "sylvester.compiler.driver",
    "finetune": "sylvester.compiler.finetune",
    "halo": "sylvester.compiler.halo",
    "halo_shard": "sylvester.compiler.halo_sharded",
    "load": "sylvester.compiler.compiled",
    "lora": "sylvester.compiler.lora",
    "trace": "sylvester.compiler.driver",
}

__all__ = [
    "Budget",
    "CompileError",
    "Compiled",
    "Program",
    "Target",
    "compile",
    "finetune",
    "hadamard",
    "halo",
    "halo_shard",
    "load",
    "lora",
    "passes",
    "trace",
]


def hadamard(x: Tensor, block: int | None = None, transposed: bool = False) -> Tensor:
    """Blocks of the last axis of x times H^T / sqrt(block), or H; without a block, the largest that has a matrix H."""
    from sylvester.compiler import ops
    from sylvester.compiler.hadamard import largest_block

    return ops.hadamard(x, largest_block(int(x.shape[-1])) if block is None else block, transposed)


def __getattr__(name: str) -> Any:
    if name == "passes":
        return importlib.import_module("sylvester.passes")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'sylvester' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""The dialect op of programs that several ranks run together, a sum over them, and who may run such a program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from sylvester.compiler.errors import CompileError
from sylvester.compiler.ops import elementwise_cost, op

RANKS = "tensor_parallel"
"""Key of `Program.info`: {"rank", "world"} of a program that is one rank's part."""


@op(
    cost=elementwise_cost,
    fact=torch.empty_like,
    examples=(((2, 3, 8),), ((5, 7),), ((1, 4, 5),)),
)
def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over the ranks of the default process group; x itself where there is no group.

    The second of the two operators of Megatron-LM (Shoeybi et al., 2019).
    """
    total = x.clone(memory_format=torch.contiguous_format)
    if _initialised():
        distributed.all_reduce(total)
    return total


def require_ranks(info: Mapping[str, Any]) -> None:
    """A program that is one rank's part runs in a process group of that many ranks, as that rank."""
    wanted = info.get(RANKS)
    if wanted is None:
        return
    rank, world = wanted["rank"], wanted["world"]
    hint = "start one process a rank with torchrun, and call torch.distributed.init_process_group before the first call"
    if not _initialised():
        raise CompileError(
            f"the program is rank {rank} of {world}, but torch.distributed has no process group", hint=hint
        )
    found = distributed.get_rank(), distributed.get_world_size()
    if found != (rank, world):
        raise CompileError(
            f"the program is rank {rank} of {world}, the process is rank {found[0]} of {found[1]}", hint=hint
        )


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()

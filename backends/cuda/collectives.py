"""Sums over ranks of what lies on devices, by torch.distributed: NCCL between GPUs."""

from __future__ import annotations

from typing import Any

from sylvester.backends.cuda.device import Device


def require_ranks(ranks: Any) -> None:
    """`CompileError` unless this process is the rank that the artefact is for; None is for no rank."""
    if ranks is None:
        return
    from sylvester.compiler import parallel_ops

    parallel_ops.require_ranks({parallel_ops.RANKS: ranks})


def sum_over_ranks(device: Device, address: int, count: int) -> None:
    """The float32 numbers there become their sums over the ranks of the default process group.

    Where there is no group they stay.
    """
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    numbers = device.floats(address, count)
    if not numbers.is_cuda:
        distributed.all_reduce(numbers)
        return
    stream = torch.cuda.current_stream().cuda_stream
    device.lead(stream)
    distributed.all_reduce(numbers)
    device.follow(stream)

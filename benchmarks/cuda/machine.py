"""The GPU of this machine and what bounds work on it; or a rehearsal of the same steps on the CPU."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import sylvester as sv
from benchmarks.measure import seconds
from sylvester.backends.cuda import backend, emulated, runtime
from sylvester.backends.cuda.device import Device
from sylvester.backends.cuda.driver import first_device
from sylvester.codegen.gpu_architectures import SHARED
from sylvester.compiler.compiled import Compiled
from sylvester.compiler.manifest import read

COPIED, SIDE = 1 << 30, 8192
"""Bytes of a copy that measures bandwidth, and the width of products that measure the peak."""


def _float8_product(x: Tensor, y: Tensor) -> Tensor:
    one = torch.ones((), device=x.device)
    return torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16)


PRODUCTS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
    "bf16": (torch.bfloat16, torch.mm),
    "int8": (torch.int8, torch._int_mm),
    "fp8": (torch.float8_e4m3fn, _float8_product),
}


@dataclass
class Machine:
    """`device` opens artefacts; torch computes on `place`."""

    device: Device
    place: torch.device
    name: str
    rehearsal: bool = False
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def arch(self) -> str:
        """The newest architecture that code is built for and the device runs."""
        return runtime.built_for(self.device.arch, tuple(SHARED))

    def compile(self, model: Any, **options: Any) -> Compiled:
        """For the architecture of the device alone, so that tiles may be tuned for it."""
        target = sv.Target("cuda", arch=self.arch, **options.pop("target", {}))
        if not self.rehearsal:
            return self._open.enter_context(sv.compile(model, target=target, **options))
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        with mock.patch.object(backend, "build", emulated.build), sv.compile(model, target=target, **options) as made:
            path = made.save(folder / "made")
        return self._open.enter_context(Compiled(path, runner=runtime.GpuRunner(path, read(path), self.device)))

    def close(self) -> None:
        self._open.close()

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()

    def bandwidth(self) -> float:
        """Bytes a second of a copy, read and written."""
        source = torch.empty(COPIED if not self.rehearsal else 1 << 20, dtype=torch.uint8, device=self.place)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median(lambda: target.copy_(source))

    def peak(self, kind: str) -> float:
        """Operations a second of a large product of PyTorch's, in one of `PRODUCTS`."""
        side = SIDE if not self.rehearsal else 64
        dtype, product = PRODUCTS[kind]
        x = torch.ones(side, side, device=self.place).to(dtype)
        return 2 * side**3 / self.median(lambda: product(x, x.t()))

    def median(self, step: Callable[[], object], runs: int = 20) -> float:
        """Seconds of a step, from idle to idle."""
        step()
        return statistics.median(
            seconds(lambda: (step(), self.wait())) for _ in range(runs if not self.rehearsal else 3)
        )


def found(rehearsal: bool) -> Machine:
    """`Unsupported` without a GPU, unless it is a rehearsal."""
    if rehearsal:
        return Machine(emulated.Emulated(memory=8 << 30), torch.device("cpu"), "a rehearsal on the CPU", True)
    device = first_device()
    return Machine(device, torch.device("cuda"), torch.cuda.get_device_name())

"""A device on the memory of this machine, whose kernels run by Triton's interpreter: for tests of whole artefacts.

`build` stands in for the compiler: its images are the kernels themselves, as JSON.
"""

from __future__ import annotations

import bisect
import ctypes
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sylvester.backends.cuda.compile import Cubin
from sylvester.backends.cuda.device import OutOfMemory, Transfer
from sylvester.backends.cuda.modules import interpret
from sylvester.codegen.gpu_kernel import Kernel

Array = NDArray[np.generic]
MAGIC = b"\x7fELF"
"""What images begin with."""
ALIGNMENT = 256
UNWRITTEN = 0xFF
"""Every byte of fresh memory: NaN in floats, -1 in whole numbers."""
DTYPES = {
    "*fp32": torch.float32, "*fp64": torch.float64, "*fp16": torch.float16, "*bf16": torch.bfloat16,
    "*fp8e4nv": torch.float8_e4m3fn, "*i64": torch.int64, "*i32": torch.int32, "*i8": torch.int8, "*u8": torch.uint8,
    "*i1": torch.bool,
}  # fmt: skip


def build(kernel: Kernel, arch: str) -> Cubin:
    """An image that `Emulated` runs, for any architecture."""
    return Cubin(kernel.function, MAGIC + json.dumps(asdict(kernel)).encode(), 0, kernel.warps)


def kernel_of(image: bytes) -> Kernel:
    """What `build` made the image of."""
    data = json.loads(image.removeprefix(MAGIC))
    return Kernel(**(data | {"aligned": tuple(data["aligned"])}))


@dataclass
class Emulated:
    """Addresses are those of this process. Accesses outside of what is held are assertion errors."""

    arch: str = "sm_90"
    memory: int = 1 << 30
    stream: int = 0
    held: dict[int, Tensor] = field(default_factory=dict)
    """Bytes by address."""
    launches: list[str] = field(default_factory=list)
    """Names of the kernels that ran."""
    sent: int = 0
    fetched: int = 0
    """Bytes copied to the device, and from it."""
    replays: int = 0
    order: list[tuple[str, int]] = field(default_factory=list)
    """Streams that were followed, and led."""

    def __post_init__(self) -> None:
        self._noted: list[Any] | None = None

    def free_bytes(self) -> int:
        return self.memory - sum(room.numel() for room in self.held.values())

    def allocate(self, nbytes: int) -> int:
        self._require_no_capture()
        if nbytes > self.free_bytes():
            raise OutOfMemory(nbytes, self.free_bytes())
        room = torch.full((nbytes + ALIGNMENT,), UNWRITTEN, dtype=torch.uint8)
        skipped = -room.data_ptr() % ALIGNMENT
        address = room.data_ptr() + skipped
        self.held[address] = room[skipped : skipped + nbytes]
        return address

    def release(self, address: int) -> None:
        del self.held[address]

    def write(self, address: int, array: Array) -> None:
        self._require_no_capture()
        self.bytes_at(address, array.nbytes)
        self.sent += array.nbytes
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def read(self, address: int, array: Array) -> None:
        self._require_no_capture()
        self.bytes_at(address, array.nbytes)
        self.fetched += array.nbytes
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def begin_read(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        coming = np.empty(nbytes, np.uint8)
        self.read(address, coming)
        return coming

    def end_read(self, coming: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return coming

    def clear(self, address: int, nbytes: int) -> None:
        self._require_no_capture()
        self.bytes_at(address, nbytes)[:nbytes] = 0

    def copy(self, target: int, source: int, transfer: Transfer) -> None:
        self._require_no_capture()
        for row in range(transfer.height):
            to, origin = target + row * transfer.to_pitch, source + row * transfer.from_pitch
            self.bytes_at(to, transfer.width)[: transfer.width] = self.bytes_at(origin, transfer.width)[
                : transfer.width
            ]

    def function(self, image: Path, name: str, shared: int) -> Kernel:
        kernel = kernel_of(image.read_bytes())
        assert kernel.function == name
        return kernel

    def launch(
        self, function: Any, grid: tuple[int, ...], warps: int, shared: int, types: tuple[str, ...], values: list[Any]
    ) -> None:
        assert types == tuple(function.types.values())
        given = {
            name: self._tensor(value, kind) if kind.startswith("*") else value
            for (name, kind), value in zip(function.types.items(), values, strict=True)
        }
        if self._noted is not None:
            self._noted.append((function, grid, given))
            return
        self.launches.append(function.function)
        interpret(function, grid, given)

    def begin_capture(self) -> None:
        self._require_no_capture()
        self._noted = []

    def end_capture(self) -> list[Any]:
        noted, self._noted = self._noted, None
        assert noted is not None
        return noted

    def replay(self, graph: list[Any]) -> None:
        self._require_no_capture()
        self.replays += 1
        for function, grid, given in graph:
            interpret(function, grid, given)

    def forget(self, graph: list[Any]) -> None:
        graph.clear()

    def follow(self, stream: int) -> None:
        self.order.append(("follow", stream))

    def lead(self, stream: int) -> None:
        self.order.append(("lead", stream))

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed(self, first: float, last: float) -> float:
        return 1000 * (last - first)

    def close(self) -> None:
        return None

    def floats(self, address: int, count: int) -> Tensor:
        return self.bytes_at(address, 4 * count)[: 4 * count].view(torch.float32)

    def bytes_at(self, address: int, nbytes: int) -> Tensor:
        """What is held from an address on, `nbytes` or more."""
        starts = sorted(self.held)
        start = starts[bisect.bisect_right(starts, address) - 1] if starts else 0
        room = self.held.get(start)
        found = 0 if room is None or address < start else room.numel() - (address - start)
        assert found >= nbytes, f"{nbytes} bytes at {address:#x}, {found} are held there"
        assert room is not None
        return room[address - start :]

    def _require_no_capture(self) -> None:
        assert self._noted is None, "only launches may be captured"

    def _tensor(self, address: int, kind: str) -> Tensor:
        room, dtype = self.bytes_at(address, 1), DTYPES[kind]
        return room[: room.numel() // dtype.itemsize * dtype.itemsize].view(dtype)

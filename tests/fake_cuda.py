"""NVIDIA's driver as a small C library on the memory of the host; kernels run by Triton's interpreter."""

from __future__ import annotations

import ctypes
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sylvester.backends.cuda.driver import C_TYPES, Gpu
from sylvester.backends.cuda.emulated import DTYPES, kernel_of
from sylvester.backends.cuda.modules import interpret
from sylvester.backends.toolchain import build_shared
from sylvester.codegen import isa
from sylvester.compiler.target import host_architecture

_FOLDER = tempfile.TemporaryDirectory(prefix="sylvester-fake-cuda-")
Hook = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_void_p)


@cache
def library() -> Path:
    source = Path(__file__).with_name("fake_cuda.c").read_text(encoding="utf-8")
    return build_shared(source, Path(_FOLDER.name, "libfakecuda.so"), isa.variants((), host_architecture())[0])


class Fake:
    """One driver, empty. `launches` has (function, grid, threads) of what ran; `computes`: kernels do."""

    def __init__(self, devices: int = 1, pools: bool = True, memory: int = 1 << 28, computes: bool = False) -> None:
        self.driver = ctypes.CDLL(str(library()))
        self.driver.fake_record.restype = ctypes.c_char_p
        self.driver.fake_room.restype = ctypes.c_size_t
        self.driver.fake_reset(devices, int(pools), ctypes.c_size_t(memory))
        self.computes, self.launches, self.faults = computes, list[tuple[Any, ...]](), list[str]()
        self._hook = Hook(self._launched)
        self.driver.fake_hook(self._hook)

    def gpu(self) -> Gpu:
        return Gpu(self.driver)

    def fail(self, name: str, code: int) -> None:
        """The call answers with this code from here on."""
        self.driver.fake_fail(name.encode(), code)

    @property
    def record(self) -> list[str]:
        """The calls so far, but for contexts and attributes."""
        return self.driver.fake_record().decode().split()

    @property
    def live(self) -> int:
        """Pieces of memory that are held."""
        return int(self.driver.fake_live())

    def _launched(self, image: bytes, grid: Any, threads: int, packed: int) -> None:
        kernel, shape = kernel_of(image), tuple(grid[n] for n in range(3))
        given = {
            name: self._value(kind, packed + 8 * n) for n, (name, kind) in enumerate(kernel.types.items())
        }  # fmt: skip
        self.launches.append((kernel.function, shape, threads))
        if self.computes:
            interpret(kernel, shape, given)

    def _value(self, kind: str, place: int) -> Any:
        if not kind.startswith("*"):
            return C_TYPES[kind].from_address(place).value
        address = ctypes.c_uint64.from_address(place).value
        nbytes, dtype = self.driver.fake_room(ctypes.c_uint64(address)), DTYPES[kind]
        count = nbytes // dtype.itemsize
        if not count:
            self.faults.append(f"nothing is held at {address:#x}")
            return torch.empty(0, dtype=dtype)
        held = (ctypes.c_ubyte * (count * dtype.itemsize)).from_address(address)
        return torch.frombuffer(held, dtype=dtype)

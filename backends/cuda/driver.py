"""The first GPU through NVIDIA's driver, without other software: contexts, memory, modules, launches, graphs."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.backends.cuda.device import OutOfMemory, Transfer
from sylvester.compiler.errors import CompileError, Unsupported

Array = NDArray[np.generic]
LIBRARY = "libcuda.so.1"
MAJOR, MINOR, POOLS, MOST_SHARED = 75, 76, 115, 97
"""Attributes of a device: its compute capability, whether memory can be taken in the order of a stream, and the most
shared memory of a launch."""
DYNAMIC_SHARED = 8
"""Attribute of a function: the most bytes of shared memory that a launch may ask for."""
USUAL_SHARED = 48 * 1024
WARP = 32
NO_MEMORY = 2
NON_BLOCKING = 1
"""A stream that does not wait for the default stream of the context, which other software may use."""
RELEASE_THRESHOLD = 4
"""Attribute of a pool: how many bytes it keeps when they are free."""
THREAD_LOCAL = 1
"""Capturing a stream forbids unsafe calls to this thread only."""
UNTIMED = 2
PINNED = 64 << 10
"""Bytes of host memory that the device writes into."""
DEVICE_MEMORY = 2
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
Size, Address, Handle = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p


class PoolProperties(ctypes.Structure):
    """CUmemPoolProps."""

    _fields_ = (
        ("allocation", ctypes.c_int), ("handles", ctypes.c_int), ("location", ctypes.c_int), ("device", ctypes.c_int),
        ("security", Handle), ("most", Size), ("usage", ctypes.c_ushort), ("reserved", ctypes.c_ubyte * 54),
    )  # fmt: skip


class Side(ctypes.Structure):
    """What CUDA_MEMCPY2D says of the source, or of the target."""

    _fields_ = (
        ("x", Size), ("y", Size), ("kind", ctypes.c_int), ("host", Handle), ("device", Address), ("array", Handle),
        ("pitch", Size),
    )  # fmt: skip


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (("source", Side), ("target", Side), ("width", Size), ("height", Size))


class Gpu:
    """All work is given to one stream of its own, in the context that other software in the process uses too.

    That context is current during calls only, on whatever thread they are made.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._context, self._pinned, self._arrived = Handle(), Handle(), Handle()
        self._check("cuInit", driver.cuInit(0))
        device = ctypes.c_int()
        self._check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), 0))
        self.arch = f"sm_{self._attribute(MAJOR, device)}{self._attribute(MINOR, device)}"
        retained = driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
        self._check("cuDevicePrimaryCtxRetain", retained)
        self._stream = self._handle("cuStreamCreate", NON_BLOCKING)
        self._event = self._handle("cuEventCreate", UNTIMED)
        self._pool = self._made_pool(device) if self._attribute(POOLS, device) else None
        self._most_shared = self._attribute(MOST_SHARED, device)

    @property
    def stream(self) -> int:
        return self._stream.value or 0

    def _attribute(self, which: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        found = self._driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        self._check("cuDeviceGetAttribute", found)
        return value.value

    def _made_pool(self, device: ctypes.c_int) -> ctypes.c_void_p:
        """A pool that keeps all memory that was once taken, until `close`."""
        properties = PoolProperties(allocation=1, location=1, device=device.value)
        pool = self._handle("cuMemPoolCreate", ctypes.byref(properties))
        most = ctypes.c_uint64(2**64 - 1)
        self._do("cuMemPoolSetAttribute", pool, RELEASE_THRESHOLD, ctypes.byref(most))
        return pool

    def _do(self, name: str, *arguments: Any) -> None:
        self._check(name, self._code(name, *arguments))

    def _code(self, name: str, *arguments: Any) -> int:
        """What a call answers that is made in the context."""
        self._check("cuCtxPushCurrent", self._driver.cuCtxPushCurrent_v2(self._context))
        try:
            return int(getattr(self._driver, name)(*arguments))
        finally:
            self._driver.cuCtxPopCurrent_v2(ctypes.byref(Handle()))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise CompileError(f"{name} failed with {code}: {(text.value or b'unknown').decode()}")

    def _handle(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """What a call puts into its first argument."""
        made = Handle()
        self._do(name, ctypes.byref(made), *arguments)
        return made

    def free_bytes(self) -> int:
        free, total = Size(), Size()
        self._do("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        address = Address()
        if self._pool is None:
            code = self._code("cuMemAlloc_v2", ctypes.byref(address), Size(nbytes))
        else:
            taken = (ctypes.byref(address), Size(nbytes), self._pool, self._stream)
            code = self._code("cuMemAllocFromPoolAsync", *taken)
        if code == NO_MEMORY:
            raise OutOfMemory(nbytes, self.free_bytes())
        self._check("taking memory", code)
        return address.value

    def release(self, address: int) -> None:
        if self._pool is None:
            self._do("cuStreamSynchronize", self._stream)
            self._do("cuMemFree_v2", Address(address))
        else:
            self._do("cuMemFreeAsync", Address(address), self._stream)

    def close(self) -> None:
        """Memory that was released goes back to the system."""
        self._do("cuStreamSynchronize", self._stream)
        if self._pool is not None:
            self._do("cuMemPoolTrimTo", self._pool, Size(0))

    def write(self, address: int, array: Array) -> None:
        """Memory that is not pinned is copied by the driver before the call returns."""
        self._do("cuMemcpyHtoDAsync_v2", Address(address), _memory(array), Size(array.nbytes), self._stream)

    def read(self, address: int, array: Array) -> None:
        self._do("cuMemcpyDtoHAsync_v2", _memory(array), Address(address), Size(array.nbytes), self._stream)
        self._do("cuStreamSynchronize", self._stream)

    def begin_read(self, address: int, nbytes: int) -> int:
        """Into pinned memory: a copy to other memory would hold up the caller."""
        if nbytes > PINNED:
            raise ValueError(f"{nbytes} bytes to fetch, expected at most {PINNED}")
        if not self._pinned:
            self._pinned = self._handle("cuMemHostAlloc", Size(PINNED), 0)
            self._arrived = self._handle("cuEventCreate", UNTIMED)
        self._do("cuMemcpyDtoHAsync_v2", self._pinned, Address(address), Size(nbytes), self._stream)
        self._do("cuEventRecord", self._arrived, self._stream)
        return nbytes

    def end_read(self, coming: int) -> NDArray[np.uint8]:
        self._do("cuEventSynchronize", self._arrived)
        return np.frombuffer(ctypes.string_at(self._pinned, coming), np.uint8)

    def clear(self, address: int, nbytes: int) -> None:
        self._do("cuMemsetD8Async", Address(address), ctypes.c_ubyte(0), Size(nbytes), self._stream)

    def copy(self, target: int, source: int, transfer: Transfer) -> None:
        if transfer.height == 1:
            width = Size(transfer.width)
            self._do("cuMemcpyDtoDAsync_v2", Address(target), Address(source), width, self._stream)
            return
        origin = Side(kind=DEVICE_MEMORY, device=source, pitch=transfer.from_pitch)
        to = Side(kind=DEVICE_MEMORY, device=target, pitch=transfer.to_pitch)
        what = Copy2D(origin, to, transfer.width, transfer.height)
        self._do("cuMemcpy2DAsync_v2", ctypes.byref(what), self._stream)

    def function(self, image: Path, name: str, shared: int) -> Any:
        if shared > self._most_shared:
            raise Unsupported(
                f"the kernel {name} of {image.name} takes {shared} bytes of shared memory, {self.arch} has "
                f"{self._most_shared}", hint=f"compile again with sv.Target('cuda', arch={self.arch!r})",
            )  # fmt: skip
        try:
            module = self._handle("cuModuleLoadData", image.read_bytes())
            function = self._handle("cuModuleGetFunction", module, name.encode())
        except CompileError as cause:
            raise CompileError(
                f"the driver does not take the kernel {name} of {image.name} on {self.arch}: {cause}",
                hint="update the driver of NVIDIA, or compile again on this machine",
            ) from cause
        if shared > USUAL_SHARED:
            self._do("cuFuncSetAttribute", function, DYNAMIC_SHARED, shared)
        return function

    def launch(
        self, function: Any, grid: tuple[int, ...], warps: int, shared: int, types: tuple[str, ...], values: list[Any]
    ) -> None:
        """Triton's kernels take two more addresses, of scratch memory that they do not have."""
        cells = [_cell(kind, value) for kind, value in zip(types, values, strict=True)]
        cells += [Address(0), Address(0)]
        table = (Handle * len(cells))(*(ctypes.addressof(c) for c in cells))
        whole = (*grid, *[1] * (3 - len(grid)))
        self._do("cuLaunchKernel", function, *whole, warps * WARP, 1, 1, shared, self._stream, table, None)

    def begin_capture(self) -> None:
        self._do("cuStreamBeginCapture_v2", self._stream, THREAD_LOCAL)

    def end_capture(self) -> Any:
        graph = self._handle_of_capture()
        try:
            return self._handle("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
        finally:
            self._do("cuGraphDestroy", graph)

    def _handle_of_capture(self) -> ctypes.c_void_p:
        graph = Handle()
        self._do("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        return graph

    def replay(self, graph: Any) -> None:
        self._do("cuGraphLaunch", graph, self._stream)

    def forget(self, graph: Any) -> None:
        self._do("cuGraphExecDestroy", graph)

    def follow(self, stream: int) -> None:
        self._do("cuEventRecord", self._event, Handle(stream))
        self._do("cuStreamWaitEvent", self._stream, self._event, 0)

    def lead(self, stream: int) -> None:
        self._do("cuEventRecord", self._event, self._stream)
        self._do("cuStreamWaitEvent", Handle(stream), self._event, 0)

    def floats(self, address: int, count: int) -> Any:
        import torch

        return torch.as_tensor(_Floats(address, count), device="cuda")

    def mark(self) -> Any:
        event = self._handle("cuEventCreate", 0)
        self._do("cuEventRecord", event, self._stream)
        return event

    def elapsed(self, first: Any, last: Any) -> float:
        found = ctypes.c_float()
        self._do("cuEventSynchronize", last)
        self._do("cuEventElapsedTime", ctypes.byref(found), first, last)
        for event in (first, last):
            self._do("cuEventDestroy_v2", event)
        return found.value


class _Floats:
    """Memory as other software takes it."""

    def __init__(self, address: int, count: int) -> None:
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<f4", "data": (address, False), "version": 3}


def _cell(kind: str, value: Any) -> Any:
    return Address(value) if kind.startswith("*") else C_TYPES[kind](value)


def _memory(array: Array) -> ctypes.c_void_p:
    return Handle(array.ctypes.data)


def first_device() -> Gpu:
    """`Unsupported` where there is no driver or no device."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError as cause:
        raise Unsupported(
            f"this artefact runs on an NVIDIA GPU, and this machine has no {LIBRARY}",
            hint="load it on a machine with the driver of NVIDIA, or compile with target='cpu'",
        ) from cause
    try:
        return Gpu(driver)
    except CompileError as cause:
        raise Unsupported(f"the driver of NVIDIA found no GPU: {cause}", hint="compile with target='cpu'") from cause

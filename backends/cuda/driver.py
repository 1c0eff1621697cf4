"""The first GPU through NVIDIA's driver, without other software: contexts, memory, modules, launches."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sylvester.compiler.errors import CompileError, Unsupported

Array = NDArray[np.generic]
LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76
"""Attributes of a device: its compute capability."""
DYNAMIC_SHARED = 8
"""Attribute of a function: the most bytes of shared memory that a launch may ask for."""
USUAL_SHARED = 48 * 1024
WARP = 32
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class Gpu:
    """Calls run in the default stream, one after another."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._do("cuInit", 0)
        device = ctypes.c_int()
        self._do("cuDeviceGet", ctypes.byref(device), 0)
        self._context = ctypes.c_void_p()
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._do("cuCtxSetCurrent", self._context)
        self.arch = f"sm_{self._attribute(MAJOR, device)}{self._attribute(MINOR, device)}"

    def _attribute(self, which: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._do("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def _do(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(text))
            raise CompileError(f"{name} failed with {code}: {(text.value or b'unknown').decode()}")

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._do("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_uint64()
        self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def release(self, address: int) -> None:
        self._do("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, array: Array) -> None:
        source = ctypes.c_void_p(array.ctypes.data)
        self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.nbytes))

    def read(self, address: int, array: Array) -> None:
        self._do(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
        )

    def function(self, image: Path, name: str, shared: int) -> Any:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuModuleLoadData", ctypes.byref(module), image.read_bytes())
        self._do("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        if shared > USUAL_SHARED:
            self._do("cuFuncSetAttribute", function, DYNAMIC_SHARED, shared)
        return function

    def launch(
        self, function: Any, grid: tuple[int, ...], warps: int, shared: int, types: tuple[str, ...], values: list[Any]
    ) -> None:
        """Triton's kernels take two more addresses, of scratch memory that they do not have."""
        cells = [_cell(kind, value) for kind, value in zip(types, values, strict=True)]
        cells += [ctypes.c_uint64(0), ctypes.c_uint64(0)]
        table = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(c) for c in cells))
        whole = (*grid, *[1] * (3 - len(grid)))
        self._do("cuLaunchKernel", function, *whole, warps * WARP, 1, 1, shared, None, table, None)


def _cell(kind: str, value: Any) -> Any:
    return ctypes.c_uint64(value) if kind.startswith("*") else C_TYPES[kind](value)


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

"""The products of training in int8 on this CPU: a library built at first use, which runs on PyTorch's own threads."""

from __future__ import annotations

import ctypes
import math
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sylvester.backends.toolchain import build_shared, find_compiler
from sylvester.backends.tuning import runnable
from sylvester.codegen.halo import BLOCK_ROWS, source
from sylvester.codegen.isa import of
from sylvester.codegen.layout import PANEL
from sylvester.codegen.quantized import LARGEST_DEPTH
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.hadamard import largest_block, paley_signs, scheme_of
from sylvester.compiler.halo_grouped import GROUP
from sylvester.compiler.halo_quantise import format_of
from sylvester.compiler.halo_rotate import padded
from sylvester.compiler.target import Target, host_architecture

FLOATS = (torch.float32, torch.bfloat16)
UNITS = {"vnni": 4, "bf16": 4, "amx": 64}
"""Variants with dot products of bytes -> what the depth is a multiple of where the left operand is read in place."""


class Turn(ctypes.Structure):
    """`sv_turn`; `held` is the memory that it points to."""

    held: tuple[Any, ...]

    _fields_ = (
        ("k", ctypes.c_int64),
        ("bases", ctypes.c_int64),
        ("orders", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        ("most", ctypes.c_int64),
    )


class Pool(ctypes.Structure):
    """`sv_halo_pool`."""

    _fields_ = (("region", ctypes.c_void_p), ("threads", ctypes.c_int64))


@lru_cache(256)
def turn(order: int, transposed: bool) -> Turn:
    """x H^T, or x H, as C reads it."""
    found = scheme_of(order)
    bases = [paley_signs(base) for base in reversed(found.bases)]
    parts = [(b if transposed else b.T).astype(np.float32) / math.sqrt(len(b)) for b in bases]
    signs = np.concatenate([np.ascontiguousarray(p).ravel() for p in parts]) if parts else np.zeros(1, np.float32)
    orders = np.array([len(b) for b in bases] or [1], np.int64)
    made = Turn(found.k, len(bases), orders.ctypes.data, signs.ctypes.data, int(orders.max()))
    made.held = (orders, signs)
    return made


def _reference(order: int, transposed: bool) -> Any:
    return ctypes.byref(turn(order, transposed)) if order > 1 else None


class Kernels:
    """The library. Operands that it does not take give None."""

    def __init__(self, code: ctypes.CDLL, variant: str) -> None:
        self.variant, self._code = variant, code
        self.multiplies = variant in UNITS
        self._region = parallel_region()
        code.sv_halo_rounded.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_float]
        code.sv_halo_grouped.argtypes = [ctypes.c_void_p] * 5
        code.sv_halo_restored.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_float, *[ctypes.c_void_p] * 2]
        if self.multiplies:
            code.sv_halo_mm.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_float, *[ctypes.c_void_p] * 7]

    def rounded(
        self, x: Tensor, scale: Tensor | None, format: str, features: bool, tokens: bool
    ) -> tuple[Tensor, Tensor] | None:
        """`halo_ops.rounded`; the scale may be no finite number, the values are none then."""
        chosen = format_of(format)
        if not chosen.whole or x.dtype not in FLOATS or not x.numel():
            return None
        x = x if x.stride(1) == 1 else x.contiguous()
        rows, width = x.shape
        count, block = padded(rows) if tokens else rows, largest_block(width) if features else 1
        turned = x.new_empty((count, width), dtype=torch.float32) if block > 1 or (count > 1 and tokens) else None
        values = x.new_empty((count, width), dtype=torch.int8)
        found = torch.empty(()) if scale is None else scale.detach().float().clone()
        self._call(
            self._code.sv_halo_rounded,
            (rows, width, x.stride(0), x.dtype == torch.bfloat16, count, scale is not None),
            x.data_ptr(), _reference(block, False), _reference(count if tokens else 1, False), _pointer(turned),
            values.data_ptr(), found.data_ptr(), chosen.top,
        )  # fmt: skip
        return values, found

    def grouped(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """`halo_grouped.grouped`."""
        if x.dtype not in FLOATS or not x.numel():
            return None
        x = x if x.stride(1) == 1 else x.contiguous()
        rows, width = x.shape
        values = x.new_empty((rows, width), dtype=torch.int8)
        scales = x.new_empty((rows, -(-width // GROUP)), dtype=torch.bfloat16)
        numbers = (rows, width, x.stride(0), x.dtype == torch.bfloat16)
        self._call(self._code.sv_halo_grouped, numbers, x.data_ptr(), values.data_ptr(), scales.data_ptr())
        return values, scales

    def restored(self, values: Tensor, scale: Tensor, dtype: torch.dtype, features: bool = False) -> Tensor | None:
        """`halo_grouped.restored` of scales [rows, groups], and `turned_back` of one scale."""
        taken = values.dtype == torch.int8 and dtype in FLOATS and values.is_contiguous() and values.numel()
        if not taken:
            return None
        rows, width = values.shape
        y = values.new_empty((rows, width), dtype=dtype)
        scales, one = (scale, 0.0) if scale.ndim else (None, float(scale))
        order = largest_block(width) if features else 1
        self._call(
            self._code.sv_halo_restored,
            (rows, width, dtype == torch.bfloat16),
            values.data_ptr(), _pointer(scales), one, _reference(order, True), y.data_ptr(),
        )  # fmt: skip
        return y

    def product(
        self,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        features: bool = False,
        tokens: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """`halo_ops.product`."""
        (m, k), n = a.shape, b.shape[1]
        known = a.dtype == b.dtype == torch.int8 and dtype in FLOATS
        if not self.multiplies or not known or not m * n * k or k > LARGEST_DEPTH or (bias is not None and tokens):
            return None
        (a, a_turned), (b, b_turned) = _laid_out(a), _laid_out(b)
        unit = UNITS[self.variant]
        blocks = a_turned or k % unit != 0
        packed = a.new_empty((m + BLOCK_ROWS) * (-(-k // unit) * unit)) if blocks else None
        panels = a.new_empty(-(-n // PANEL) * PANEL * (-(-k // 4) * 4))
        turns_tokens = bool(tokens) and m > 1
        every = a.new_empty((m, n), dtype=torch.float32) if turns_tokens else None
        y = a.new_empty((tokens or m, n), dtype=dtype)
        wide = None if bias is None else bias.float().contiguous()
        self._call(
            self._code.sv_halo_mm,
            (m, n, k, a.stride(0), b.stride(0), a_turned, b_turned, dtype == torch.bfloat16, tokens or m),
            a.data_ptr(), b.data_ptr(), float(scale.detach()), _pointer(wide),
            _reference(largest_block(n) if features else 1, True), _reference(m if turns_tokens else 1, True),
            _pointer(packed), panels.data_ptr(), _pointer(every), y.data_ptr(),
        )  # fmt: skip
        return y

    def _call(self, function: Any, numbers: tuple[int, ...], *operands: Any) -> None:
        pool = Pool(self._region, torch.get_num_threads())
        if function(ctypes.byref(pool), (ctypes.c_int64 * len(numbers))(*numbers), *operands):
            raise CompileError("no memory is left for a product of training", hint="use a smaller batch")


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """A matrix by rows, or its transpose and True."""
    if x.stride(1) == 1:
        return x, False
    return (x.t(), True) if x.stride(0) == 1 else (x.contiguous(), False)


@cache
def parallel_region() -> int | None:
    """Address of the function that runs code on the threads of PyTorch's OpenMP; None where it has another one."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = sorted({line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}, key=_is_foreign)
    found = getattr(ctypes.CDLL(paths[0]), "GOMP_parallel", None) if paths else None
    return ctypes.cast(found, ctypes.c_void_p).value if found else None


def _is_foreign(path: str) -> bool:
    """Whether another package may have brought this library."""
    return not Path(path).is_relative_to(Path(torch.__file__).parent)


@cache
def kernels() -> Kernels | CompileError:
    """The library for this CPU, or why there is none."""
    try:
        compiler, isas = find_compiler(), of(host_architecture())
        isa = runnable(isas, Target.parse("cpu"), compiler)
        with tempfile.TemporaryDirectory(prefix="sylvester-halo-") as folder:
            code = ctypes.CDLL(str(build_shared(source(isa), Path(folder, "halo.so"), isa, compiler=compiler)))
    except (CompileError, Unsupported) as error:
        return error
    return Kernels(code, isa.name)
